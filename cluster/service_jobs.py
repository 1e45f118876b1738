"""The jobs of a service: what was asked, how far it is, and who is told."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ringspan.cluster.controller import Controller
from ringspan.cluster.events import PrefillProgress
from ringspan.cluster.messages import AnswerRequest
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.reading import Reading
from ringspan.cluster.service_types import (
    DoneEvent,
    Event,
    FailedEvent,
    JobState,
    JobView,
    Listener,
    ProgressEvent,
    Sampling,
)
from ringspan.cluster.stored import Description


def _new_id() -> str:
    return f"req-{secrets.token_hex(12)}"


@dataclass(eq=False)
class Job:
    """One request. The service's thread changes it; others set `left` and `cancel`, and look."""

    kind: str
    tenant: str
    controller: Controller
    token_ids: np.ndarray
    """Of the context that is to be there; empty for an answer on a named one."""
    options: PrefillOptions
    context_id: str
    keys: tuple[str, ...] = ()
    """Of the context's pages, where its tokens are given."""
    description: Description | None = None
    save: bool = True
    question: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    session_name: str = ""
    """As the client has it; empty: the session ends with the answer."""
    priority: int = 0
    context_tokens: int = 0
    request_id: str = field(default_factory=_new_id)
    created_s: float = field(default_factory=time.monotonic)
    created_unix_s: float = field(default_factory=time.time)
    listeners: list[Listener] = field(default_factory=list)
    digest: bytes = b""
    """Of all that was asked, where an idempotency key came with it."""

    state: JobState = JobState.waiting
    left: bool = False
    """Nobody waits for it any more."""
    cancel: bool = False
    cost: int = -1
    """Tokens that are to be computed before its first one; -1: not looked at yet."""
    not_before_s: float = 0.0
    retries: int = 0
    refused: int = 0
    """Times that what it needs was in use."""
    cached_tokens: int = 0
    progress: PrefillProgress | None = None
    session_id: str = ""
    """Of the controller."""
    request: AnswerRequest | None = None
    reading: Reading | None = None
    told: int = 0
    """Tokens that were given out."""
    first_s: float = 0.0
    ended_s: float = 0.0
    error: Exception | None = None
    _events: list[Event] = field(default_factory=list)

    @property
    def is_answer(self) -> bool:
        return self.kind == "answer"

    @property
    def plain(self) -> bool:
        """An answer whose context is the prompt's own beginning."""
        return self.is_answer and len(self.token_ids) > 0

    @property
    def num_tokens(self) -> int:
        """Of context and question."""
        return self.context_tokens + len(self.question)

    @property
    def given_tokens(self) -> int:
        """That came with it: those of a context it names were computed for an earlier one."""
        return len(self.token_ids) + len(self.question)

    @property
    def unwanted(self) -> bool:
        return self.cancel or (self.left and self.is_answer)

    @property
    def work(self) -> tuple[str, str]:
        """Equal for jobs that one prefill serves."""
        return self.tenant, self.context_id

    def tell(self, event: Event) -> None:
        self._events.append(event)

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def goes(self, state: JobState) -> None:
        if state is not self.state:
            self.state = state
            self.tell(ProgressEvent(self.view()))

    def end(self, state: JobState, error: Exception | None = None) -> None:
        self.state, self.error, self.ended_s = state, error, time.monotonic()
        self.tell(DoneEvent(self.view()) if error is None else FailedEvent(error))

    def last_events(self) -> list[Event]:
        """For a listener that comes when it has ended."""
        return [FailedEvent(self.error) if self.error is not None else DoneEvent(self.view())]

    def view(self, queue_place: int = 0) -> JobView:
        progress = self.progress
        computed = progress.tokens_done if progress is not None else self.cached_tokens
        begun = self.state in (JobState.answering, JobState.done)
        return JobView(
            request_id=self.request_id,
            kind=self.kind,
            state=self.state,
            tenant=self.tenant,
            context_id=self.context_id,
            created_unix_s=self.created_unix_s,
            prompt_tokens=self.num_tokens,
            cached_tokens=self.cached_tokens,
            tokens_done=self.num_tokens if begun else computed,
            completion_tokens=self.told,
            chunk_index=0 if progress is None else progress.chunk_index + 1,
            num_chunks=0 if progress is None else progress.num_chunks,
            left_s=0.0 if progress is None or begun else progress.left_s,
            queue_place=queue_place,
            error="" if self.error is None else str(self.error),
        )


class Ticket:
    """A client's end of a job. Any thread may use it."""

    def __init__(self, job: Job, listener: Listener, wake: Callable[[], None]) -> None:
        self._job, self._listener, self._wake = job, listener, wake

    @property
    def request_id(self) -> str:
        return self._job.request_id

    @property
    def context_id(self) -> str:
        return self._job.context_id

    @property
    def cached_tokens(self) -> int:
        return self._job.cached_tokens

    def leave(self) -> None:
        """This client waits no longer. An answer ends with its last client; a prefill goes on."""
        job = self._job
        job.listeners = [one for one in job.listeners if one is not self._listener]
        job.left = not job.listeners
        self._wake()

    def cancel(self) -> None:
        """The work ends, for all that wait on it."""
        self._job.cancel = True
        self._wake()


@dataclass(eq=False)
class Work:
    """A prefill under way, and the jobs that wait on it."""

    waiters: list[Job]
    nested: bool
    """Let in between two chunks of another one."""
    paused: bool = False
    chunk_s: float = 0.0
    tokens_per_s: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return self.waiters[0].work

    @property
    def unwanted(self) -> bool:
        """A gang that is being mended is not left half-way."""
        if self.paused:
            return False
        return any(job.cancel and not job.is_answer for job in self.waiters) or all(
            job.unwanted for job in self.waiters
        )


def flush(jobs: Sequence[Job], together: Callable[[list[tuple[Job, list[Event]]]], None]) -> None:
    """What is new of the jobs goes to their listeners, in one call."""
    news = [(job, events) for job in jobs if (events := job.take_events())]
    if news:
        together(news)
