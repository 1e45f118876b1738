"""Counters of a controller, as Prometheus reads them, and its decisions, one JSON line each.

Names begin with `ringspan_`, times are in seconds and sizes in bytes, as Prometheus wants them;
docs/metrics.md says what each one means. The figures come from what the controller tells anyway
(`cluster/events.py`, `HandedOver`, `kvstore.tiers.counters`), so that nothing is measured twice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ringspan.cluster.events import PauseEvent, PrefillDone, PrefillProgress, PrefillResumed
from ringspan.cluster.handing import HandedOver
from ringspan.errors import StoreError

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 2560)
"""Buckets up to three quarters of an hour: a million tokens take minutes."""
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 10)
PREFILL_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 2400, 3600, 7200)
LOG_BYTES = 64 << 20
"""Of a decision log, before it is rotated."""
LOGS_KEPT = 4
"""Rotated ones, beside the one that is written."""


class Metrics:
    """Of one controller, or of several of one process. Any thread may add."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._progress: dict[str, tuple[int, int]] = {}
        """Of each prefill that runs: tokens done and bytes sent that were counted."""
        self._priorities: set[str] = set()
        """That somebody ever waited with."""
        self._lock = threading.Lock()
        self._prefills = self._counter("prefills", "Prefills that ended", "outcome")
        self._chunks = self._counter("prefill_chunks", "Chunks that every rank was done with")
        self._tokens = self._counter("prefill_tokens", "Tokens of contexts", "source")
        self._sent = self._counter("exchange_bytes", "Sent between ranks of a gang in prefills")
        self._exposed = self._counter(
            "exposed_communication_seconds", "Computing stood still for exchanges, slowest rank"
        )
        self._prefill_s = self._histogram(
            "prefill_seconds", "A prefill without its save", PREFILL_S
        )
        self._save_s = self._histogram("save_seconds", "Saving behind the last chunk", PREFILL_S)
        self._prediction = self._gauge(
            "prefill_prediction_ratio", "Measured over predicted time of the last prefill"
        )
        self._running = self._gauge("prefills_running", "Prefills under way")
        self._left_s = self._gauge("prefill_left_seconds", "Until the last prefill begun ends")
        self._faults = self._counter("faults", "Ranks that were lost in prefills")
        self._recomputed = self._counter("recomputed_tokens", "Computed again after a fault")
        self._pause_s = self._histogram("pause_seconds", "From a fault to going on", PREFILL_S)
        self._pace = self._gauge(
            "rank_pace_ratio", "A rank's busy time a token over the median rank's", "rank"
        )
        self._slow = self._gauge("slow_ranks", "Ranks that hold up the prefill under way")
        self._answers = self._counter("answers", "Answers that ended", "outcome")
        self._generated = self._counter("generated_tokens", "Tokens of answers")
        self._ttft_s = self._histogram("time_to_first_token_seconds", "TTFT", FIRST_TOKEN_S)
        self._tpot_s = self._histogram(
            "time_per_output_token_seconds", "TPOT, the first token left out", TOKEN_S
        )
        self._pages = self._counter("pages", "What became of pages that were read", "fate", "road")
        self._tier = self._gauge("tier_bytes", "Encoded KV that lies in a tier", "tier")
        self._waiting = self._gauge("requests_waiting", "Requests that were not begun", "priority")
        self._handoffs = self._counter("handoffs", "Hand-offs that ended", "outcome")
        self._handoff_bytes = self._counter("handoff_bytes", "KV that was handed over")
        self._handoff_bad = self._counter("handoff_bad_pages", "Pages that came wrong and again")
        self._decisions = self._counter("decisions", "Decisions that were logged", "kind")
        self._answering = self._gauge("answers_running", "Answers that advance together")
        self._sessions = self._gauge("sessions", "Kept for clients that go on with them")
        self._held = self._gauge("contexts_held", "Contexts that the gang holds", "kind")
        self.look: Callable[[], None] = _nothing
        """Called before each `render`: sets the gauges of what is there now."""

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        self.look()
        return generate_latest(self.registry)

    # prefills

    def prefill_began(self) -> None:
        self._running.inc()

    def prefill_progress(self, event: PrefillProgress) -> None:
        """Every rank is done with one more chunk."""
        with self._lock:
            done, sent = self._progress.get(event.context_id, (event.span.start, 0))
            now = max(done, event.tokens_done), max(sent, event.sent_bytes)
            self._progress[event.context_id] = now
        self._chunks.inc()
        self._tokens.labels("computed").inc(now[0] - done)
        self._sent.inc(now[1] - sent)
        self._left_s.set(event.left_s)

    def prefill_paused(self, event: PauseEvent) -> None:
        """A rank was lost, or the prefill goes on after that."""
        if isinstance(event, PrefillResumed):
            self._faults.inc(len(event.replaced))
            self._recomputed.inc(event.recomputed_tokens)
            self._pause_s.observe(event.pause_s)

    def paces(self, ratios: Mapping[int, float], slow: int) -> None:
        """Of the last chunk, by rank, and how many ranks count as slow; see `slow.SlowRanks`."""
        for rank, ratio in ratios.items():
            self._pace.labels(str(rank)).set(ratio)
        self._slow.set(slow)

    def prefill_ended(self, done: PrefillDone) -> None:
        self._forget(done.context_id)
        self._prefills.labels("reused" if done.reused else "computed").inc()
        plan, timings = done.plan, done.timings
        if done.reused:
            self._tokens.labels("stored").inc(plan.num_tokens)
            return
        self._tokens.labels("prefix").inc(plan.reused_tokens)
        self._exposed.inc(sum(done.findings.exposed_s))
        self._prefill_s.observe(timings.prefill_s)
        if done.saved:
            self._save_s.observe(timings.save_s)
        if plan.predicted_s:
            self._prediction.set(timings.prefill_s / plan.predicted_s)

    def prefill_failed(self, context_id: str, error: BaseException) -> None:
        """outcome: the error's name, `cancelled` among them."""
        self._forget(context_id)
        self._prefills.labels(type(error).__name__.lower()).inc()

    # answers, pages, tiers, queue

    def answered(self, num_tokens: int, first_token_s: float, elapsed_s: float, why: str) -> None:
        """why: the finish reason. elapsed_s: until the last token; TPOT is undefined for one."""
        self._answers.labels(why).inc()
        self._generated.inc(num_tokens)
        self._ttft_s.observe(first_token_s)
        if num_tokens > 1:
            self._tpot_s.observe((elapsed_s - first_token_s) / (num_tokens - 1))

    def pages(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """More pages by fate and road, as `StoreCounters.snapshot` has them."""
        for fate, roads in counts.items():
            for road, pages in roads.items():
                self._pages.labels(fate, road).inc(pages)

    def tiers(self, used_bytes: Mapping[str, int]) -> None:
        """What lies where now."""
        for tier, size in used_bytes.items():
            self._tier.labels(tier).set(size)

    def queue(self, waiting: Mapping[str, int]) -> None:
        """By priority, now: priorities that are not named any more have nobody waiting."""
        with self._lock:
            self._priorities |= set(waiting)
            for priority in self._priorities:
                self._waiting.labels(priority).set(waiting.get(priority, 0))

    def holding(self, answers: int, sessions: int, contexts: Mapping[str, int]) -> None:
        """Of a service's gang, now. sessions: named ones, between answers too; contexts: `named`
        ones, which clients can ask, and those of `plain` prompts."""
        self._answering.set(answers)
        self._sessions.set(sessions)
        for kind, count in contexts.items():
            self._held.labels(kind).set(count)

    def handed_over(self, handed: HandedOver) -> None:
        self._handoffs.labels("done").inc()
        self._handoff_bytes.inc(handed.payload_bytes)
        self._handoff_bad.inc(handed.bad_pages)

    def handoff_failed(self, error: BaseException) -> None:
        self._handoffs.labels(type(error).__name__.lower()).inc()

    def decided(self, kind: str) -> None:
        self._decisions.labels(kind).inc()

    def _forget(self, context_id: str) -> None:
        self._running.dec()
        with self._lock:
            self._progress.pop(context_id, None)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ringspan_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"ringspan_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ringspan_{name}", text, registry=self.registry, buckets=buckets)


