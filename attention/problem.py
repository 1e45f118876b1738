"""One step's attention as every rank knows it: whose queries and whose keys stand where.

Pure and without data: all ranks compute the same problem from the plan, so a rank knows the shape
of every message before it comes, and which rectangles of (queries, keys) are to be attended where.

Queries of several sequences are packed: rank r's rows are sequence 0's dealt to it, then sequence
1's, and so on. Keys come from sources: the pages of a context, a tail, the step's own new keys. A
source is seen by the queries of the sequences it names and by no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ringspan.attention.kv import Codec
from ringspan.attention.layout import Deal
from ringspan.attention.mask import Piece, pieces, seen_keys
from ringspan.types import Span, coalesce, total_tokens


class Source(NamedTuple):
    """Keys that lie distributed over the ranks."""

    held: Deal
    """The positions that each rank holds, ascending, in the order of its rows."""
    codec: Codec
    sequences: tuple[int, ...] = (0,)
    """Whose queries see them."""


class Problem:
    """queries: for each sequence the spans dealt to each rank."""

    def __init__(
        self, queries: Sequence[Deal], sources: Sequence[Source], causal: bool = True
    ) -> None:
        self.queries, self.sources, self.causal = tuple(queries), tuple(sources), causal
        self.world_size = len(self.queries[0])
        self._rows = [
            [total_tokens(deal[rank]) for deal in self.queries] for rank in range(self.world_size)
        ]
        self._cuts: dict[tuple[int, int, int, int | None], tuple[Piece, ...]] = {}
        self._windowed: dict[int, Problem] = {}
        self._grouped: dict[int, Grouped] = {}

    def rows(self, rank: int) -> int:
        """Query rows of `rank`."""
        return sum(self._rows[rank])

    def keys(self, source: int, rank: int) -> int:
        return total_tokens(self.sources[source].held[rank])

    def cut(self, q_rank: int, k_rank: int, source: int, window: int | None) -> tuple[Piece, ...]:
        """What q_rank's rows see of the keys that k_rank holds of a source."""
        at = (q_rank, k_rank, source, window)
        if at not in self._cuts:
            held, found, row = self.sources[source].held[k_rank], [], 0
            for sequence, deal in enumerate(self.queries):
                if sequence in self.sources[source].sequences:
                    found += [
                        piece._replace(q0=row + piece.q0, q1=row + piece.q1)
                        for piece in pieces(deal[q_rank], held, self.causal, window)
                    ]
                row += self._rows[q_rank][sequence]
            self._cuts[at] = tuple(found)
        return self._cuts[at]

    def expected(self, rank: int, window: int | None) -> np.ndarray:
        """How many keys each row of `rank` must see in all, int64 [rows]."""
        seen = np.zeros(self.rows(rank), dtype=np.int64)
        row = 0
        for sequence, deal in enumerate(self.queries):
            every: list[Span] = []
            for source in self.sources:
                if sequence in source.sequences:
                    every += [span for spans in source.held for span in spans]
            key_spans = coalesce(sorted(every))
            for span in deal[rank]:
                at = np.arange(span.start, span.stop)
                seen[row : row + span.tokens] = _keys_before(key_spans, at, self.causal, window)
                row += span.tokens
        return seen

    def pairs(self, rank: int, window: int | None) -> int:
        """(query, key) pairs of `rank`'s rows: the attention work, exactly."""
        return int(self.expected(rank, window).sum())

    def windowed(self, window: int | None) -> tuple[Problem, tuple[tuple[int, ...], ...]]:
        """The problem without keys that no query can see any more, and for each source the rows
        that each rank leaves out at the front of what it holds; whole pages of pages."""
        nothing = tuple((0,) * self.world_size for _ in self.sources)
        if window is None:
            return self, nothing
        firsts = []
        sources = []
        for source in self.sources:
            starts = [
                span.start
                for sequence in source.sequences
                for spans in self.queries[sequence]
                for span in spans
            ]
            floor = min(starts, default=0) - window + 1
            cut = source.codec.cut_tokens
            first = tuple(_row_at(spans, floor) // cut * cut for spans in source.held)
            firsts.append(first)
            held = tuple(
                without_rows(spans, rows) for spans, rows in zip(source.held, first, strict=True)
            )
            sources.append(source._replace(held=held))
        if window not in self._windowed:
            self._windowed[window] = Problem(self.queries, sources, self.causal)
        return self._windowed[window], tuple(firsts)

    def grouped(self, group_size: int) -> Grouped:
        """The same problem among groups of `group_size` neighbouring ranks; see `Grouped`."""
        if group_size not in self._grouped:
            self._grouped[group_size] = Grouped(self, group_size)
        return self._grouped[group_size]


class Grouped:
    """A problem whose ranks are groups: all rows and keys of a group's members in one place.

    Members' rows stand one after the other when they arrive; `row_order` and `key_order` bring
    them into ascending positions, so that a group is cut into as few pieces as a rank.
    """

    def __init__(self, problem: Problem, group_size: int) -> None:
        if problem.world_size % group_size:
            raise ValueError(f"{problem.world_size} ranks are no groups of {group_size}")
        self.group_size = group_size
        self.orders: dict[tuple[str, int, object], Any] = {}
        """Where `schemes.order` keeps its index tensors."""
        self._alone: dict[int, Problem] = {}
        groups = range(problem.world_size // group_size)
        self._members = [range(g * group_size, (g + 1) * group_size) for g in groups]
        self._source = problem
        self.problem = Problem(
            [self._joined(deal) for deal in problem.queries],
            [source._replace(held=self._joined(source.held)) for source in problem.sources],
            problem.causal,
        )

    def _joined(self, deal: Deal) -> Deal:
        return tuple(
            coalesce(sorted(span for member in members for span in deal[member]))
            for members in self._members
        )

    def with_keys_of(self, rank: int) -> Problem:
        """The first group's rows over the keys of one of the ranks alone: a problem of one rank."""
        if rank not in self._alone:
            self._alone[rank] = Problem(
                [deal[:1] for deal in self.problem.queries],
                [s._replace(held=(s.held[rank],)) for s in self._source.sources],
                self.problem.causal,
            )
        return self._alone[rank]

    def row_order(self, group: int) -> np.ndarray:
        """Row i of the group is row row_order[i] of its members' rows in rank order, int64."""
        members = self._members[group]
        placed, row = [], 0
        for member in members:
            for sequence, deal in enumerate(self._source.queries):
                for span in deal[member]:
                    placed.append((sequence, span.start, row, span.tokens))
                    row += span.tokens
        return _ordered(placed)

    def key_order(self, source: int, group: int, unit_tokens: int = 1) -> np.ndarray:
        """As `row_order`, for the keys that the members hold of a source, in units of so many
        tokens. Only the last unit of all may be short, and it comes last."""
        placed, unit = [], 0
        for member in self._members[group]:
            for span in self._source.sources[source].held[member]:
                units = -(-span.tokens // unit_tokens)
                placed.append((0, span.start, unit, units))
                unit += units
        return _ordered(placed)


def _ordered(placed: list[tuple[int, int, int, int]]) -> np.ndarray:
    runs = [np.arange(row, row + tokens) for _, _, row, tokens in sorted(placed)]
    return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)


def count_seen(cut: Sequence[Piece], rows: int) -> np.ndarray:
    """How many keys each row sees in the pieces of a cut, int64 [rows]."""
    seen = np.zeros(rows, dtype=np.int64)
    for piece in cut:
        seen[piece.q0 : piece.q1] += seen_keys(piece)
    return seen


def without_rows(spans: Sequence[Span], rows: int) -> tuple[Span, ...]:
    """`spans` without their first `rows` positions."""
    kept = []
    for span in spans:
        cut = min(rows, span.tokens)
        rows -= cut
        if span.tokens > cut:
            kept.append(Span(span.start + cut, span.stop))
    return tuple(kept)


def _row_at(spans: Sequence[Span], position: int) -> int:
    """The first row whose position is `position` or later; all rows if there is none."""
    row = 0
    for span in spans:
        if span.stop > position:
            return row + max(0, position - span.start)
        row += span.tokens
    return row


def _keys_before(
    key_spans: Sequence[Span], at: np.ndarray, causal: bool, window: int | None
) -> np.ndarray:
    """Of the keys in `key_spans`, how many a query at each position sees."""
    if not causal:
        return np.full(len(at), total_tokens(key_spans), dtype=np.int64)
    count = np.zeros(len(at), dtype=np.int64)
    lowest = at - window + 1 if window is not None else np.zeros_like(at)
    for span in key_spans:
        begin = np.maximum(span.start, lowest)
        count += np.maximum(np.minimum(span.stop, at + 1) - begin, 0)
    return count
