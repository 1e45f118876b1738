"""What does distributing one layer's attention cost, beside the best single kernel?

    ringspan bench attention --tokens 8192,32768,131072 --ranks 1,2,4,8 --json rows.jsonl

For each case the answer is checked first, on the measured shape: rows of every rank against fp32
over all keys (attention/audit.py), and the count of keys that every row saw, in the timed runs too
(attention/ledger.py). A case that is wrong is not timed. Then the engine and the fastest single
kernel of this machine run in turn (timing.py), and the ratio is taken pair by pair.

    loopback     the ranks are threads on one device: the time is the sum of their work, and the
                 ideal is the single kernel's time
    nccl, gloo   one device or process a rank: the time is the slowest rank's, and the ideal is the
                 single kernel's time over the number of ranks
    cached       new tokens on a cache: besides, the time over its floor, which is the case's FLOP
                 at the rate of the best kernel without a mask, measured in the same turns

torch's context_parallel is one more scheme where it can run (`--compare-torch`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import msgspec

from ringspan.cluster.messages import GangSpec
from ringspan.deploy.bench.captured import CAPTURED
from ringspan.deploy.bench.case import AttentionCase
from ringspan.deploy.bench.measured import Measured, RankStarted
from ringspan.deploy.bench.power import GpuState
from ringspan.deploy.bench.predict import predict
from ringspan.deploy.bench.worlds import World, open_world, spec_for
from ringspan.deploy.machine import Hardware, hardware, versions


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Of the samples of one quantity."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(min=min(samples), median=statistics.median(samples), max=max(samples))


class AttentionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One case, measured. Seconds are of one run."""

    benchmark: str = "attention"
    command: str
    case: AttentionCase
    seconds: Spread
    """Of the slowest rank; of all loopback ranks together."""
    all_s: tuple[float, ...]
    calls: int
    """Runs in each sample."""
    tflops_per_s: float
    """Per device, at the median."""
    flops: float
    kernel: str
    """The fastest single kernel over the whole sequence, in turn with the engine."""
    kernel_seconds: Spread
    kernel_all_s: tuple[float, ...]
    kernels_s: dict[str, float]
    """Every backend that could have been it."""
    kernels_left_out: dict[str, str]
    ideal_s: float
    """The single kernel's median over the number of devices."""
    ratio: Spread
    """Time over ideal, pair by pair."""
    floor_s: float | None = None
    """With cached tokens: FLOP at the best rate without a mask, over the number of devices."""
    over_floor: Spread | None = None
    full_kernel: str = ""
    full_tflops_per_s: float | None = None
    predicted_s: float | None = None
    exposed_s: tuple[float, ...] = ()
    """By step of the scheme, how long computing stood still for it: the slowest rank's; of loopback
    ranks the sum, and nothing on a CPU, where a wait is another rank's turn."""
    sent_bytes: int = 0
    """By the rank that sends most."""
    seen_keys: int = 0
    """By all rows, counted."""
    audited_rows: int = 0
    relative_error: float = 0.0
    """||out - exact|| / ||exact|| over the audited rows of the worst rank, exact in fp32."""
    max_error: float = 0.0
    peak_bytes: int = 0
    note: str = ""
    ranks: tuple[RankStarted, ...]
    gpu: GpuState | None = None
    hardware: Hardware
    versions: dict[str, str]

    @property
    def devices(self) -> int:
        return self.case.devices


class Wrong(NamedTuple):
    """A case whose answer was wrong: it was not timed."""

    case: AttentionCase
    text: str


class Skipped(NamedTuple):
    """A case that its scheme cannot take here."""

    case: AttentionCase
    text: str


Outcome = AttentionRow | Wrong | Skipped


def bench_attention(
    spec: GangSpec, cases: Iterable[AttentionCase], command: str
) -> Iterator[Outcome]:
    """Every case, one outcome each, as they come. Cases that share a world (`spec_for`) and stand
    beside each other share its ranks."""
    for wanted, of_world in groupby(cases, lambda case: spec_for(spec, case)):
        possible: list[AttentionCase] = []
        for case in of_world:
            reason = case.why_not()
            if reason is None:
                possible.append(case)
            else:
                yield Skipped(case, reason)
        if not possible:
            continue
        with open_world(wanted) as world:
            for case in possible:
                yield _outcome(world, case, command)


def _outcome(world: World, case: AttentionCase, command: str) -> Outcome:
    found = world.measure(case)
    first = found[0]
    if not all(one.right for one in found):
        return Wrong(case, next(one.wrong for one in found if one.wrong))
    if first.refused:
        return Skipped(case, first.refused)
    flops, devices = case.flops(), case.devices
    median_s = statistics.median(first.engine_s)
    over = [s * devices / kernel for s, kernel in zip(first.engine_s, first.kernel_s, strict=True)]
    kernel_s = statistics.median(first.kernel_s)
    row = AttentionRow(
        command=command,
        case=case,
        seconds=Spread.of(first.engine_s),
        all_s=first.engine_s,
        calls=first.engine_calls,
        tflops_per_s=flops / devices / median_s / 1e12,
        flops=flops,
        kernel=first.kernel,
        kernel_seconds=Spread.of(first.kernel_s),
        kernel_all_s=first.kernel_s,
        kernels_s=first.kernels_s or {first.kernel: kernel_s},
        kernels_left_out=first.left_out,
        ideal_s=kernel_s / devices,
        ratio=Spread.of(over),
        predicted_s=predict(case, first.speeds, first.link, first.note == CAPTURED),
        exposed_s=max((one.exposed_s for one in found), key=sum),
        sent_bytes=max(one.sent_bytes for one in found),
        seen_keys=sum(one.seen_keys for one in found),
        audited_rows=sum(one.audited_rows for one in found),
        relative_error=max(one.relative_error for one in found),
        max_error=max(one.max_error for one in found),
        peak_bytes=max(one.peak_bytes for one in found),
        note=first.note,
        ranks=world.ranks,
        gpu=first.gpu,
        hardware=hardware(),
        versions=versions(),
    )
    return _with_floor(row, first) if first.full_s else row


def _with_floor(row: AttentionRow, found: Measured) -> AttentionRow:
    """The time over the case's FLOP at the best rate, pair by pair too."""
    share = row.flops / found.full_flops / row.case.devices
    floors = [seconds * share for seconds in found.full_s]
    over = [s / floor for s, floor in zip(found.engine_s, floors, strict=True)]
    return msgspec.structs.replace(
        row,
        floor_s=statistics.median(floors),
        over_floor=Spread.of(over),
        full_kernel=found.full_kernel,
        full_tflops_per_s=found.full_flops / statistics.median(found.full_s) / 1e12,
    )


def in_order(cases: Iterable[AttentionCase]) -> list[AttentionCase]:
    """So that ranks are started once for each number of them, and loopback ranks share a sequence
    and its kernels before the next one is made."""
    key: Callable[[AttentionCase], tuple[int, int, int]] = lambda case: (  # noqa: E731
        (0, case.tokens, case.ranks)
        if case.transport == "loopback"
        else (1, case.ranks, case.tokens)
    )
    return sorted(cases, key=key)
