"""What became of pages on every road: the numbers that say whether the store keeps its word."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

VERIFIED = "verified"
"""Read, checked in full, and given to a shard."""
QUARANTINED = "quarantined"
"""Not what they should be: kept aside, not used."""
REPAIRED = "repaired"
"""Lost in every tier, and brought back from other pages."""
RECOMPUTED = "recomputed"
"""Lost in every tier, and computed again from the tokens."""
KINDS = (VERIFIED, QUARANTINED, REPAIRED, RECOMPUTED)


class StoreCounters:
    """Pages by what became of them and by road. Any thread may add.

    within: others that count the same pages too.
    """

    def __init__(self, within: StoreCounters | None = None) -> None:
        self._counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self._lock = threading.Lock()
        self._within = within

    def add(self, kind: str, road: str, pages: int = 1) -> None:
        with self._lock:
            self._counts[kind][road] += pages
        if self._within is not None:
            self._within.add(kind, road, pages)

    def snapshot(self) -> dict[str, dict[str, int]]:
        """{kind: {road: pages}}, all kinds."""
        with self._lock:
            return {kind: dict(roads) for kind, roads in self._counts.items()}

    def total(self, kind: str) -> int:
        with self._lock:
            return self._counts[kind].total()


def added(counts: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """The sum of snapshots, those of several ranks say; kinds that never came are left out."""
    total = StoreCounters()
    for snapshot in counts:
        for kind, roads in snapshot.items():
            for road, pages in roads.items():
                total.add(kind, road, pages)
    return {kind: roads for kind, roads in total.snapshot().items() if roads}


COUNTERS = StoreCounters()
"""Of this process."""
