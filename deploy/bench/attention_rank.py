"""One rank of `bench attention`: measures a case with its peers, or all loopback ranks by itself.

A plain class: `worlds` runs it in this process, in processes of this host, or as Ray actors.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from ringspan.attention.audit import AuditResult
from ringspan.attention.cost import Link, Speeds
from ringspan.attention.group import join_group
from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.transport import Transport
from ringspan.cluster.device import device_named, on_device, product_name
from ringspan.cluster.faults import first_line
from ringspan.cluster.messages import GangSpec
from ringspan.deploy.bench.captured import CAPTURED, captured
from ringspan.deploy.bench.case import AttentionCase
from ringspan.deploy.bench.contest import Contestant, Engine, Unavailable, contestant
from ringspan.deploy.bench.measured import Measured, RankStarted
from ringspan.deploy.bench.power import PowerLog
from ringspan.deploy.bench.single_kernel import Yardstick, shape_of
from ringspan.deploy.bench.speeds import measured_speeds
from ringspan.deploy.bench.timing import Agree, Run, Side, alone, calls_of, in_turn
from ringspan.errors import WrongAttention

T = TypeVar("T")

JOIN_TIMEOUT_S = 300.0
KERNELS_TIMEOUT_S = 600.0
"""The other ranks of a GPU wait in an exchange while rank 0 builds and times every backend."""


class AttentionRank:
    """Made by a world or a Ray gang with (rank, spec); `start` it before anything else."""

    def __init__(self, rank: int, spec: GangSpec) -> None:
        self.rank, self.spec = rank, spec
        self._transport: Transport | None = None
        self._yardstick: Yardstick | None = None
        self._speeds: dict[tuple[object, ...], tuple[Speeds | None, Link | None]] = {}

    def host_store(self) -> tuple[str, int]:
        """On rank 0 only, before `start`: where ranks of several hosts meet."""
        address = socket.gethostbyname(socket.gethostname())
        self._store = torch.distributed.TCPStore(
            address, 0, self.spec.world_size, is_master=True, wait_for_workers=False
        )
        return address, self._store.port

    def start(self, rendezvous: tuple[str, int] | Path | None = None) -> RankStarted:
        """Once. rendezvous: rank 0's store, a file that all ranks share, or None for one rank."""
        self.device = device_named(self.spec.device)
        world_size = self.spec.world_size
        self._threads = self.spec.threads or max(1, (os.cpu_count() or 1) // world_size)
        torch.set_num_threads(self._threads)
        if world_size > 1:
            with on_device(self.device):
                self._transport = self._join(rendezvous)
        return RankStarted(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self.device),
            device_name=product_name(self.device),
            threads=self._threads,
        )

    def measure(self, case: AttentionCase) -> Measured:
        """On every rank with the same case. A wrong answer is told in the result, on all ranks, so
        that they stay in step; PeerTimeout where a peer is gone."""
        with on_device(self.device), torch.no_grad():
            if self._transport is not None:
                return self._measure_together(case, self._transport)
            try:
                return self._measure_alone(case)
            except torch.OutOfMemoryError as error:
                text = f"it does not fit the device: {first_line(error)}"
            self._yardstick = None
            torch.cuda.empty_cache()
            return Measured(rank=0, refused=text)

    def stop(self) -> None:
        """May be repeated."""
        self._yardstick = None
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _join(self, rendezvous: tuple[str, int] | Path | None) -> Transport:
        world_size, patience = self.spec.world_size, timedelta(seconds=JOIN_TIMEOUT_S)
        if isinstance(rendezvous, Path):
            store: torch.distributed.Store = torch.distributed.FileStore(
                str(rendezvous), world_size
            )
        elif rendezvous is None:
            raise ValueError(f"rank {self.rank} of {world_size} was given no place to meet")
        elif self.rank == 0:
            store = self._store
        else:
            store = torch.distributed.TCPStore(
                *rendezvous, world_size, is_master=False, timeout=patience
            )
        store.set_timeout(patience)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout_s = self.spec.timeout_s
        if backend == "nccl":
            timeout_s = max(timeout_s, KERNELS_TIMEOUT_S)
        group = join_group(backend, store, self.rank, world_size, self.device, timeout_s)
        if self.spec.transport != "copy-engine":
            return group
        from ringspan.attention.symmetric import with_copy_engine

        return with_copy_engine(group, store)

    # all ranks here

    def _measure_alone(self, case: AttentionCase) -> Measured:
        world = LoopbackWorld(case.ranks, self.spec.timeout_s)
        ends = [world.transport(rank, self.device) for rank in range(case.ranks)]
        whole = self._measured_with(case).whole
        engines = [Engine(case, rank, end, whole) for rank, end in enumerate(ends)]

        def everywhere(work: Callable[[Engine], T]) -> list[T]:
            def body(engine: Engine) -> T:
                with on_device(self.device), torch.no_grad():  # both belong to a thread
                    return work(engine)

            return world.run([partial(body, engine) for engine in engines])

        def drop() -> None:
            for end in ends:
                end.exposure.collect()

        try:
            audits = everywhere(Engine.audit)
            world.poison = False  # the audit wanted it; its writes are no part of the work
            speeds = everywhere(lambda one: self._speeds_for(case, one.rank, one.transport))[0]
            run: Run = lambda calls: everywhere(lambda one: one.run(calls))  # noqa: E731
            graph = self.device.type == "cuda" and case.ranks > 1
            if graph:
                run(1)

                def once(stream: torch.cuda.Stream) -> None:
                    def on_stream(one: Engine) -> None:
                        with torch.cuda.stream(stream):
                            one.run(1)

                    everywhere(on_stream)

                run = captured(once, [end.exposure for end in ends], self.device)
            found = self._times(case, Side(case.scheme, run), alone, drop)
            exposed = [end.exposure.collect() for end in ends]
            seen = everywhere(Engine.prove)
        except WrongAttention as error:
            return Measured(rank=0, right=False, wrong=str(error))
        on_gpu = self.device.type == "cuda"  # on a CPU a wait is just another rank's turn
        return msgspec.structs.replace(
            found,
            **_of_audits(audits),
            speeds=speeds[0],
            link=speeds[1],
            exposed_s=_per_run(exposed, found.engine_calls * case.repeats) if on_gpu else (),
            note=CAPTURED if graph else "",
            sent_bytes=max(engine.sent_bytes for engine in engines),
            seen_keys=sum(seen),
        )

    # one rank of several

    def _measure_together(self, case: AttentionCase, transport: Transport) -> Measured:
        def agree(number: float) -> float:
            mine = torch.tensor([number], dtype=torch.float64, device=self.device)
            return float(transport.all_gather(mine).max())

        whole = self._measured_with(case).whole
        try:
            with contestant(case, self.rank, transport, whole, agree) as one:
                return self._contest(case, transport, agree, one)
        except Unavailable as error:
            return Measured(rank=self.rank, refused=str(error))

    def _contest(
        self, case: AttentionCase, transport: Transport, agree: Agree, one: Contestant
    ) -> Measured:
        audit, wrong = _tried(one.audit, agree)
        if audit is None:
            return Measured(rank=self.rank, right=False, wrong=wrong)
        speeds = self._speeds_for(case, self.rank, transport)
        side = Side(case.scheme, one.run)
        found = self._times(case, side, agree, lambda: transport.exposure.collect())
        exposed = transport.exposure.collect()
        seen, wrong = _tried(one.prove, agree)
        if seen is None:
            return Measured(rank=self.rank, right=False, wrong=wrong)
        return msgspec.structs.replace(
            found,
            **_of_audits([audit]),
            speeds=speeds[0],
            link=speeds[1],
            exposed_s=_per_run([exposed], found.engine_calls * case.repeats),
            sent_bytes=one.sent_bytes,
            seen_keys=seen,
            note=one.note,
        )

    # both

    def _times(
        self, case: AttentionCase, own: Side, agree: Agree, drop_exposure: Callable[[], object]
    ) -> Measured:
        """The side in turn with the single kernel, which rank 0 runs while the others wait."""
        yardstick = self._measured_with(case)
        kernel = yardstick.kernel if self.rank == 0 else None
        full = yardstick.full_kernel if self.rank == 0 and case.cached else None
        agree(0.0)  # choosing kernels takes rank 0 a while
        sides = [own, Side("kernel", None if kernel is None else self._with_all_cores(kernel.run))]
        if case.cached:
            sides.append(Side("full", None if full is None else self._with_all_cores(full.run)))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        calls = calls_of(sides, self.device, agree)
        drop_exposure()
        with PowerLog(self.device) if self.rank == 0 else nullcontext() as log:
            times = in_turn(sides, calls, case.repeats, self.device, agree)
        on_gpu = self.device.type == "cuda"
        return Measured(
            rank=self.rank,
            engine_s=times[0],
            engine_calls=calls[0],
            kernel_s=times[1],
            kernel="" if kernel is None else kernel.name,
            kernels_s={} if kernel is None else kernel.seconds,
            left_out={} if kernel is None else kernel.left_out,
            full_s=times[2] if case.cached else (),
            full_flops=yardstick.full_case.flops() if case.cached else 0.0,
            full_kernel="" if full is None else full.name,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else 0,
            gpu=None if log is None else log.state,
        )

    def _measured_with(self, case: AttentionCase) -> Yardstick:
        if self._yardstick is None or self._yardstick.shape != shape_of(case):
            self._yardstick = None  # its memory is free before the next one takes its own
            self._yardstick = Yardstick(case, self.device)
        return self._yardstick

    def _speeds_for(
        self, case: AttentionCase, rank: int, transport: Transport
    ) -> tuple[Speeds | None, Link | None]:
        """Once for each number of ranks, heads and backend. All ranks call it."""
        key = (
            rank, case.ranks, case.transport, case.num_q_heads, case.num_kv_heads, case.head_dim,
            case.dtype, case.backend,
        )  # fmt: skip
        if key not in self._speeds:
            self._speeds[key] = measured_speeds(case, rank, self.spec, transport)
        return self._speeds[key]

    def _with_all_cores(self, run: Run) -> Run:
        """On a CPU one kernel gets the threads of all the ranks together."""
        if self.device.type != "cpu" or self.spec.world_size == 1:
            return run

        def wide(calls: int) -> None:
            torch.set_num_threads(self._threads * self.spec.world_size)
            try:
                run(calls)
            finally:
                torch.set_num_threads(self._threads)

        return wide


def _tried(work: Callable[[], T], agree: Agree) -> tuple[T | None, str]:
    """What it gives, or what was wrong, here or on another rank: all ranks go the same way."""
    result, wrong = None, ""
    try:
        result = work()
    except WrongAttention as error:
        wrong = str(error)
    if agree(float(bool(wrong))):
        return None, wrong
    return result, ""


def _of_audits(audits: Sequence[AuditResult]) -> dict[str, float]:
    return {
        "audited_rows": sum(one.rows for one in audits),
        "relative_error": max(one.relative_error for one in audits),
        "max_error": max(one.max_error for one in audits),
    }


def _per_run(exposed: Sequence[tuple[float, ...]], runs: int) -> tuple[float, ...]:
    """Seconds by step of one run, the ranks added up."""
    return tuple(sum(steps) / runs for steps in zip_longest(*exposed, fillvalue=0.0))
