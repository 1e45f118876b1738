"""The JSON record of a run: what was asked, how it was done, on what, and how long it took.

A number without its machine, version and command is not a result; every figure in the README comes
from such a record. Written at once (`os.replace`), also when the run failed.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ringspan.cluster.events import PrefillDone
from ringspan.cluster.messages import Findings, LongTurn, PrefillPlan, RankReady
from ringspan.deploy.machine import Hardware, hardware, versions
from ringspan.errors import BadInput, StoreError

Asked = dict[str, str | int | float | bool | list[str] | None]


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    elapsed_s: float


class Prefilled(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a prefill; the model's load and the save are phases of their own."""

    tokens: int
    """Computed; a reused prefix is not among them."""
    elapsed_s: float
    tokens_per_s: float
    flops: float
    """By `prefill_flops`: the model's matmuls and causal attention, nothing counted twice."""
    tflops_per_device: float
    """flops / elapsed_s / ranks' devices / 1e12. Loopback ranks share one device."""
    kv_bytes: int
    """Encoded, over all ranks."""
    sent_bytes: int
    exchange_s: float
    """Waited for peers, summed over ranks; CPU ranks only."""
    chunk_s: tuple[float, ...]
    """Of each chunk, the slowest rank's."""
    predicted_s: float = 0.0
    """What the plan said of `elapsed_s`; 0, and nothing below, where it was not predicted."""
    predicted_chunk_s: tuple[float, ...] = ()
    ratio: float | None = None
    """elapsed_s / predicted_s."""
    chunk_ratio: tuple[float, ...] = ()
    """chunk_s / predicted_chunk_s."""
    findings: Findings = Findings()
    """Proof, waits and memory, of all ranks and chunks."""


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    question: str
    answer: str
    question_tokens: int
    answer_tokens: int
    first_token_s: float
    elapsed_s: float
    finish_reason: str
    long_turn: LongTurn | None = None
    """How a long question was taken through the model."""


class Needles(msgspec.Struct, frozen=True, kw_only=True):
    tokens: int
    planted: int
    found: int
    missed_positions: tuple[int, ...]


class RunRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One run of one command."""

    command: str
    started_at: str
    """UTC, ISO 8601."""
    outcome: str = "running"
    """`ok`, or the error's text."""
    asked: Asked
    versions: dict[str, str]
    hardware: Hardware
    context_id: str | None = None
    plan: PrefillPlan | None = None
    ranks: tuple[RankReady, ...] = ()
    phases: list[Phase] = []
    prefill: Prefilled | None = None
    answers: list[Answered] = []
    needles: Needles | None = None
    measured: dict[str, float] = {}
    """Speeds that `doctor` measured; each name ends in its unit."""
    elapsed_s: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block; a phase that failed is recorded too."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add_phase(name, time.monotonic() - started)

    def add_phase(self, name: str, elapsed_s: float) -> None:
        self.phases.append(Phase(name=name, elapsed_s=elapsed_s))


def prefilled(done: PrefillDone, ranks: Sequence[RankReady]) -> Prefilled:
    """The figures of a prefill that was computed (not reused)."""
    elapsed_s, plan = max(done.timings.prefill_s, 1e-9), done.plan
    devices = len({(rank.host, rank.pid, rank.device) for rank in ranks})
    new_tokens = plan.num_tokens - plan.reused_tokens
    return Prefilled(
        tokens=new_tokens,
        elapsed_s=elapsed_s,
        tokens_per_s=new_tokens / elapsed_s,
        flops=done.flops,
        tflops_per_device=done.flops / elapsed_s / devices / 1e12,
        kv_bytes=done.kv_bytes,
        sent_bytes=done.sent_bytes,
        exchange_s=done.exchange_s,
        findings=done.findings,
        chunk_s=done.timings.chunk_s,
        predicted_s=plan.predicted_s,
        predicted_chunk_s=plan.predicted_chunk_s,
        ratio=elapsed_s / plan.predicted_s if plan.predicted_s else None,
        chunk_ratio=tuple(
            measured / predicted
            for measured, predicted in zip(
                done.timings.chunk_s, plan.predicted_chunk_s, strict=bool(plan.predicted_s)
            )
        ),
    )


def new_record(asked: Asked) -> RunRecord:
    return RunRecord(
        command=shlex.join(["ringspan", *sys.argv[1:]]),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        asked=asked,
        versions=versions(),
        hardware=hardware(),
    )


@contextmanager
def recording(path: Path | None, asked: Asked) -> Iterator[RunRecord]:
    """A record that is written to `path` (if one is given) however the block ends."""
    if path is not None:
        check_writable(path)
    record = new_record(asked)
    started = time.monotonic()
    try:
        yield record
        record.outcome = "ok"
    except BaseException as error:
        record.outcome = f"{type(error).__name__}: {error}"
        raise
    finally:
        record.elapsed_s = time.monotonic() - started
        if path is not None:
            write_record(record, path)


def check_writable(path: Path) -> None:
    """Refuse a record's path before the run rather than after it."""
    folder = path.parent
    if path.is_dir():
        raise BadInput(f"--json {path} is a folder; wanted a file")
    if not folder.is_dir():
        raise BadInput(f"--json {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"--json {path}: no right to write in {folder}")


def write_record(record: RunRecord, path: Path) -> None:
    """Whole or not at all: a reader never sees half a record."""
    data = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise StoreError(f"cannot write the record {path}: {error.strerror}") from None


def read_record(path: Path) -> RunRecord:
    return msgspec.json.decode(path.read_bytes(), type=RunRecord)
