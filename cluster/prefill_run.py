"""What the controller adds up while a prefill runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ringspan.cluster.events import PrefillProgress
from ringspan.cluster.messages import ChunkDone, PrefillPlan
from ringspan.cluster.pace import Pace


@dataclass
class PrefillRun:
    """One prefill under way."""

    plan: PrefillPlan
    pace: Pace
    began: float
    """perf_counter when the first chunk was submitted."""
    kv_bytes: int = 0
    sent_bytes: int = 0
    exchange_s: float = 0.0
    chunk_s: tuple[float, ...] = ()

    def add(self, done: list[ChunkDone]) -> PrefillProgress:
        """Every rank is done with the next chunk."""
        slowest_s = max(rank.elapsed_s for rank in done)
        self.pace.done(slowest_s)
        self.chunk_s = (*self.chunk_s, slowest_s)
        self.kv_bytes = sum(rank.kv_bytes for rank in done)
        self.sent_bytes += sum(rank.sent_bytes for rank in done)
        self.exchange_s += sum(rank.exchange_s for rank in done)
        span = done[0].span
        elapsed_s = time.perf_counter() - self.began
        return PrefillProgress(
            context_id=self.plan.context_id,
            chunk_index=done[0].chunk_index,
            num_chunks=len(self.plan.chunks),
            span=span,
            tokens_done=span.stop,
            num_tokens=self.plan.num_tokens,
            elapsed_s=elapsed_s,
            tokens_per_s=span.stop / max(elapsed_s, 1e-9),
            left_s=self.pace.left_s(),
            kv_bytes=self.kv_bytes,
            sent_bytes=self.sent_bytes,
        )
