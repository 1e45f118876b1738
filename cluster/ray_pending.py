"""Calls on a gang's actors that are on their way. Ray's exceptions end here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ringspan.cluster.faults import (
    Fault,
    FaultKind,
    Member,
    RanksFailed,
    blame,
    first_line,
    is_benign,
)
from ringspan.cluster.gang import BENIGN_GRACE_S, FAULT_GRACE_S


class GangOfActors(Protocol):
    """What a call tells its gang."""

    lost: bool
    faults: tuple[Fault, ...]
    """Of the last call that failed."""

    @property
    def members(self) -> Sequence[Member | None]: ...


class RayPending:
    """Calls on their way, one per actor."""

    def __init__(self, gang: GangOfActors, refs: dict[Any, tuple[int, ...]], what: str) -> None:
        self._gang, self._refs, self._what = gang, refs, what

    def result(self, timeout_s: float, *, one_per_rank: bool = True) -> list[Any]:
        """One result per rank; or what each host gave back, as it is."""
        answers, faults = self.gather(timeout_s)
        if faults:
            gang = self._gang
            gang.faults = tuple(faults)
            gang.lost = gang.lost or not is_benign(faults)
            cause = RanksFailed(tuple(faults)) if any(f.traceback for f in faults) else None
            raise blame(faults, gang.members, self._what) from cause
        in_order = [answers[ref] for ref in self._refs]
        if not one_per_rank:
            return in_order
        return [result for answer in in_order for result in answer]

    def gather(self, timeout_s: float) -> tuple[dict[Any, Any], list[Fault]]:
        """Answers by call, and what went wrong."""
        answers: dict[Any, Any] = {}
        faults: list[Fault] = []
        waiting = list(self._refs)
        deadline = time.monotonic() + timeout_s
        while waiting:
            left_s = deadline - time.monotonic()
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(left_s, 0.0))
            if not done:
                break
            had_faults = bool(faults)
            for ref in done:
                try:
                    answers[ref] = ray.get(ref, timeout=max(left_s, 1.0))
                except Exception as error:
                    faults += _faults_of(self._refs[ref], error)
            if faults and not had_faults:
                grace_s = BENIGN_GRACE_S if is_benign(faults) else FAULT_GRACE_S
                deadline = min(deadline, time.monotonic() + grace_s)
        silent_s = timeout_s if not faults else FAULT_GRACE_S
        for ref in waiting:
            text = f"waited {silent_s:.1f} s"
            faults += [Fault(rank, FaultKind.SILENT, text) for rank in self._refs[ref]]
        return answers, faults


def _faults_of(ranks: tuple[int, ...], error: Exception) -> list[Fault]:
    """Ray's exceptions end here."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RanksFailed):
        return list(cause.faults)
    if isinstance(error, RayActorError):
        return [Fault(rank, FaultKind.DIED, _death(error)) for rank in ranks]
    if isinstance(error, GetTimeoutError):
        return [Fault(rank, FaultKind.SILENT, "its answer did not arrive") for rank in ranks]
    kind = FaultKind.FAILED if isinstance(error, RayTaskError) else FaultKind.DIED
    text = first_line(cause if isinstance(cause, BaseException) else error)
    return [Fault(rank, kind, text, traceback=str(error)) for rank in ranks]


def _death(error: RayActorError) -> str:
    """Ray's many lines about a dead actor, as half a line."""
    text = str(error)
    if error.preempted:
        return "its node was taken away"
    if "running low on memory" in text:  # Ray's own monitor; a guess at the kernel's is not told
        return "Ray ended it because its node ran low on memory"
    if "creation task" in text:
        return text.strip().splitlines()[-1].strip()
    if "node" in text and "has been marked dead" in text:
        return "its node is gone"
    return "its process is gone"
