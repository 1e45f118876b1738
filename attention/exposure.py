"""Exposed communication: how long computing stood still for an exchange, step by step.

On a GPU one event marks where the pieces enqueued so far end, another where the exchange has
arrived; if the second comes later, what lies between is time in which the device had nothing to do
but wait. They are read after the step is done. On a CPU it is the time that the thread waited.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Exposure:
    """`collect` what was exposed since the last time. Events are reused."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []
        self._seconds: dict[int, float] = {}
        self._marked: torch.cuda.Event | None = None
        self.off = False
        """Set where events may not be timed."""

    def mark(self) -> None:
        """On a stream that is behind all pieces so far: the next wait counts from here."""
        if self._on_gpu and not self.off:
            self._marked = self._marked or self._event()
            self._marked.record()

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Around the wait before step number `step` of a scheme may compute."""
        if self.off:
            yield
            return
        if self._on_gpu:
            before, after = self._marked or self._event(), self._event()
            if self._marked is None:
                before.record()
            self._marked = None
            yield
            after.record()
            self._events.append((step, before, after))
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(step, time.perf_counter() - began)

    def collect(self) -> tuple[float, ...]:
        """Seconds by step number, summed over layers; the device must be idle (synchronized)."""
        for step, before, after in self._events:
            self._add(step, max(0.0, before.elapsed_time(after)) / 1e3)
            self._spare += (before, after)
        self._events = []
        seconds = tuple(
            self._seconds.get(step, 0.0) for step in range(max(self._seconds, default=-1) + 1)
        )
        self._seconds = {}
        return seconds

    def _event(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)

    def _add(self, step: int, seconds: float) -> None:
        self._seconds[step] = self._seconds.get(step, 0.0) + seconds
