import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.attention.layout import LAYOUTS, deal, owner, positions, undeal
from ringspan.attention.mask import pieces, visible_pairs
from ringspan.errors import UnknownName
from ringspan.types import Span, total_tokens

PAGE = 8
chunks = st.builds(
    lambda first, n: Span(first * PAGE, first * PAGE + n), st.integers(0, 5), st.integers(0, 200)
)


@settings(max_examples=60, deadline=None)
@given(chunk=chunks, world_size=st.integers(1, 5), layout=st.sampled_from(sorted(LAYOUTS)))
def test_every_position_is_dealt_to_exactly_one_rank(chunk, world_size, layout):
    dealt = deal(layout, chunk, world_size, PAGE)
    assert len(dealt) == world_size
    assert sorted(torch.cat([positions(s) for s in dealt]).tolist()) == list(
        range(chunk.start, chunk.stop)
    )
    rows = [positions(spans)[:, None] for spans in dealt]
    assert torch.equal(undeal(rows, dealt)[:, 0], torch.arange(chunk.start, chunk.stop))


@settings(max_examples=60, deadline=None)
@given(chunk=chunks, world_size=st.integers(1, 5), layout=st.sampled_from(sorted(LAYOUTS)))
def test_only_the_last_page_is_short_and_no_page_is_split(chunk, world_size, layout):
    for spans in deal(layout, chunk, world_size, PAGE):
        for span in spans:
            assert span.start % PAGE == 0
            assert span.stop % PAGE == 0 or span.stop == chunk.stop


def test_owner_is_the_inverse_of_deal():
    dealt = deal("zigzag", Span(16, 16 + 67), 3, PAGE)
    for position in range(16, 83):
        rank, row = owner(dealt, position)
        assert positions(dealt[rank])[row] == position
    with pytest.raises(ValueError, match="position 83"):
        owner(dealt, 83)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_zigzag_and_striped_balance_causal_work(world_size):
    chunk = Span(0, 128 * PAGE)
    for layout, most in (("zigzag", 1.03), ("striped", 1.15), ("contiguous", 2.0)):
        dealt = deal(layout, chunk, world_size, PAGE)
        work = [sum(visible_pairs(pieces(mine, theirs)) for theirs in dealt) for mine in dealt]
        assert sum(work) == chunk.tokens * (chunk.tokens + 1) // 2
        assert max(work) / (sum(work) / world_size) <= most


def test_an_unknown_layout_is_refused_by_name():
    with pytest.raises(
        UnknownName, match=r"unknown layout 'spiral'; known: contiguous, striped, zig"
    ):
        deal("spiral", Span(0, 10), 2, PAGE)


def test_a_chunk_must_start_at_a_page():
    with pytest.raises(ValueError, match="starts at 3"):
        deal("zigzag", Span(3, 10), 2, PAGE)


def test_more_ranks_than_pages_leaves_some_without_tokens():
    dealt = deal("zigzag", Span(0, 5), 4, PAGE)
    assert sorted(total_tokens(spans) for spans in dealt) == [0, 0, 0, 5]
