"""Which rank is to blame when a call on a gang fails.

When one rank dies its peers complain as well: a reset connection, a wait that ran out. The person
who reads the error needs the rank that went first, so all faults of a call are gathered for a
short grace and the gravest kind is named: a death, then a rank's own error, then silence, then a
complaint about a peer.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ringspan.errors import BadInput, CorruptPage, PeerTimeout, RankLost, RingspanError, StoreError


class FaultKind(IntEnum):
    """Gravest first."""

    DIED = 0
    FAILED = 1
    SILENT = 2
    PEER = 3


@dataclass(frozen=True)
class Fault:
    """What one rank did wrong in one call."""

    rank: int
    kind: FaultKind
    text: str = ""
    """One line."""
    error: RingspanError | None = None
    """The rank's own error, when it is one of ours."""
    traceback: str = ""


@dataclass(frozen=True)
class Member:
    """Where a rank lives."""

    host: str
    pid: int


class RanksFailed(Exception):
    """A host of ranks -> its gang: at least one of its ranks failed. Survives pickling."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(fault.traceback or fault.text for fault in self.faults)


def fault_of(rank: int, error: BaseException) -> Fault:
    """What an exception raised by `rank` says. PeerTimeout and RankLost speak of another rank."""
    return Fault(
        rank=rank,
        kind=FaultKind.PEER if isinstance(error, PeerTimeout | RankLost) else FaultKind.FAILED,
        text=first_line(error),
        error=error if isinstance(error, RingspanError) else None,
        traceback="".join(traceback.format_exception(error)),
    )


def bare(fault: Fault) -> Fault:
    """The same without the frames that its error came through, and all they hold."""
    if fault.error is not None:
        fault.error.__traceback__ = fault.error.__cause__ = fault.error.__context__ = None
    return fault


def to_replace(faults: Sequence[Fault]) -> set[int]:
    """Ranks that died or failed by themselves. Of those that only did not answer, or complain of a
    peer, nothing is known yet: they may have waited for the others."""
    return {fault.rank for fault in faults if fault.kind in (FaultKind.DIED, FaultKind.FAILED)}


def first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, RingspanError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def blame(faults: Sequence[Fault], members: Sequence[Member | None], what: str) -> RingspanError:
    """The error to raise for the faults (at least one) of one call.

    What the caller or a disk did wrong (BadInput, StoreError, CorruptPage) keeps its type;
    everything else is RankLost. `members[rank]` says where a rank lives, None if not yet known.
    """
    gravest = min(fault.kind for fault in faults)
    culprits = sorted(
        (fault for fault in faults if fault.kind == gravest), key=lambda fault: fault.rank
    )
    first = culprits[0]
    if isinstance(first.error, BadInput):
        return first.error  # it reads the same from every rank
    names = " and ".join(_name(fault.rank, members) for fault in culprits)
    if isinstance(first.error, StoreError | CorruptPage):
        error = type(first.error)(f"{_name(first.rank, members)} in {what}: {first.error}")
        return error
    complaints = [fault for fault in faults if fault.kind == FaultKind.PEER]
    hearsay = f"; rank {complaints[0].rank} says: {complaints[0].text}" if complaints else ""
    match gravest:
        case FaultKind.DIED:
            detail = f": {first.text}" if first.text else ""
            return RankLost(f"{names} died in {what}{detail}")
        case FaultKind.FAILED:
            return RankLost(f"{_name(first.rank, members)} failed in {what}: {first.text}")
        case FaultKind.SILENT:
            return RankLost(f"{names} did not answer in {what}: {first.text}{hearsay}")
        case _:
            return RankLost(f"{_name(first.rank, members)} lost a peer in {what}: {first.text}")


def is_benign(faults: Sequence[Fault]) -> bool:
    """The ranks said no, but are alive and in step: the gang can go on."""
    return all(isinstance(fault.error, BadInput | StoreError | CorruptPage) for fault in faults)


def _name(rank: int, members: Sequence[Member | None]) -> str:
    member = members[rank] if rank < len(members) else None
    return f"rank {rank} (host {member.host}, pid {member.pid})" if member else f"rank {rank}"
