"""What a rank of `bench attention` says of itself and of a case: rank -> whoever started it."""

from __future__ import annotations

import msgspec

from ringspan.attention.cost import Link, Speeds
from ringspan.deploy.bench.power import GpuState


class RankStarted(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    host: str
    pid: int
    device: str
    device_name: str
    threads: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank found. Times are of one run, in seconds; those of an exchange between ranks are
    already the slowest rank's. There are none where an answer was not `right`, or the case was
    `refused`."""

    rank: int
    right: bool = True
    wrong: str = ""
    """What this rank found wrong, if it was this one."""
    refused: str = ""
    """Why the case cannot run here."""
    engine_s: tuple[float, ...] = ()
    engine_calls: int = 0
    """Runs in one sample."""
    kernel_s: tuple[float, ...] = ()
    """Of the single kernel; taken in turn with engine_s."""
    kernel: str = ""
    kernels_s: dict[str, float] = {}
    left_out: dict[str, str] = {}
    full_s: tuple[float, ...] = ()
    """Of attention without a mask at its best size; where there are cached tokens."""
    full_flops: float = 0.0
    full_kernel: str = ""
    exposed_s: tuple[float, ...] = ()
    """By step of the scheme; loopback ranks added up, on a GPU only."""
    sent_bytes: int = 0
    """In one run, by this rank; of loopback ranks by the one that sends most."""
    seen_keys: int = 0
    """By this rank's rows in one run; of loopback ranks by all."""
    audited_rows: int = 0
    relative_error: float = 0.0
    max_error: float = 0.0
    peak_bytes: int = 0
    """Of the device's memory, with the whole sequence that the single kernel needs."""
    gpu: GpuState | None = None
    speeds: Speeds | None = None
    link: Link | None = None
    """What rank 0 measured of its device and its exchanges, for the planner's prediction."""
    note: str = ""
