"""How far a run is: a bar on a terminal, plain lines in a job's log.

A prefill's later chunks cost more than its first ones, so the time left is computed from the work
done (FLOPs) rather than from tokens, where the caller can say how much work n tokens are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

LINE_EVERY_S = 5.0
"""In a log: at most one line in this time, and always the last."""


class Meter(Protocol):
    """What a phase reports to."""

    def update(self, done: int, note: str = "") -> None:
        """`done` units of the phase's total so far."""


class _Phase:
    """The arithmetic that both forms share."""

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        work: Callable[[int], float] | None,
        clock: Callable[[], float],
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self._work = work or float
        self._clock = clock
        self._started = clock()

    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def rate(self, done: int) -> float:
        """Units a second since the phase began."""
        return done / max(self.elapsed_s(), 1e-9)

    def left_s(self, done: int) -> float | None:
        """Seconds to go if the work left runs as fast as the work done; None before any."""
        work_done = self._work(done)
        if work_done <= 0:
            return None
        return max(self.elapsed_s() * (self._work(self.total) / work_done - 1.0), 0.0)

    def words(self, done: int, note: str) -> str:
        """`8,192 of 12,288 tokens, 402 tokens/s, 0:21 left, KV 377 MB`."""
        pieces = [f"{done:,} of {self.total:,} {self.unit}"]
        if done:
            pieces.append(f"{self.rate(done):,.0f} {self.unit}/s")
        left = self.left_s(done)
        if done >= self.total:
            pieces.append(f"in {clock_words(self.elapsed_s())}")
        elif left is not None:
            pieces.append(f"{clock_words(left)} left")
        if note:
            pieces.append(note)
        return ", ".join(pieces)


class LineMeter(_Phase):
    """Plain lines, for a log."""

    def __init__(
        self,
        stream: TextIO,
        name: str,
        total: int,
        unit: str,
        work: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = LINE_EVERY_S,
    ) -> None:
        super().__init__(name, total, unit, work, clock)
        self._stream, self._every_s = stream, every_s
        self._last_s = -every_s

    def update(self, done: int, note: str = "") -> None:
        now = self.elapsed_s()
        if done < self.total and now - self._last_s < self._every_s:
            return
        self._last_s = now
        print(f"{self.name}: {self.words(done, note)}", file=self._stream, flush=True)


class BarMeter(_Phase):
    """One line of a terminal that is drawn again and again."""

    def __init__(
        self,
        bar: Progress,
        name: str,
        total: int,
        unit: str,
        work: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, total, unit, work, clock)
        self._bar = bar
        self._task = bar.add_task(name, total=total, words="")

    def update(self, done: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, words=self.words(done, note))


@contextmanager
def meter(
    name: str,
    total: int,
    unit: str = "tokens",
    work: Callable[[int], float] | None = None,
    stream: TextIO | None = None,
) -> Iterator[Meter]:
    """A phase's meter on `stream` (stderr): a bar if it is a terminal, lines if not."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield LineMeter(stream, name, total, unit, work)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[words]}"),
        console=Console(file=stream),
    ) as bar:
        yield BarMeter(bar, name, total, unit, work)


def bytes_words(count: float) -> str:
    """1,234,567 -> `1.23 MB` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:,.3g} TB"


def clock_words(seconds: float) -> str:
    """75 -> `1:15`, 3675 -> `1:01:15`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
