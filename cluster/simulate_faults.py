"""Faults to simulate: which devices go, when, and for how long. Drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ringspan.cluster.placing_state import ClusterState

NODE_SHARE = 0.2
"""Of the faults that take a whole node with its host store; the others take one rank."""
RANK_REPAIR_S, NODE_REPAIR_S = 60.0, 900.0
"""A process starts again and loads its weights; a host starts again."""


class Fault(NamedTuple):
    at_s: float
    device: int
    whole_node: bool
    repair_s: float

    def devices(self, state: ClusterState) -> list[int]:
        """All that go."""
        if not self.whole_node:
            return [self.device]
        node = state.node_of[self.device]
        count = state.nodes[node].num_devices
        start = self.device
        while start and state.node_of[start - 1] == node:
            start -= 1
        return list(range(start, start + count))


def drawn_faults(devices: int, mean_s: float, seed: int) -> Iterator[Fault]:
    """Endless, ascending. mean_s: between two faults of one device; of all it is that over their
    number."""
    rng = random.Random(f"faults {seed}")
    now = 0.0
    while True:
        now += rng.expovariate(devices / mean_s)
        whole = rng.random() < NODE_SHARE
        yield Fault(now, rng.randrange(devices), whole, NODE_REPAIR_S if whole else RANK_REPAIR_S)
