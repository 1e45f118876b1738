"""Which ranks are slow: a gang goes at the pace of its slowest rank, and does not say whose it is.

In a ring every rank ends a chunk at the same time, so times of chunks tell nothing. What a rank was
busy for does: its time less what it waited for its peers, over the tokens it took.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from ringspan.cluster.messages import ChunkDone

SLOW_RATIO = 1.5
"""Times the median rank's pace, for a rank to count as slow ..."""
SLOW_CHUNKS = 2
"""... in so many chunks in a row: one may be a compilation, or a neighbour's burst."""


class SlowRank(NamedTuple):
    """A rank that has become slow, or no longer is (`ratio` below `SLOW_RATIO`)."""

    rank: int
    ratio: float
    """Its busy seconds a token over the median rank's, in the last chunk."""
    chunk_index: int


def pace_ratios(ranks: Sequence[ChunkDone]) -> dict[int, float]:
    """Busy seconds a token of each rank that took tokens of the chunk, over their median."""
    paces = {done.rank: busy_s(done) / done.rank_tokens for done in ranks if done.rank_tokens > 0}
    usual = median(paces.values()) if paces else 0.0
    return {rank: pace / usual for rank, pace in paces.items()} if usual > 0 else {}


def busy_s(done: ChunkDone) -> float:
    """Without what it waited for peers, on the host or, on a GPU, on the device."""
    waited_s = max(done.exchange_s, sum(done.findings.exposed_s))
    return max(0.0, done.elapsed_s - waited_s)


class SlowRanks:
    """Of one prefill; fed with every chunk."""

    def __init__(self) -> None:
        self.ratios: dict[int, float] = {}
        """Of the last chunk, by rank."""
        self._in_a_row: dict[int, int] = {}
        self._slow: set[int] = set()

    @property
    def slow(self) -> frozenset[int]:
        return frozenset(self._slow)

    def add(self, ranks: Sequence[ChunkDone]) -> tuple[SlowRank, ...]:
        """Every rank is done with a chunk: those that are slow now and were not, or the reverse.
        Two ranks have no majority: the median lies between them, so that one of them counts as
        slow only at three times the other's pace."""
        self.ratios = pace_ratios(ranks)
        changed = []
        for rank, ratio in self.ratios.items():
            row = self._in_a_row.get(rank, 0) + 1 if ratio >= SLOW_RATIO else 0
            self._in_a_row[rank] = row
            if (row >= SLOW_CHUNKS) != (rank in self._slow):
                self._slow ^= {rank}
                changed.append(SlowRank(rank, ratio, ranks[0].chunk_index))
        return tuple(changed)
