"""Where the ranks of `bench attention` live: here, in processes of this host, or as Ray actors.

    loopback, no Ray     this process, all ranks as its threads
    other transports     one process a rank on this host, which meet through a file
    RAY_ADDRESS is set   actors of that cluster: one with all loopback ranks, or one a rank

Every call ends within its timeout and then names the rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import msgspec

from ringspan.cluster.faults import first_line
from ringspan.cluster.gang import FAULT_GRACE_S
from ringspan.cluster.messages import GangSpec
from ringspan.deploy.bench.attention_rank import AttentionRank
from ringspan.deploy.bench.case import AttentionCase
from ringspan.deploy.bench.measured import Measured, RankStarted
from ringspan.errors import PeerTimeout, RankLost, RingspanError

START_TIMEOUT_S = 300.0
CASE_TIMEOUT_S = 1800.0
"""Of one case on all ranks: compilation, the audit and every sample."""
STOP_TIMEOUT_S = 10.0


class World(NamedTuple):
    """Ranks that were started, and how to measure a case with them."""

    ranks: tuple[RankStarted, ...]
    measure: Callable[[AttentionCase], list[Measured]]
    """One result a rank; of loopback ranks one for all."""


@contextmanager
def open_world(spec: GangSpec) -> Iterator[World]:
    """spec: world_size and device of the processes or actors; one for all loopback ranks, whose
    number the case says. Ended when left."""
    if os.environ.get("RAY_ADDRESS"):
        from ringspan.cluster.ray_cluster import connect
        from ringspan.cluster.ray_gang import RayGang

        with connect(), RayGang(spec, rank_class=AttentionRank) as gang:

            def measure(case: AttentionCase) -> list[Measured]:
                return gang.call("measure", case, timeout_s=CASE_TIMEOUT_S, what=case.text)

            yield World(_started(gang.ready), measure)
    elif spec.world_size == 1:
        rank = AttentionRank(0, spec)
        try:
            yield World((rank.start(),), lambda case: [rank.measure(case)])
        finally:
            rank.stop()
    else:
        with Processes(spec) as processes:
            yield World(
                processes.ranks, lambda case: processes.call("measure", case, CASE_TIMEOUT_S)
            )


def _started(ready: tuple[Any, ...]) -> tuple[RankStarted, ...]:
    """A gang keeps what its ranks' `start` gave back, whatever that is."""
    return ready


class Processes:
    """One process a rank on this host, each on a GPU of its own or with its share of the cores."""

    def __init__(self, spec: GangSpec) -> None:
        self._spec = spec
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self.ranks: tuple[RankStarted, ...] = ()

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._folder = tempfile.TemporaryDirectory(prefix="ringspan-bench-")
        try:
            for rank in range(self._spec.world_size):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, self._spec, there), name=f"rank-{rank}", daemon=True
                )
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
            meeting = Path(self._folder.name) / "meeting"
            self.ranks = tuple(self.call("start", meeting, START_TIMEOUT_S))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for its next call ends
        deadline = time.monotonic() + (STOP_TIMEOUT_S if self.ranks else 0.0)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(STOP_TIMEOUT_S)
        self._folder.cleanup()

    def call(self, method: str, argument: object, timeout_s: float) -> list[Any]:
        """The method on every rank. RankLost, naming the rank, where one died, failed or did not
        answer in time; the ranks are then ended on leaving."""
        deadline = time.monotonic() + timeout_s
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send((method, argument))
            except OSError:
                self._lose(self._dead() or f"rank {rank} is gone before {method}")
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = [rank for rank in range(len(self._pipes)) if rank not in answers]
            pipes = [self._pipes[rank] for rank in waiting]
            ready = wait(pipes, max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(str(rank) for rank in waiting)
                self._lose(f"rank {silent} did not answer in {timeout_s:.0f} s ({method})")
            for rank, pipe in zip(waiting, pipes, strict=True):
                if pipe not in ready:
                    continue
                try:
                    kind, answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    self._processes[rank].join(STOP_TIMEOUT_S)
                    self._lose(f"{self._dead() or f'rank {rank} ended'} in {method}")
                if kind == "error":
                    self._blame(rank, method, answers[rank])
        return [answers[rank] for rank in range(len(self._pipes))]

    def _blame(self, rank: int, method: str, error: object) -> None:
        """A rank that complains of a peer may speak of one that died: that one is named."""
        if isinstance(error, PeerTimeout):
            others = [process.sentinel for process in self._processes if process.is_alive()]
            wait(others, FAULT_GRACE_S)
            if self._dead():
                self._lose(f"{self._dead()} in {method}; {error}")
        if isinstance(error, RingspanError):
            self.ranks = ()
            raise error
        self._lose(f"rank {rank} failed in {method}: {error}")

    def _dead(self) -> str:
        """`rank 1 died with status -9`, or nothing."""
        dead = [(rank, process.exitcode) for rank, process in enumerate(self._processes)]
        return ", ".join(f"rank {rank} died with status {code}" for rank, code in dead if code)

    def _lose(self, text: str) -> NoReturn:
        self.ranks = ()  # nobody waits for them when they are ended
        raise RankLost(text)


def _serve(rank: int, spec: GangSpec, pipe: Connection) -> None:
    """A rank's process: calls come through the pipe until it is closed."""
    if spec.device != "cpu":
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
    served = AttentionRank(rank, spec)
    try:
        with contextlib.suppress(EOFError, OSError):  # nobody is there any more
            while True:
                method, argument = pipe.recv()
                kind, answer = _answer(served, method, argument)
                pipe.send((kind, answer))
                if kind == "error":
                    return
    finally:
        served.stop()


def _answer(served: AttentionRank, method: str, argument: object) -> tuple[str, object]:
    """What the call gave, or what went wrong: an error of ours as it is, any other as a line."""
    try:
        return "done", getattr(served, method)(argument)
    except RingspanError as error:
        return "error", error
    except Exception as error:
        return "error", first_line(error)


def spec_for(spec: GangSpec, case: AttentionCase) -> GangSpec:
    """The world that a case wants: one process for loopback, else one a rank."""
    loopback = case.transport == "loopback"
    transport = "auto" if loopback else case.transport
    return msgspec.structs.replace(
        spec, world_size=1 if loopback else case.ranks, transport=transport
    )
