"""What a GPU did while it was timed: its clock and power, beside what it may do.

nvidia-smi reads them several times a second in a process of its own; where it is missing, or the
device is no GPU, nothing is said.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
from typing import IO, Self

import msgspec
import torch

EVERY_MS = 250
STOP_TIMEOUT_S = 5.0
FIELDS = "power.limit,clocks.max.sm,clocks.sm,power.draw"
BUSY_SHARE = 0.5
"""Readings below this share of the highest power are of moments between the samples."""


class GpuState(msgspec.Struct, frozen=True, kw_only=True):
    power_limit_w: float
    power_w: float
    """The median while it was busy."""
    sm_clock_mhz: float
    """The median while it was busy."""
    max_sm_clock_mhz: float
    readings: int


class PowerLog:
    """Reads from entering to leaving; `state` afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._out: IO[bytes] | None = None
        self.state: GpuState | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            self._out = tempfile.TemporaryFile()
            uuid = torch.cuda.get_device_properties(self._device).uuid
            query = [f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits", f"-lms={EVERY_MS}"]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    ["nvidia-smi", f"--id=GPU-{uuid}", *query],
                    stdin=subprocess.DEVNULL,
                    stdout=self._out,
                    stderr=subprocess.DEVNULL,
                )
        return self

    def __exit__(self, *exc_info: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
        if self._out is not None:
            self._out.seek(0)
            self.state = state_of(self._out.read().decode(errors="replace"))
            self._out.close()
            self._out = None


def state_of(text: str) -> GpuState | None:
    """From lines of `FIELDS`; None where no line has all four."""
    readings: list[list[float]] = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            numbers = [float(field) for field in line.split(",")]
            if len(numbers) == 4:
                readings.append(numbers)
    if not readings:
        return None
    highest = max(reading[3] for reading in readings)
    busy = [reading for reading in readings if reading[3] >= BUSY_SHARE * highest]
    return GpuState(
        power_limit_w=busy[-1][0],
        max_sm_clock_mhz=busy[-1][1],
        sm_clock_mhz=statistics.median(reading[2] for reading in busy),
        power_w=statistics.median(reading[3] for reading in busy),
        readings=len(readings),
    )
