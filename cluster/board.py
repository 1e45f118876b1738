"""What runs on a cluster, for `ringspan status`: controllers report, anyone may look.

A controller lives in the process of its command. Its `Reporter` sends what it is at to one named
actor, at most every `EVERY_S` and without waiting; a report that is not renewed for `SILENT_S` is
gone. Nothing depends on the board: where it cannot be had, runs go on without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from ringspan.cluster.events import PauseEvent, PrefillPaused, PrefillProgress

EVERY_S = 0.5
SILENT_S = 120.0
"""A chunk of a long prefill may take a minute."""
MOST_REPORTS = 1000


class PrefillStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill that runs."""

    context_id: str
    tokens_done: int
    num_tokens: int
    chunk_index: int
    num_chunks: int
    tokens_per_s: float
    left_s: float
    kv_bytes: int
    elapsed_s: float
    paused: str = ""
    """Why it stands still; empty while it runs."""


class ContextStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A context that a gang holds."""

    context_id: str
    num_tokens: int
    codec: str
    kv_bytes: int
    fidelity: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """controller -> board: what it is at."""

    source: str
    """`host:pid`."""
    command: str
    model: str = ""
    ranks: tuple[str, ...] = ()
    """Device and host of each rank of the gang."""
    transport: str = ""
    contexts: tuple[ContextStatus, ...] = ()
    prefill: PrefillStatus | None = None
    tiers: dict[str, int] = {}
    """Bytes by tier."""
    pages: dict[str, dict[str, int]] = {}
    """What became of pages, by fate and road."""
    waiting: int = 0
    faults: int = 0
    last_fault: str = ""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """board -> status: a report and how old it is."""

    report: Report
    age_s: float


class Board:
    """A plain class; `board_actor` makes it an actor. clock: monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[Report, float]] = {}

    def put(self, report: Report) -> None:
        """Called by every reporter; the last one of a source counts."""
        self._bury()
        if report.source in self._reports or len(self._reports) < MOST_REPORTS:
            self._reports[report.source] = report, self._clock()

    def end(self, source: str) -> None:
        """Called by a reporter whose command ends. May be repeated."""
        self._reports.pop(source, None)

    def look(self) -> tuple[Seen, ...]:
        """Called by anyone: what is not older than `SILENT_S`, by source."""
        self._bury()
        now = self._clock()
        return tuple(
            Seen(report=report, age_s=now - at) for _, (report, at) in sorted(self._reports.items())
        )

    def _bury(self) -> None:
        now = self._clock()
        for source, (_, at) in list(self._reports.items()):
            if now - at > SILENT_S:
                del self._reports[source]


class Reporter:
    """Tells the board what this process's controller is at; `ray_reporter` makes one.

    put, gone: take a report, and the source of one that is over; neither may block.
    """

    def __init__(
        self,
        report: Report,
        put: Callable[[Report], None],
        gone: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._put, self._gone, self._clock = report, put, gone, clock
        self._told_s = float("-inf")
        self.tell()

    def tell(self, *, now: bool = True, **changed: Any) -> None:
        """now: else only if the last report is `EVERY_S` old. changed: fields of `Report`."""
        self._report = msgspec.structs.replace(self._report, **changed)
        if now or self._clock() - self._told_s >= EVERY_S:
            self._told_s = self._clock()
            with suppress(Exception):  # nothing depends on the board
                self._put(self._report)

    def end(self) -> None:
        """The command ends. May be repeated."""
        with suppress(Exception):
            self._gone(self._report.source)

    def on_progress(self, event: PrefillProgress) -> None:
        """The controller's event: one more chunk."""
        prefill = PrefillStatus(
            context_id=event.context_id,
            tokens_done=event.tokens_done,
            num_tokens=event.num_tokens,
            chunk_index=event.chunk_index,
            num_chunks=event.num_chunks,
            tokens_per_s=event.tokens_per_s,
            left_s=event.left_s,
            kv_bytes=event.kv_bytes,
            elapsed_s=event.elapsed_s,
        )
        last = event.chunk_index == event.num_chunks - 1
        self.tell(now=last, prefill=prefill)

    def on_pause(self, event: PauseEvent) -> None:
        """The controller's event: a rank was lost, or it goes on."""
        paused = isinstance(event, PrefillPaused)
        prefill = self._report.prefill
        if prefill is not None:
            prefill = msgspec.structs.replace(prefill, paused=event.reason if paused else "")
        faults = self._report.faults + int(paused)
        self.tell(prefill=prefill, faults=faults, last_fault=event.reason)
