"""How fast a prefill goes: the time left, and how long a chunk may take before it counts as hung.

Both count FLOPs, not tokens: a chunk attends to all that lies before it, so the last chunk of a
million tokens costs many times the first.
"""

from __future__ import annotations

from ringspan.attention.models.facts import prefill_flops
from ringspan.cluster.messages import ModelFacts, PrefillPlan

FIRST_CHUNK_TIMEOUT_S = 3600.0
"""Nothing is known yet of the machine's speed, and kernels are compiled in it."""
PATIENCE = 10.0
"""Times the expected duration that a later chunk may take ..."""
LEAST_TIMEOUT_S = 300.0
"""... and never less than this."""


class Pace:
    """Fed after each chunk. The first chunk is left out of the speed once there are others."""

    def __init__(self, plan: PrefillPlan, facts: ModelFacts) -> None:
        self._flops = [
            prefill_flops(facts, chunk.tokens, cached_tokens=chunk.start) for chunk in plan.chunks
        ]
        self._seconds: list[float] = []

    @property
    def total_flops(self) -> float:
        return sum(self._flops)

    def done(self, chunk_s: float) -> None:
        """The next chunk took so long."""
        self._seconds.append(chunk_s)

    def go_back(self, chunks: int) -> None:
        """Only the first so many are done."""
        del self._seconds[chunks:]

    def left_s(self) -> float:
        """For the chunks not yet done; 0 before any is."""
        speed = self._flops_per_s()
        return sum(self._flops[len(self._seconds) :]) / speed if speed else 0.0

    def timeout_s(self, chunk_index: int) -> float:
        """For one chunk, counted from the moment when the one before it was done."""
        speed = self._flops_per_s()
        if not speed:
            return FIRST_CHUNK_TIMEOUT_S
        return max(LEAST_TIMEOUT_S, PATIENCE * self._flops[chunk_index] / speed)

    def _flops_per_s(self) -> float:
        skipped = 1 if len(self._seconds) > 1 else 0
        seconds = sum(self._seconds[skipped:])
        return sum(self._flops[skipped : len(self._seconds)]) / seconds if seconds else 0.0