def _nothing() -> None:
    pass


def write_metrics(metrics: Metrics, path: Path) -> None:
    """Whole or not at all: for a collector of text files. Raises `StoreError`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(metrics.render())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StoreError(f"cannot write the metrics {path}: {error.strerror}") from None


class DecisionLog:
    """One JSON line a decision: when, what kind, of which request, and the decision itself.

    path: of the file that is written; rotated ones are `path.1` (the newest) and so on. Any thread
    may write. A line is written whole, or the file has none of it. Raises `StoreError`.
    """

    def __init__(
        self, path: Path, most_bytes: int = LOG_BYTES, kept: int = LOGS_KEPT,
        metrics: Metrics | None = None,
    ) -> None:  # fmt: skip
        self._path, self._most_bytes, self._kept, self._metrics = path, most_bytes, kept, metrics
        self._lock = threading.Lock()

    def write(self, kind: str, subject: str, decision: Any) -> None:
        """kind: `plan`, `placement`, `admission`, ...; subject: the request's or context's id;
        decision: a message, or anything that msgspec can write."""
        line = msgspec.json.encode(
            {"unix_s": round(time.time(), 6), "kind": kind, "of": subject, "decision": decision}
        )
        with self._lock:
            try:
                self._rotate(len(line) + 1)
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    os.write(fd, line + b"\n")
                finally:
                    os.close(fd)
            except OSError as error:
                why = error.strerror
                raise StoreError(f"cannot write the decision log {self._path}: {why}") from None
        if self._metrics is not None:
            self._metrics.decided(kind)

    def _rotate(self, more_bytes: int) -> None:
        if not self._path.exists() or self._path.stat().st_size + more_bytes <= self._most_bytes:
            return
        names = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, self._kept + 1))]
        for old, new in reversed(list(pairwise(names))):
            if old.exists():
                old.replace(new)
        if not self._kept:
            self._path.unlink()
