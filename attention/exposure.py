"""Exposed communication: how long computing stood still for an exchange, step by step.

On a GPU two events of the compute stream stand around each wait; their distance, read after the
step is done, is the time in which the stream had nothing to do but wait. On a CPU it is the time
that the thread spent in the wait.
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

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Around the wait before step number `step` of a scheme may compute."""
        if self._on_gpu:
            before, after = self._event(), self._event()
            before.record()
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
            self._add(step, before.elapsed_time(after) / 1e3)
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
