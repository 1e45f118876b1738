"""Times of several things that are compared: taken in turn, in one run, on one clock.

A GPU under its power cap lowers its clock after some 100 ms, so that what is timed first looks
faster. Therefore the sides take turns (A B A B ...), every sample calls its side as often as fills
`SAMPLE_S`, and ratios are taken pair by pair. On a GPU time is between two events of the compute
stream, on a CPU between two readings of the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

SAMPLE_S = 0.2
"""At least so long is one sample, except where a single call is longer: with 0.05 s the ratios of
one case on an H200 were spread over 12 %."""
LONG_CALL_S = 0.5
"""A call that takes so long needs no second one to say how long it takes."""

Run = Callable[[int], object]
"""Does its work so many times; on a GPU it may return before the device is done."""
Agree = Callable[[float], float]
"""All ranks call it: they meet, and each gets the largest of their numbers."""


class Side(NamedTuple):
    """`run` is None on ranks that have no part in it and only wait."""

    name: str
    run: Run | None


def alone(seconds: float) -> float:
    """`Agree` where there is nobody else."""
    return seconds


def seconds_of(run: Run, calls: int, device: torch.device) -> float:
    """Of one call, when it is called `calls` times in a row."""
    if device.type != "cuda":
        began = time.perf_counter()
        run(calls)
        return (time.perf_counter() - began) / calls
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run(calls)
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls


def calls_of(sides: Sequence[Side], device: torch.device, agree: Agree = alone) -> list[int]:
    """How often each side is called in a sample. Warms up what is called the first time."""
    calls = []
    for side in sides:
        took_s = agree(0.0 if side.run is None else seconds_of(side.run, 1, device))
        if took_s < LONG_CALL_S:  # the first call may have compiled
            took_s = agree(0.0 if side.run is None else seconds_of(side.run, 1, device))
        calls.append(max(1, math.ceil(SAMPLE_S / max(took_s, 1e-6))))
    return calls


def in_turn(
    sides: Sequence[Side],
    calls: Sequence[int],
    repeats: int,
    device: torch.device,
    agree: Agree = alone,
) -> list[tuple[float, ...]]:
    """Seconds of one call, for each side `repeats` samples; of the slowest rank."""
    samples: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, count, into in zip(sides, calls, samples, strict=True):
            agree(0.0)  # all begin together
            took_s = 0.0 if side.run is None else seconds_of(side.run, count, device)
            into.append(agree(took_s))
    return [tuple(times) for times in samples]
