"""What a simulated cluster is doing: prefills that are committed, sessions that decode."""

from __future__ import annotations

from dataclasses import dataclass, field

from ringspan.cluster.placing_blocks import Block, Holding, Session
from ringspan.cluster.placing_types import Candidate, Decode, Request
from ringspan.cluster.simulate_score import Outcome


@dataclass(slots=True, eq=False)
class Prefill:
    """A committed prefill."""

    request: Request
    chosen: Candidate
    decode: Decode
    outcome: Outcome
    start_s: float
    end_s: float
    pages: list[Holding]
    """What it takes of its gang's memory: the shared prefix, and the rest."""
    kept: Session | None
    """The place kept for it where it will decode."""
    sent: list[Holding] = field(default_factory=list)
    """Memory for its pages there: they come while it runs."""
    chunk_ends_s: list[float] = field(default_factory=list)
    behind: list[Prefill] = field(default_factory=list)
    started: bool = False
    over: bool = False


@dataclass(slots=True, eq=False)
class Decoding:
    """A session that decodes."""

    request: Request
    outcome: Outcome
    block: Block
    session: Session
    began_s: float
    ends_s: float
    pages: list[Holding]
    waits: bool = False
    """Its time came while a prefill ran on its devices."""
    over: bool = False
