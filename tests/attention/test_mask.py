import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.attention.layout import deal, positions
from ringspan.attention.mask import Piece, clip, pieces, visible_pairs
from ringspan.types import Span, total_tokens


def seen(cut, num_rows, num_keys):
    """How often each (row, key) pair is held by the pieces."""
    count = torch.zeros(num_rows, num_keys, dtype=torch.int64)
    for p in cut:
        i = torch.arange(p.q1 - p.q0)[:, None]
        j = torch.arange(p.k1 - p.k0)[None]
        allowed = torch.ones(p.q1 - p.q0, p.k1 - p.k0, dtype=torch.bool)
        if p.causal:
            allowed &= j <= i + p.offset
        if p.window is not None:
            allowed &= i + p.offset - j < p.window
        count[p.q0 : p.q1, p.k0 : p.k1] += allowed
    return count


def ascending(page):
    """Ascending spans with gaps."""
    steps = st.lists(st.tuples(st.integers(0, 3 * page), st.integers(1, 2 * page)), max_size=5)

    def build(parts):
        spans, at = [], 0
        for gap, length in parts:
            spans.append(Span(at + gap, at + gap + length))
            at += gap + length
        return tuple(spans)

    return steps.map(build)


@settings(max_examples=300, deadline=None)
@given(q_spans=ascending(5), k_spans=ascending(5), window=st.one_of(st.none(), st.integers(1, 20)))
def test_every_visible_pair_is_held_exactly_once_and_no_other(q_spans, k_spans, window):
    cut = pieces(q_spans, k_spans, True, window)
    q, k = positions(q_spans)[:, None], positions(k_spans)[None]
    want = k <= q
    if window is not None:
        want &= q - k < window
    got = seen(cut, total_tokens(q_spans), total_tokens(k_spans))
    assert torch.equal(got, want.long())
    assert visible_pairs(cut) == int(want.sum())


def test_without_causality_all_is_one_piece():
    assert pieces((Span(5, 8), Span(20, 22)), (Span(0, 9),), False) == (Piece(0, 5, 0, 9),)
    assert pieces((), (Span(0, 9),)) == ()


def test_zigzag_hops_are_at_most_two_pieces_whatever_is_cached():
    dealt = deal("zigzag", Span(1024, 2048), 4, 8)
    cached = deal("zigzag", Span(0, 1024), 4, 8)
    for rank, mine in enumerate(dealt):
        for src, theirs in enumerate(dealt):
            cut = pieces(mine, (*cached[src], *theirs))
            assert len(cut) <= 2
            if src == rank:
                # the diagonal is aligned bottom-right, which every flash kernel has
                assert all(p.causal and p.offset == p.k1 - p.k0 - (p.q1 - p.q0) for p in cut)
            else:
                assert not any(p.causal for p in cut)


@settings(max_examples=200, deadline=None)
@given(
    q_spans=ascending(4),
    k_spans=ascending(4),
    window=st.one_of(st.none(), st.integers(1, 20)),
    at=st.integers(0, 40),
)
def test_cuts_over_two_stretches_of_keys_are_the_whole(q_spans, k_spans, window, at):
    rows, keys = total_tokens(q_spans), total_tokens(k_spans)
    cut, at = pieces(q_spans, k_spans, True, window), min(at, keys)
    left, right = clip(cut, 0, at), clip(cut, at, keys)
    both = torch.cat((seen(left, rows, at), seen(right, rows, keys - at)), 1)
    assert torch.equal(both, seen(cut, rows, keys))
    assert visible_pairs(left) + visible_pairs(right) == visible_pairs(cut)
