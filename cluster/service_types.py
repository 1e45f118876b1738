"""What a service is asked, and what it tells of it: plain values, without Ray and torch.

A request is a *job*. Its states:

    waiting -> prefilling <-> paused -> answering -> done
       |           |            |           |
       +-----------+------------+-----------+----> failed, cancelled

A prefill pauses while a lost rank is replaced. Contexts that are only opened, or held already, and
plain prompts of which all but the last tokens are held, go from waiting to answering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ringspan.errors import BadInput, RingspanError

MOST_LOGPROBS = 20
"""Alternatives of one token that can be asked for."""


class Sampling(NamedTuple):
    """How an answer is drawn, and when it ends."""

    max_tokens: int = 256
    min_tokens: int = 0
    """Until there are so many no stop id is chosen."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    """None takes a fresh one."""
    stop_ids: tuple[int, ...] = ()
    logprobs: int = 0
    """So many likeliest alternatives of each token, at most `MOST_LOGPROBS`, and its own
    logprob; 0: neither."""

    def check(self) -> None:
        """BadInput for what cannot be drawn."""
        if self.max_tokens < 1:
            raise BadInput(f"max_tokens {self.max_tokens}: wanted at least 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise BadInput(
                f"min_tokens {self.min_tokens}: wanted 0 to max_tokens {self.max_tokens}"
            )
        if not self.temperature >= 0:
            raise BadInput(f"temperature {self.temperature}: wanted 0 or more")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p {self.top_p}: wanted more than 0, at most 1")
        if not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise BadInput(f"logprobs {self.logprobs}: wanted 0 to {MOST_LOGPROBS}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise BadInput(f"seed {self.seed}: wanted a number of 64 bits")


@dataclass(frozen=True)
class Limits:
    """Of a service; what is beyond them is refused with the numbers."""

    max_waiting: int = 64
    max_running: int = 16
    """Answers that advance together."""
    max_tokens_waiting: int = 4_000_000
    """Of the prompts that wait; one job may be longer if it waits alone."""
    max_prompt_tokens: int = 0
    """0: what the model has positions for."""
    max_plain_contexts: int = 32
    """Contexts of plain prompts that the gang keeps for the next one that begins alike."""
    retry_after_s: float = 1.0
    """The least wait that is quoted to a client that is refused."""
    kept_s: float = 600.0
    """How long a job can be looked at once it has ended."""


@dataclass(frozen=True)
class TenantLimits:
    """Of one tenant; 0: no limit."""

    max_running: int = 0
    """Answers and prefills begun."""
    tokens_per_minute: int = 0
    """Prompt tokens and the most that may be answered, over the last 60 s."""
    requests_per_minute: int = 0
    """Answers and prefills that were taken, over the last 60 s."""
    tokens_in_flight: int = 0
    """Counted like those of a minute, of requests that have not ended."""
    contexts: int = 0
    """That can be asked, or are being made; stored ones too."""


class JobState(StrEnum):
    waiting = "waiting"
    prefilling = "prefilling"
    paused = "paused"
    answering = "answering"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.done, JobState.failed, JobState.cancelled)


@dataclass(frozen=True)
class JobView:
    """A job as it stands now. Fields of states that it has not come to are 0."""

    request_id: str
    kind: str
    """`context` or `answer`."""
    state: JobState
    tenant: str = ""
    context_id: str = ""
    created_unix_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those whose KV was there already."""
    tokens_done: int = 0
    """Of the prompt or context, with the cached ones."""
    completion_tokens: int = 0
    chunk_index: int = 0
    """Chunks that are done."""
    num_chunks: int = 0
    left_s: float = 0.0
    """Until the prefill that it waits on is done, as far as that is known."""
    queue_place: int = 0
    """Jobs that come before it; 0 too once it has begun."""
    error: str = ""


class TokenEvent(NamedTuple):
    """One more token of an answer."""

    token_id: int
    index: int  # type: ignore[assignment]  # of the answer, not tuple's search
    finish_reason: str | None
    """On the last one: `stop` (a stop id; it is `token_id`), `length` (max_tokens reached)."""
    logprob: float | None = None
    """Natural log, of the model's own distribution (temperature 1)."""
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest tokens and their logprobs, the likeliest first."""


class ProgressEvent(NamedTuple):
    view: JobView


class FailedEvent(NamedTuple):
    """The last one of a job that failed or was cancelled (`events.Cancelled`)."""

    error: Exception


class DoneEvent(NamedTuple):
    """The last one of a job that did what was asked."""

    view: JobView


Event = TokenEvent | ProgressEvent | FailedEvent | DoneEvent

Listener = Callable[[Sequence[Event]], None]
"""Told all events of its ticket since the last call, from the service's thread; must not block."""


class Overloaded(RingspanError):
    """Too much is asked for now; later it may do."""

    def __init__(self, message: str, *, retry_after_s: float, tenant: str = "") -> None:
        """tenant: whose own limit it is; empty: everybody's."""
        super().__init__(message)
        self.message, self.retry_after_s, self.tenant = message, retry_after_s, tenant

    def __reduce__(self) -> tuple[object, ...]:
        return _overloaded, (self.message, self.retry_after_s, self.tenant)


def _overloaded(message: str, retry_after_s: float, tenant: str) -> Overloaded:
    return Overloaded(message, retry_after_s=retry_after_s, tenant=tenant)


@dataclass(frozen=True)
class ShardView:
    """One rank's share of a context."""

    rank: int
    host: str
    device: str
    pages: int
    tokens: int
    bytes: int
    tier: str
    """`gpu` (the gang's device, a CPU too), `disk`."""
    codec: str


@dataclass(frozen=True)
class ContextView:
    """A context that a tenant can ask: on the gang, in the store, or on its way."""

    context_id: str
    state: str
    """`ready`, or a `JobState` of the prefill that makes it."""
    num_tokens: int
    codec: str
    fidelity: str
    kv_bytes: int
    chat: bool = False
    """It opens a user's turn; see `stored.Description`."""
    title: str = ""
    created_unix_s: float = 0.0
    on_gang: bool = False
    stored: bool = False
    shards: tuple[ShardView, ...] = ()
