"""What is asked of several gangs behind one placement, what comes back, and what is logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import msgspec
import numpy as np

from ringspan.cluster.controller import Controller
from ringspan.cluster.gang import Gang
from ringspan.cluster.handing import HandedOver, HandingOver
from ringspan.cluster.placing_blocks import ANY, Block, Holding
from ringspan.cluster.placing_types import Candidate, Decision, Placed, Refused
from ringspan.errors import RingspanError


class GangPlace(NamedTuple):
    """A gang, and where it runs."""

    node_id: str
    start: Callable[[], Gang]
    """A started one; asked again when a gang that was lost could not be mended."""
    ranks: int
    pool: str = ANY
    """The role of its node; gangs of one node have one."""
    rack: str = ""


@dataclass(frozen=True, eq=False)
class Ask:
    """A question on a context. Greedy at temperature 0; else drawn by its seed, so that an answer
    that is begun anew is the same."""

    context: np.ndarray
    """int32 [n], n > 0."""
    question: tuple[int, ...]
    max_tokens: int = 256
    ttft_s: float = 60.0
    tpot_s: float = 1.0
    patience_s: float = float("inf")
    priority: int = 0
    lowest_bits: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answered:
    token_ids: tuple[int, ...]
    context_id: str
    placed: Placed
    """The decision that was carried out; the last of several where gangs were lost."""
    prefill_gang: int
    decode_gang: int
    """Which gang answered. It is the prefill's own, too, where a hand-off failed."""
    handed: HandedOver | None
    tries: int


class NotNow(RingspanError):
    """Nothing was done: memory or time is lacking, and later it may not be."""

    def __init__(self, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Member:
    """One of the gangs. Its fields change under its turn, but for `uses` and `gone`: these are the
    ledger's."""

    number: int
    place: GangPlace
    gang: Gang
    controller: Controller
    block: Block
    turn: Lock = field(default_factory=Lock)
    """One caller at a time."""
    overdue: list[tuple[HandingOver, str]] = field(default_factory=list)
    """Hand-offs to it that were given up elsewhere, and why: it does not know yet."""
    uses: Counter[str] = field(default_factory=Counter)
    """Requests that are at work on each context here."""
    gone: bool = False
    """Neither mended nor replaced: nothing is placed on it."""


@dataclass(eq=False)
class Work:
    """A placed request, while it is carried out."""

    number: int
    ask: Ask
    name: str
    """Of the context."""
    placed: Placed
    prefill: Member
    decode: Member
    pinned: list[Holding] = field(default_factory=list)
    """What must stay until the end, on either gang."""
    committed: bool = True
    """The prefill's time on its gang."""
    joined: Member | None = None
    """Where the state counts the session."""
    handing: HandingOver | None = None
    handed: HandedOver | None = None

    @property
    def in_place(self) -> bool:
        return self.prefill is self.decode


class LoggedCandidate(msgspec.Struct, frozen=True, kw_only=True):
    gang: int
    ranks: int
    source: str
    cached_tokens: int
    start_s: float
    end_s: float
    device_s: float


class LoggedPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the decision log; times in seconds from the request's arrival."""

    new_tokens: int
    prefix_tokens: int
    output_tokens: int
    refused: str = ""
    quoted_s: float | None = None
    chosen: LoggedCandidate | None = None
    decode_gang: int | None = None
    wire: str = ""
    scheme: str = ""
    chunk_tokens: int = 0
    losers: tuple[LoggedCandidate, ...] = ()


class LoggedHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the decision log: what became of a hand-off."""

    sender: int
    receiver: int
    epoch: int
    outcome: str
    """`begun`, `done`, or why it was given up."""
    payload_bytes: int = 0


class LoggedLoss(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the decision log: ranks were lost, and what was done."""

    gang: int
    ranks: tuple[int, ...]
    done: str
    """`mended`, `begun anew`, `gone` or `regained`."""
    why: str


def logged(decision: Decision, gang_of: dict[int, int]) -> LoggedPlacement:
    """gang_of: by the number of its block."""
    request = decision.request
    asked = LoggedPlacement(
        new_tokens=request.new_tokens,
        prefix_tokens=request.prefix_tokens,
        output_tokens=request.output_tokens,
    )
    if isinstance(decision, Refused):
        quoted = decision.quoted_s
        quoted = None if quoted == float("inf") else quoted
        return msgspec.structs.replace(asked, refused=decision.reason, quoted_s=quoted)

    def line(one: Candidate) -> LoggedCandidate:
        return LoggedCandidate(
            gang=gang_of[one.block.number],
            ranks=one.block.size,
            source=one.source,
            cached_tokens=one.cached_tokens,
            start_s=one.start_s - request.arrival_s,
            end_s=one.end_s - request.arrival_s,
            device_s=one.device_s,
        )

    chosen = decision.chosen
    return msgspec.structs.replace(
        asked,
        quoted_s=decision.ttft_s,
        chosen=line(chosen),
        decode_gang=gang_of[decision.decode.block.number],
        wire=decision.decode.wire,
        scheme=chosen.cost.scheme,
        chunk_tokens=chosen.cost.chunk_tokens,
        losers=tuple(line(one) for one in decision.candidates if one is not chosen),
    )
