"""What is asked of a placement, and what it decides: values."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ringspan.cluster.placing_blocks import ANY, Block, Holding
from ringspan.cluster.placing_costs import PrefillCost


class Decode(NamedTuple):
    """Where and how a session decodes."""

    block: Block
    in_place: bool
    holding: Holding | None
    """Of the prefix, on this block already; it is not moved."""
    wire: str
    """Codec of the pages that are moved."""
    moved_bytes: float
    exposed_s: float
    """Of the move, after the prefill's end."""
    step_s: float
    """Predicted time of a token."""
    device_s: float
    """What the session takes of all devices."""


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is asked for, in tokens and seconds."""

    request_id: int
    arrival_s: float
    new_tokens: int
    output_tokens: int
    ttft_s: float
    """Limit of the time to the first token."""
    tpot_s: float
    """Limit of the time per token behind the first."""
    prefix_id: str = ""
    """What the tokens before the new ones are called: one id is one sequence, of any length."""
    prefix_tokens: int = 0
    keeps: bool = False
    """The whole is the next request's prefix, under the same id (a conversation)."""
    priority: int = 0
    lowest_bits: int = 16
    """The least fidelity of KV that is accepted."""
    patience_s: float = float("inf")
    """Refused, with the time it would take, if the first token came later."""

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.new_tokens


class Rules(NamedTuple):
    """What a policy may do; the planner may do everything."""

    sizes: tuple[int, ...] = ()
    """Of gangs; empty: all."""
    prefill_pool: str = ANY
    decode_pool: str = ANY
    decode: str = "best"
    """`best`, `in place` or `remote`."""
    spares: bool = True
    """Keeps prefills away from sessions that they would hold up too long."""
    preempts: bool = True
    soonest: bool = False
    """Takes the soonest gang instead of the cheapest that is in time."""


class Candidate(NamedTuple):
    """One way to prefill."""

    block: Block
    source: str
    """Where the prefix comes from: `none`, `in place`, `near`, `network`, `host`, `recompute`."""
    holding: Holding | None
    cached_tokens: int
    start_s: float
    end_s: float
    move_s: float
    moved_bytes: float
    wire: str
    """Codec of the moved pages."""
    cost: PrefillCost
    device_s: float
    """What it takes of all devices: gaps before it, and sessions that stand still, included."""


class Placed(NamedTuple):
    request: Request
    chosen: Candidate
    decode: Decode
    ttft_s: float
    """Quoted: from the request's arrival."""
    preempts: int | None
    """The prefill that stops at its next chunk boundary and goes on behind this one."""
    copies: int
    """Of the pages on other nodes, made while the prefill runs."""
    candidates: tuple[Candidate, ...]


class Refused(NamedTuple):
    request: Request
    reason: str
    quoted_s: float | None
    """Time to the first token that was refused; None if it can never be placed."""


Decision = Placed | Refused
