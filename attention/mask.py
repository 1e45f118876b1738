"""Which keys a rank's queries may see, cut into rectangles that every dense kernel can do.

Query rows and keys are given by the spans of their positions, both ascending. A piece is a
rectangle (rows × keys) with one rule: its row i sees its key j if

    (not causal or j <= i + offset) and (window is None or i + offset - j < window)

Because both sides ascend, the keys that a span of queries sees in full are a prefix of memory, and
the diagonal, where there is one, follows it directly: for contiguous and zigzag layouts every hop
is one or two pieces, whatever the number of cached pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ringspan.types import Span, coalesce


class Piece(NamedTuple):
    """Query rows [q0, q1) over keys [k0, k1), in the rows' own numbering."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    offset: int = 0
    window: int | None = None


def pieces(
    q_spans: Sequence[Span], k_spans: Sequence[Span], causal: bool = True, window: int | None = None
) -> tuple[Piece, ...]:
    """The pieces that together hold each visible (query, key) pair exactly once."""
    q_spans, k_spans = coalesce(q_spans), coalesce(k_spans)
    num_rows, num_keys = sum(s.tokens for s in q_spans), sum(s.tokens for s in k_spans)
    if not num_rows or not num_keys:
        return ()
    if not causal:
        if window is not None:
            raise ValueError("a window without causality is not a case of this project")
        return (Piece(0, num_rows, 0, num_keys),)
    cut = _causal(q_spans, k_spans) if window is None else _windowed(q_spans, k_spans, window)
    return tuple(_join_full(cut))


def _causal(q_spans: Sequence[Span], k_spans: Sequence[Span]) -> Iterator[Piece]:
    q0 = 0
    for q in q_spans:
        q1 = q0 + q.tokens
        prefix = 0  # keys that every row of q sees
        partial: list[tuple[int, Span]] = []
        k0 = 0
        for k in k_spans:
            if k.stop <= q.start + 1:
                prefix = k0 + k.tokens
            elif k.start < q.stop:
                partial.append((k0, Span(k.start, min(k.stop, q.stop))))
            k0 += k.tokens
        if prefix and partial and partial[0][1].start <= q.start:
            first, k = partial.pop(0)
            yield Piece(q0, q1, 0, first + k.tokens, True, first + q.start - k.start)
        elif prefix:
            yield Piece(q0, q1, 0, prefix)
        for first, k in partial:
            blind = max(0, k.start - q.start)  # rows that lie before all of k
            yield Piece(q0 + blind, q1, first, first + k.tokens, True, q.start + blind - k.start)
        q0 = q1


def _windowed(q_spans: Sequence[Span], k_spans: Sequence[Span], window: int) -> Iterator[Piece]:
    q0 = 0
    for q in q_spans:
        q1 = q0 + q.tokens
        row = 0
        for k in k_spans:
            start, stop = max(k.start, q.start - window + 1), min(k.stop, q.stop)
            if start < stop:
                k0 = row + start - k.start
                causal = stop - 1 > q.start
                cut = window if start <= q.stop - 1 - window else None
                offset = q.start - start if causal or cut else 0
                yield Piece(q0, q1, k0, k0 + stop - start, causal, offset, cut)
            row += k.tokens
        q0 = q1


def _join_full(cut: Iterator[Piece]) -> Iterator[Piece]:
    """Neighbouring full pieces over the same keys are one call."""
    held: Piece | None = None
    for piece in cut:
        if held is not None:
            full = not (held.causal or piece.causal or held.window or piece.window)
            if full and held[2:4] == piece[2:4] and held.q1 == piece.q0:
                held = held._replace(q1=piece.q1)
                continue
            yield held
        held = piece
    if held is not None:
        yield held


def clip(cut: Sequence[Piece], k0: int, k1: int) -> tuple[Piece, ...]:
    """The pieces over keys [k0, k1) alone, these numbered from 0 on."""
    clipped = []
    for piece in cut:
        first, stop = max(piece.k0, k0), min(piece.k1, k1)
        if first < stop:
            offset = piece.offset - (first - piece.k0) if piece.causal or piece.window else 0
            clipped.append(piece._replace(k0=first - k0, k1=stop - k0, offset=offset))
    return tuple(clipped)


def seen_keys(piece: Piece) -> np.ndarray:
    """How many keys each row of a piece sees, int64 [q1 - q0]."""
    keys = piece.k1 - piece.k0
    ahead = np.arange(piece.q1 - piece.q0, dtype=np.int64) + piece.offset
    last = np.minimum(keys - 1, ahead) if piece.causal else np.full_like(ahead, keys - 1)
    first = np.maximum(0, ahead - piece.window + 1) if piece.window is not None else 0
    return np.maximum(0, last - first + 1)


def visible_pairs(cut: Sequence[Piece]) -> int:
    """How many (query, key) pairs the pieces hold: the attention work, exactly counted."""
    return sum(int(seen_keys(piece).sum()) for piece in cut)
