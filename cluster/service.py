"""Many clients of one gang: any thread may ask, one thread does it (`service_engine`)."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np

from ringspan.cluster.controller import Controller
from ringspan.cluster.messages import ModelFacts
from ringspan.cluster.metrics import Metrics
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.service_contexts import StoredContexts, context_views
from ringspan.cluster.service_engine import Engine
from ringspan.cluster.service_jobs import Job, flush
from ringspan.cluster.service_jobs import Ticket as Ticket
from ringspan.cluster.service_queue import Admission, check_contexts
from ringspan.cluster.service_types import (
    MOST_LOGPROBS,
    ContextView,
    Event,
    JobView,
    Limits,
    Listener,
    Overloaded,
    Sampling,
    TenantLimits,
)
from ringspan.cluster.stored import Description
from ringspan.errors import BadInput, RingspanError, TooLarge, UnknownName
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, namespace_digest
from ringspan.types import page_tokens_for

T = TypeVar("T")
Together = Callable[[Sequence[tuple[Sequence[Listener], Sequence[Event]]]], None]

IDLE_S = 0.02
"""Between two looks for jobs that cannot begin yet."""
COMMAND_TIMEOUT_S = 600.0
"""For what has to wait for the gap between two chunks."""


def _no_limits(tenant: str) -> TenantLimits:
    return TenantLimits()


class Service:
    """`controller` must be started; it is the service's from now on, `close` leaves its gang.

    namespace_of: of each tenant, `tenancy.tenant_namespace`; None: all share the controller's.
    on_token_batch: told all tickets' events of one step at once, in place of their listeners.
    """

    def __init__(
        self,
        controller: Controller,
        *,
        limits: Limits = Limits(),  # noqa: B008  # frozen
        namespace_of: Callable[[str], bytes] | None = None,
        tenant_limits: Callable[[str], TenantLimits] = _no_limits,
        plain_options: PrefillOptions | None = None,
        on_token_batch: Together | None = None,
    ) -> None:
        """plain_options: of contexts that are made of plain prompts."""
        controller.mends_itself = True
        self.limits, self.metrics, self.facts = limits, Metrics(), controller.facts
        self._first, self._namespace_of = controller, namespace_of
        self._tenant_limits = tenant_limits
        self._plain = plain_options or PrefillOptions()
        self._together = on_token_batch
        self._controllers: dict[bytes | None, Controller] = {None: controller}
        self._jobs: dict[str, Job] = {}
        self._by_key: dict[tuple[str, str], Job] = {}
        self._admission = Admission(limits, tenant_limits)
        self._engine = Engine(
            lambda: list(self._controllers.values()), controller, limits, self.metrics, self._flush
        )
        self._stored = StoredContexts()
        self._wake = threading.Event()
        self.metrics.look = self._look
        self._closing, self._closed = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        self._thread.start()

    facts: ModelFacts

    @property
    def max_model_len(self) -> int:
        """Tokens that a context and its answer may have together."""
        return self.facts.max_positions

    # asking

    def prefill(
        self,
        token_ids: Sequence[int] | np.ndarray,
        options: PrefillOptions | None = None,
        *,
        description: Description | None = None,
        tenant: str = "",
        priority: int = 0,
        idempotency_key: str = "",
        listener: Listener,
    ) -> Ticket:
        """Make a context; whoever asks for the same one meanwhile waits for the same work. It goes
        on when its clients leave, until one cancels it. Overloaded, TooLarge, BadInput."""
        ids = self._ids(token_ids)
        options = options or PrefillOptions()
        digest = _digest(ids.tobytes(), options, description)
        if (ticket := self._again(tenant, idempotency_key, digest, listener)) is not None:
            return ticket
        controller = self._controller(tenant)
        plan, keys = controller.planned(ids, options)
        job = Job(
            "context", tenant, controller, ids, options, plan.context_id,
            keys=keys, description=description, priority=priority,
            context_tokens=plan.num_tokens, digest=digest,
        )  # fmt: skip
        if most := self._tenant_limits(tenant).contexts if tenant else 0:
            there = {view.context_id for view in self.contexts(tenant)} - {job.context_id}
            check_contexts(len(there), most, tenant)
        return self._admit(job, listener, idempotency_key)

    def answer(
        self,
        token_ids: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        context_id: str = "",
        session_id: str = "",
        tenant: str = "",
        priority: int = 0,
        keep: bool = False,
        idempotency_key: str = "",
        listener: Listener,
    ) -> Ticket:
        """Answer a question on a context, or without one a whole prompt: what is known of its
        beginning is reused, the rest computed, and stored if it is to be kept.

        session_id: a name of the client's choice; equal ones of a tenant go on with each other, on
        the same context. Overloaded, TooLarge, BadInput, UnknownName.
        """
        ids = self._ids(token_ids)
        _check(sampling)
        digest = _digest(ids.tobytes(), sampling, (context_id, session_id, keep))
        if (ticket := self._again(tenant, idempotency_key, digest, listener)) is not None:
            return ticket
        controller = self._controller(tenant)
        job = Job(
            "answer", tenant, controller, ids[:0], self._plain, context_id, save=keep,
            sampling=sampling, session_name=session_id, priority=priority, digest=digest,
        )  # fmt: skip
        if context_id:
            job.question = tuple(ids.tolist())
            job.context_tokens = self.context(context_id, tenant).num_tokens
        else:
            self._cut(job, ids)
        most = self.limits.max_prompt_tokens
        if most and job.num_tokens > most:
            raise TooLarge(f"a prompt of {job.num_tokens} tokens: at most {most} are taken here")
        whole = job.num_tokens + sampling.max_tokens
        if whole > self.max_model_len:
            raise TooLarge(
                f"{job.num_tokens} tokens and {sampling.max_tokens} of an answer are {whole}, "
                f"{self.facts.name} has {self.max_model_len} positions: ask for fewer"
            )
        return self._admit(job, listener, idempotency_key)

    def _cut(self, job: Job, ids: np.ndarray) -> None:
        """A prompt's context is its beginning, of whole pages where it has any; the rest is asked
        on it: the answer's first token needs at least one."""
        if len(ids) < 2:
            raise BadInput("a prompt of 1 token: wanted at least 2; begin it with a BOS token")
        page_tokens = page_tokens_for(self.facts.head_dim)
        cut = (len(ids) - 1) // page_tokens * page_tokens or len(ids) - 1
        job.token_ids, job.question = ids[:cut], tuple(ids[cut:].tolist())
        plan, job.keys = job.controller.planned(job.token_ids, job.options)
        job.context_id, job.context_tokens = plan.context_id, plan.num_tokens

    def _ids(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or not len(ids):
            raise BadInput("no tokens were given; wanted at least one")
        if not np.issubdtype(ids.dtype, np.integer):
            raise BadInput(f"token ids of {ids.dtype}: wanted integers")
        if ids.min() < 0 or ids.max() >= self.facts.vocab_size:
            raise BadInput(
                f"token ids {ids.min()} to {ids.max()}: {self.facts.name} has 0 to "
                f"{self.facts.vocab_size - 1}"
            )
        return np.ascontiguousarray(ids, dtype=np.int32)

    def _controller(self, tenant: str) -> Controller:
        space = self._namespace(tenant)
        with self._engine.lock:
            if space not in self._controllers:
                assert space is not None
                self._controllers[space] = self._first.beside(space)
            return self._controllers[space]

    def _namespace(self, tenant: str) -> bytes | None:
        space = None if self._namespace_of is None else self._namespace_of(tenant)
        return None if space == PUBLIC_NAMESPACE else space

    def _again(self, tenant: str, key: str, digest: bytes, listener: Listener) -> Ticket | None:
        """What an idempotency key stands for."""
        with self._engine.lock:
            job = self._by_key.get((tenant, key)) if key else None
            if job is None or job.error is not None or job.unwanted:
                return None
            if job.digest != digest:
                raise BadInput(
                    f"idempotency key {key!r} stands for another request ({job.request_id}): take "
                    "a new key"
                )
            self._engine.commands.append(lambda: self._listen(job, listener))
            self._wake.set()
            return Ticket(job, listener, self._wake.set)

    def _listen(self, job: Job, listener: Listener) -> None:
        if job.state.ended:
            listener(job.last_events())
        else:
            job.listeners = [*job.listeners, listener]

    def _admit(self, job: Job, listener: Listener, key: str) -> Ticket:
        with self._engine.lock:
            if self._closing:
                raise Overloaded("the service is closing", retry_after_s=self.limits.retry_after_s)
            if (ticket := self._again(job.tenant, key, job.digest, listener)) is not None:
                return ticket  # it came at the same instant
            self._forget_old()
            going = [one for one in self._jobs.values() if not one.state.ended]
            self._admission.check(job, going, self._engine.tokens_per_s)
            job.listeners = [listener]
            self._jobs[job.request_id] = job
            if key:
                self._by_key[job.tenant, key] = job
            self._engine.waiting.add(job)
        self._wake.set()
        return Ticket(job, listener, self._wake.set)

    def _forget_old(self) -> None:
        limit = time.monotonic() - self.limits.kept_s
        for name, job in list(self._jobs.items()):
            if job.state.ended and job.ended_s < limit:
                del self._jobs[name]
        self._by_key = {k: job for k, job in self._by_key.items() if job.request_id in self._jobs}

    # looking

    def view(self, request_id: str, tenant: str = "") -> JobView:
        """UnknownName, for another tenant's too."""
        job = self._jobs.get(request_id)
        if job is None or job.tenant != tenant:
            raise UnknownName("request", request_id, ())
        return job.view(self._place(job))

    def views(self) -> list[JobView]:
        """All that are known, the newest first."""
        with self._engine.lock:
            jobs = list(self._jobs.values())
        return [job.view(self._place(job)) for job in reversed(jobs)]

    def _place(self, job: Job) -> int:
        order = self._engine.waiting.order()
        return next((at for at, one in enumerate(order) if one is job), 0)

    def _look(self) -> None:
        """Into the gauges, what is there now."""
        engine = self._engine
        with engine.lock:
            waiting = Counter(str(job.priority) for job in list(engine.waiting.jobs))
            held = Counter(p.plain for p in list(engine.held.places) if p.handle.num_tokens)
        self.metrics.queue(waiting)
        kinds = {"plain": held[True], "named": held[False]}
        self.metrics.holding(len(engine.answering.jobs), len(engine.sessions), kinds)

    def contexts(self, tenant: str = "") -> list[ContextView]:
        """That the tenant can ask, and those on their way; the newest first."""
        controller = self._controller(tenant)
        space = self._namespace(tenant) or PUBLIC_NAMESPACE
        with self._engine.lock:
            jobs = [one for one in self._jobs.values() if not one.state.ended]
        stored = self._stored.views(controller, space, namespace_digest(space))
        return context_views(controller, self._engine.held, stored, jobs, self._first.gang.ready)

    def context(self, context_id: str, tenant: str = "") -> ContextView:
        """UnknownName, for another tenant's too."""
        for view in self.contexts(tenant):
            if view.context_id == context_id:
                return view
        raise UnknownName("context", context_id, ())

    def delete_context(self, context_id: str, tenant: str = "") -> None:
        """From the gang and the store; one that is prefilled is cancelled. InUse while an answer
        reads it. Blocks until the gap between two chunks."""
        self.context(context_id, tenant)
        controller = self._controller(tenant)
        self._call(lambda: self._delete(controller, context_id))

    def _delete(self, controller: Controller, name: str) -> None:
        engine = self._engine
        for job in list(self._jobs.values()):
            if job.context_id == name and job.controller is controller and not job.is_answer:
                job.cancel = True
        for place in engine.held.of(controller):
            if place.handle.context_id == name:
                engine.held.drop(place)
        if controller.store is not None and name in controller.store.ids():
            controller.store.remove(name)

    def verify_context(self, context_id: str, tenant: str = "") -> dict[str, Any]:
        """Every stored page is read and checked: what `Store.verify` found. Blocks as long."""
        view, store = self.context(context_id, tenant), self._first.store
        if store is None or not view.stored:
            raise BadInput(f"context {context_id} is not in a store: there is nothing to verify")
        report = store.verify(context_id)
        found = asdict(report) if is_dataclass(report) else msgspec.to_builtins(report)
        return dict(msgspec.to_builtins({**found, "ok": not report.problems}))

    def _call(self, act: Callable[[], T]) -> T:
        """On the service's thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(act())
            except Exception as error:
                future.set_exception(error)

        self._engine.commands.append(run)
        self._wake.set()
        return future.result(COMMAND_TIMEOUT_S)

    # the thread

    def _run(self) -> None:
        engine = self._engine
        while not self._closed.is_set():
            if engine.idle:
                self._wake.wait(1.0)
                self._wake.clear()
                if self._closed.is_set():
                    return
            # without jobs too: a turn ends sessions of clients long gone and mends the gang
            if not engine.turn():
                self._wake.wait(IDLE_S)
                self._wake.clear()

    def _flush(self, jobs: Sequence[Job]) -> None:
        flush(jobs, self._tell)

    def _tell(self, news: list[tuple[Job, list[Event]]]) -> None:
        if self._together is not None:
            self._together([(tuple(job.listeners), events) for job, events in news])
            return
        for job, events in news:
            for listener in job.listeners:
                listener(events)

    def drain(self, timeout_s: float) -> bool:
        """Nothing new is taken; True once all that was taken has ended, False after the time."""
        self._closing = True
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if all(job.state.ended for job in list(self._jobs.values())):
                return True
            time.sleep(IDLE_S)
        return False

    def close(self) -> None:
        """All that still runs is cancelled. The controller and its gang stay the caller's. May be
        repeated."""
        self._closing = True
        for job in list(self._jobs.values()):
            job.cancel = job.cancel or not job.state.ended
        self._wake.set()
        self.drain(30.0)
        self._closed.set()
        self._wake.set()
        self._thread.join(30.0)
        if self._thread.is_alive():
            raise RingspanError("the service's thread did not end: the gang does not answer")


def _digest(*asked: object) -> bytes:
    return hashlib.blake2b(repr(asked).encode(), digest_size=16).digest()


def _check(sampling: Sampling) -> None:
    """BadInput for what cannot be drawn."""
    if sampling.max_tokens < 1:
        raise BadInput(f"max_tokens {sampling.max_tokens}: wanted at least 1")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise BadInput(
            f"min_tokens {sampling.min_tokens}: wanted 0 to max_tokens {sampling.max_tokens}"
        )
    if not sampling.temperature >= 0:
        raise BadInput(f"temperature {sampling.temperature}: wanted 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise BadInput(f"top_p {sampling.top_p}: wanted more than 0, at most 1")
    if not 0 <= sampling.logprobs <= MOST_LOGPROBS:
        raise BadInput(f"logprobs {sampling.logprobs}: wanted 0 to {MOST_LOGPROBS}")
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise BadInput(f"seed {sampling.seed}: wanted a number of 64 bits")
