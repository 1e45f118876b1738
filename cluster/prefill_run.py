"""What the controller adds up while a prefill runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

from ringspan.cluster.events import PrefillDone, PrefillProgress, PrefillResumed, PrefillTimings
from ringspan.cluster.messages import ChunkDone, Findings, PrefillPlan
from ringspan.cluster.pace import Pace


@dataclass
class PrefillRun:
    """One prefill under way."""

    plan: PrefillPlan
    pace: Pace
    began: float
    """perf_counter when the first chunk was submitted; earlier by what chunks took that another
    controller did."""
    kv_bytes: int = 0
    sent_bytes: int = 0
    exchange_s: float = 0.0
    findings: Findings = field(default_factory=Findings)
    chunk_s: tuple[float, ...] = ()
    resumed: tuple[PrefillResumed, ...] = ()

    def go_back(self, chunks: int) -> None:
        """Only the first so many are done; what the others cost stays counted."""
        self.pace.go_back(chunks)
        self.chunk_s = self.chunk_s[:chunks]

    def add(self, done: list[ChunkDone]) -> PrefillProgress:
        """Every rank is done with the next chunk."""
        slowest_s = max(rank.elapsed_s for rank in done)
        self.pace.done(slowest_s)
        self.chunk_s = (*self.chunk_s, slowest_s)
        self.kv_bytes = sum(rank.kv_bytes for rank in done)
        self.sent_bytes += sum(rank.sent_bytes for rank in done)
        self.exchange_s += sum(rank.exchange_s for rank in done)
        self.findings = self.findings.then(reduce(Findings.beside, (r.findings for r in done)))
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
            chunk_s=slowest_s,
            predicted_chunk_s=dict(enumerate(self.plan.predicted_chunk_s)).get(
                done[0].chunk_index, 0.0
            ),
            tokens_per_s=(span.stop - self.plan.reused_tokens) / max(elapsed_s, 1e-9),
            left_s=self.pace.left_s(),
            kv_bytes=self.kv_bytes,
            sent_bytes=self.sent_bytes,
            ranks=tuple(done),
        )

    def add_before(self, done: Sequence[ChunkDone]) -> None:
        """Another controller had every rank do the next chunk: its cost counts as if it were
        ours."""
        self.began -= max(rank.elapsed_s for rank in done)
        self.add(list(done))

    def finished(self, saved: bool, timings: PrefillTimings) -> PrefillDone:
        """After the last chunk, and after the store has it."""
        return PrefillDone(
            context_id=self.plan.context_id,
            plan=self.plan,
            saved=saved,
            kv_bytes=self.kv_bytes,
            sent_bytes=self.sent_bytes,
            exchange_s=self.exchange_s,
            findings=self.findings,
            flops=self.pace.total_flops,
            timings=timings,
            resumed=self.resumed,
        )
