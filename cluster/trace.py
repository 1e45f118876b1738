"""A prefill as a trace that Perfetto and chrome://tracing draw: a process a rank, lanes of time.

    compute    the chunk's time in which the device worked
    exchange   the host waited for peers (CPU ranks; on GPUs exchanges run beside kernels)
    exposed    computing stood still for an exchange, by step of the scheme
    write      pages written and synced behind the last chunk
    pause      a lost rank was replaced

What a rank reports of a chunk are sums over its layers, so the slices of one chunk stand in the
order compute, exposed: their lengths are measured, their places within the chunk are not. A planned
prefill's simulated clock knows every event; `trace_of_simulated` draws these as they are.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ringspan.attention.clocks import Simulated
from ringspan.cluster.events import PauseEvent, PrefillDone, PrefillProgress, PrefillResumed
from ringspan.cluster.messages import ChunkDone
from ringspan.errors import StoreError

LANES = {"compute": 0, "exchange": 1, "exposed": 2, "write": 3, "pause": 4}
Slice = dict[str, Any]


class PrefillTrace:
    """Collects one prefill: give it the controller's events, then `write` it."""

    def __init__(self) -> None:
        self._slices: list[Slice] = []
        self._ranks: set[int] = set()
        self._end_s = 0.0

    def on_progress(self, event: PrefillProgress) -> None:
        """A chunk; the ranks' reports come with the event, or all there is is the slowest one's
        time."""
        ranks: Sequence[ChunkDone] = event.ranks
        self._end_s = max(self._end_s, event.elapsed_s)
        if not ranks:
            self._add(0, "compute", _name(event), event.elapsed_s - event.chunk_s, event.chunk_s)
            return
        for done in ranks:
            self._chunk(event, done)

    def on_pause(self, event: PauseEvent) -> None:
        if isinstance(event, PrefillResumed):
            at = self._end_s
            for rank in event.replaced:
                what = f"replaced: {event.reason}"
                self._add(rank, "pause", what, at, event.pause_s, load_s=event.load_s)
            self._end_s = at + event.pause_s

    def on_done(self, done: PrefillDone) -> None:
        """The end; the save is the same for all ranks."""
        if done.saved and not done.reused:
            for rank in sorted(self._ranks or {0}):
                what = "pages left after the last chunk"
                self._add(rank, "write", what, done.timings.prefill_s, done.timings.save_s)

    def events(self) -> list[Slice]:
        """With the names of processes and lanes."""
        return [*_labels(sorted(self._ranks), LANES), *self._slices]

    def write(self, path: Path) -> None:
        write_trace(self.events(), path)

    def _chunk(self, event: PrefillProgress, done: ChunkDone) -> None:
        began = event.elapsed_s - done.elapsed_s
        exposed_s = sum(done.findings.exposed_s)
        computed_s = max(0.0, done.elapsed_s - exposed_s)
        counts = {
            "tokens": done.rank_tokens,
            "sent_bytes": done.sent_bytes,
            "kv_bytes": done.kv_bytes,
            "audit_error": done.findings.audit_error,
        }
        self._add(done.rank, "compute", _name(event), began, computed_s, **counts)
        if done.exchange_s:
            self._add(done.rank, "exchange", "waited for peers", began, done.exchange_s)
        at = began + computed_s
        for step, seconds in enumerate(done.findings.exposed_s):
            if seconds:
                self._add(done.rank, "exposed", f"step {step}", at, seconds)
                at += seconds

    def _add(
        self, rank: int, lane: str, name: str, at_s: float, length_s: float, **args: float
    ) -> None:
        self._ranks.add(rank)
        self._slices.append(_slice(rank, LANES[lane], lane, name, at_s, length_s, args))


def trace_of_simulated(simulated: Simulated) -> list[Slice]:
    """One layer's attention on the planner's clock: kernels, sends and waits where they were."""
    lanes = {what: at for at, what in enumerate(dict.fromkeys(e.what for e in simulated.trace))}
    ranks = sorted({event.rank for event in simulated.trace})
    slices = [
        _slice(
            event.rank,
            lanes[event.what],
            event.what,
            f"{event.what} {event.step}" + (f" to {event.peer}" if event.peer >= 0 else ""),
            event.begin_s,
            event.end_s - event.begin_s,
            {"bytes": event.num_bytes},
        )
        for event in simulated.trace
    ]
    return [*_labels(ranks, lanes), *slices]


def write_trace(events: Sequence[Slice], path: Path) -> None:
    """As JSON, whole or not at all. Raises `StoreError`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(
            msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": list(events)})
        )
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StoreError(f"cannot write the trace {path}: {error.strerror}") from None


def _name(event: PrefillProgress) -> str:
    return f"chunk {event.chunk_index} [{event.span.start}, {event.span.stop})"


def _slice(
    rank: int,
    lane: int,
    kind: str,
    name: str,
    at_s: float,
    length_s: float,
    args: dict[str, float],
) -> Slice:
    """A complete event; microseconds."""
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "ts": max(0.0, at_s) * 1e6,
        "dur": max(0.0, length_s) * 1e6,
        "pid": rank,
        "tid": lane,
        "args": args,
    }


def _labels(ranks: Sequence[int], lanes: dict[str, int]) -> list[Slice]:
    found: list[Slice] = []
    for rank in ranks:
        named = {"ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}, "name": "process_name"}
        found.append(named)
        for lane, tid in lanes.items():
            found.append(
                {"ph": "M", "pid": rank, "tid": tid, "args": {"name": lane}, "name": "thread_name"}
            )
    return found
