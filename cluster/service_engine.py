"""What a service's one thread does: begins jobs, answers, and mends the gang.

    turn:  sweep the unwanted -> begin one job -> a slice of all answers

While a long prefill runs, the same turn is played in its interlude, between two chunks, for about
as long as a chunk takes: running answers and short work go on, its own pages stay.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from ringspan.cluster.batched import Question
from ringspan.cluster.controller import Controller
from ringspan.cluster.events import Cancelled, PauseEvent, PrefillPaused, PrefillProgress
from ringspan.cluster.metrics import Metrics
from ringspan.cluster.prefill_task import MEND_TIMEOUT_S
from ringspan.cluster.service_answers import Answering
from ringspan.cluster.service_held import Held
from ringspan.cluster.service_interlude import ServiceInterlude
from ringspan.cluster.service_jobs import Job, Work
from ringspan.cluster.service_queue import SHORT_TOKENS, Waiting
from ringspan.cluster.service_types import JobState, Limits, ProgressEvent
from ringspan.errors import BadInput, RankLost, RingspanError, TooLarge, UnknownName
from ringspan.kvstore.leases import InUse

T = TypeVar("T")
log = logging.getLogger(__name__)

IN_USE_S, MOST_REFUSED = 0.05, 600
"""Between two tries of a job whose context is being read in another form; so many of them."""
MOST_RETRIES = 1
"""Of a job that has given out no token when a rank is lost."""


class Engine:
    """Its methods are for one thread, but for `held`, `waiting` (under `lock`) and `commands`."""

    def __init__(
        self,
        controllers: Callable[[], Sequence[Controller]],
        first: Controller,
        limits: Limits,
        metrics: Metrics,
        flush: Callable[[Sequence[Job]], None],
    ) -> None:
        self._controllers, self._gang = controllers, first.gang
        self._limits, self._metrics, self._flush = limits, metrics, flush
        self.lock = threading.RLock()
        self.waiting = Waiting()
        self.commands: deque[Callable[[], None]] = deque()
        self._lost_s = -1.0
        """When a rank was lost last, or the gang was whole again after it."""
        self.held = Held(limits.max_plain_contexts, self._has_sessions)
        self.answering = Answering(
            self._gang, metrics, flush, lambda: self.held.give_up_one(), self._ended
        )
        self.works: list[Work] = []
        self.tokens_per_s = 0.0
        self.sessions: dict[tuple[str, str], tuple[str, str, float]] = {}
        """(tenant, the client's name) -> the controller's, its context, when it was used last."""

    # one turn

    @property
    def idle(self) -> bool:
        return not (len(self.waiting) or self.answering.jobs or self.commands)

    def turn(self) -> bool:
        """Whatever is to be done next; False if there was nothing that could be."""
        job = None
        try:
            if self._gang.lost:
                self._mend()
            self.sweep()
            job = self.next(None)
            if job is not None:
                self.begin(job, None)
            self.answering.slice()
            self._end_sessions()
        except RankLost as error:
            self._lost(error)
            return True
        except Exception as error:
            log.exception("a turn of the service failed; its jobs are failed, it goes on")
            self._fail_all(error)
            return True
        return job is not None or bool(self.answering.jobs)

    def sweep(self) -> None:
        """Commands, and jobs that nobody wants any more."""
        while self.commands:
            self.commands.popleft()()
        for job in self.waiting.jobs:
            if job.unwanted:
                self._cancelled(job)
                continue
            for work in self.works:
                if work.key == job.work and not work.unwanted:
                    self._attach(job, work)
                    break
        for job in self.answering.jobs:
            if job.unwanted:
                self.answering.drop(job)
                self.answering.close(job)
                self._cancelled(job)
        self.answering.tidy()

    def _attach(self, job: Job, work: Work) -> None:
        self._take(job)
        work.waiters.append(job)
        job.goes(JobState.paused if work.paused else JobState.prefilling)
        self._flush([job])

    def next(self, outer: Work | None) -> Job | None:
        """The job to begin now; None if there is none that may."""
        now = time.monotonic()
        full = len(self.answering.jobs) >= self._limits.max_running
        for job in self.waiting.jobs:
            if job.cost < 0:
                self._look_at(job)
        for job in self.waiting.order():
            if job.not_before_s > now or (full and job.is_answer):
                continue
            if outer is None or job.cost <= self._short_tokens(outer):
                return job
        return None

    def _short_tokens(self, outer: Work) -> float:
        """What a long prefill lets in: no more than it does itself in a chunk's time."""
        return max(SHORT_TOKENS, outer.tokens_per_s * outer.chunk_s)

    def _look_at(self, job: Job) -> None:
        """How much there is to compute for it."""
        if job.keys:
            try:
                plan, _ = job.controller.planned(job.token_ids, job.options)
                known = job.controller.known_tokens(plan, job.keys, job.options, job.save)
                job.cost = job.num_tokens - known
            except RingspanError:
                job.cost = job.num_tokens  # beginning it says what is wrong
        else:
            on_gang = self.held.has(job.controller, job.context_id)
            read = 0 if on_gang else job.context_tokens // 8  # read, not computed
            job.cost = len(job.question) + read

    # beginning

    def _take(self, job: Job) -> None:
        with self.lock:
            self.waiting.remove(job)

    def _wait_again(self, job: Job) -> None:
        job.goes(JobState.waiting)
        job.cost = -1
        with self.lock:
            self.waiting.add(job)
        self._flush([job])

    def begin(self, job: Job, outer: Work | None) -> None:
        """RankLost, with the job waiting again or failed."""
        self._take(job)
        try:
            if not job.is_answer:
                self._prefill(job, outer)
            elif self._context(job, outer):
                self._join(job)
        except InUse as error:
            job.refused += 1
            job.not_before_s = time.monotonic() + IN_USE_S
            if job.refused > MOST_REFUSED:
                self._failed(job, error)
            elif not job.state.ended:
                self._wait_again(job)
        except RankLost as error:
            if not job.state.ended and job not in self.waiting.jobs:
                self._retry(job, error)
            raise
        except Exception as error:
            if not job.state.ended:
                self._failed(job, self._gone(job, error))
        self._flush([job])

    def _gone(self, job: Job, error: Exception) -> Exception:
        """Of a context that was there when the job was taken, and went with a rank, why."""
        if not isinstance(error, UnknownName) or job.created_s > self._lost_s:
            return error
        return RankLost(
            f"context {job.context_id} went with a lost rank and no store has it: prefill it again"
        )

    def _context(self, job: Job, outer: Work | None) -> bool:
        """The job's context is on the gang; False: the job waits again, or has ended."""
        controller, name = job.controller, job.context_id
        if not self.held.has(controller, name):
            if job.plain:
                if not self._prefill(job, outer):
                    return False
            else:
                self._open(job)
        elif not job.cached_tokens:
            job.cached_tokens = job.context_tokens
        if not self.held.has(controller, name):  # the store had it
            self._open(job)
        return not job.unwanted or not self._cancelled(job)

    def _open(self, job: Job) -> None:
        handle = self._with_room(lambda: job.controller.open(job.context_id))
        self.held.opened(job.controller, handle)
        job.cached_tokens = job.context_tokens = handle.num_tokens

    def _join(self, job: Job) -> None:
        controller, name, asked = job.controller, job.context_id, job.sampling
        self.held.used(controller, name)
        key = job.tenant, job.session_name
        known = self.sessions.get(key) if job.session_name else None
        if known is not None and known[1] != name:
            raise BadInput(f"session {job.session_name!r} is on context {known[1]}, not on {name}")
        job.session_id = known[0] if known is not None else controller.begin_session(name)
        if any(one.session_id == job.session_id for one in self.answering.jobs):
            raise BadInput(f"session {job.session_name!r} is being answered; ask it afterwards")
        if job.session_name:
            self.sessions[key] = job.session_id, name, time.monotonic()
        job.reading = controller.reading([name])
        question = Question(
            job.session_id, name, job.question, asked.max_tokens, asked.temperature, asked.top_p,
            asked.seed, asked.stop_ids, asked.min_tokens, asked.logprobs,
        )  # fmt: skip
        job.request = controller.request(question)
        self.answering.join(job)

    def _with_room(self, act: Callable[[], T]) -> T:
        """Contexts that nobody needs leave the gang as long as memory is short."""
        while True:
            try:
                return act()
            except TooLarge:
                if not self.held.give_up_one():
                    raise

    # prefills

    def _prefill(self, job: Job, outer: Work | None) -> bool:
        """For the job and for all that come to wait on it; False if the job is not to go on."""
        work = Work([job], nested=outer is not None)
        self.works.append(work)
        job.goes(JobState.prefilling)
        self._flush([job])
        self.sweep()
        self._metrics.prefill_began()
        error: Exception | None = None
        try:
            done = self._with_room(
                lambda: job.controller.prefill(
                    job.token_ids,
                    job.options,
                    description=job.description,
                    on_event=lambda event: self._progressed(work, event),
                    on_pause=lambda event: self._paused(work, event),
                    cancelled=lambda: work.unwanted,
                    save=job.save,
                    interlude=None if work.nested else ServiceInterlude(self, work),
                )
            )
            self._metrics.prefill_ended(done)
            if not done.reused:
                self.held.prefilled(job.controller, done, plain=job.plain and not job.save,
                                    description=job.description, stored=done.saved)  # fmt: skip
            else:
                job.cached_tokens = job.context_tokens
        except Exception as why:
            error = why
            self._metrics.prefill_failed(job.context_id, why)
        finally:
            self.works.remove(work)
        for waiter in work.waiters:
            self._prefilled(waiter, job, error)
        self._flush(work.waiters)
        if isinstance(error, RankLost):
            raise error
        return error is None and not job.state.ended

    def _prefilled(self, waiter: Job, job: Job, error: Exception | None) -> None:
        if waiter.unwanted:
            self._cancelled(waiter)
        elif isinstance(error, RankLost):
            self._retry(waiter, error)
        elif isinstance(error, InUse) and waiter is job:
            pass  # `begin` lets it wait
        elif error is not None:
            self._failed(waiter, error)
        elif not waiter.is_answer:
            waiter.end(JobState.done)
        elif waiter is not job:
            waiter.cached_tokens = job.cached_tokens
            self._wait_again(waiter)

    def _progressed(self, work: Work, event: PrefillProgress) -> None:
        self._metrics.prefill_progress(event)
        work.chunk_s, work.tokens_per_s = event.chunk_s, event.tokens_per_s
        self.tokens_per_s = event.tokens_per_s
        for job in work.waiters:
            if job.progress is None:
                job.cached_tokens = event.span.start
            job.progress = event
            job.tell(ProgressEvent(job.view()))
        self._flush(work.waiters)

    def _paused(self, work: Work, event: PauseEvent) -> None:
        self._metrics.prefill_paused(event)
        if work.nested:
            raise RankLost(event.reason)  # the prefill around it mends the gang
        work.paused = isinstance(event, PrefillPaused)
        for job in work.waiters:
            job.goes(JobState.paused if work.paused else JobState.prefilling)
        self._flush(work.waiters)
        if work.paused:
            self.lose_answers(RankLost(event.reason))
        else:
            for controller in self._controllers():
                if controller is not work.waiters[0].controller:
                    controller.mended()
        self._lost_s = time.monotonic()

    # faults

    def _lost(self, error: RankLost) -> None:
        self.lose_answers(error)
        if self._gang.lost:
            self._mend()

    def lose_answers(self, error: RankLost) -> None:
        """No session outlives a rank: it had a part of each."""
        self._lost_s = time.monotonic()
        self.held.clear()
        self.sessions.clear()
        jobs = self.answering.clear()
        for job in jobs:
            if job.reading is not None:
                job.reading.end()
                job.reading = None
            self._retry(job, error)
        self._flush(jobs)

    def _retry(self, job: Job, error: RankLost) -> None:
        if job.told or job.retries >= MOST_RETRIES or job.session_name:
            given = f" after {job.told} tokens were given out" if job.told else ""
            self._failed(job, RankLost(f"{error}; the request was ended{given}: ask again"))
            return
        job.retries += 1
        job.session_id, job.request, job.progress, job.cached_tokens = "", None, None, 0
        self._wait_again(job)

    def _mend(self) -> None:
        """All ranks again, or every job fails with the reason."""
        try:
            self._gang.mend(MEND_TIMEOUT_S)
            for controller in self._controllers():
                controller.mended()
            self._lost_s = time.monotonic()  # those taken meanwhile were told it was there
        except RankLost as error:
            self._fail_all(RankLost(f"the gang could not be mended: {error}"))

    def _fail_all(self, error: Exception) -> None:
        jobs = [*self.waiting.jobs, *self.answering.clear()]
        for job in jobs:
            self._take(job)
            self._failed(job, error)
        self._flush(jobs)

    # endings

    def _has_sessions(self, controller: Controller, name: str) -> bool:
        """That clients may go on with."""
        known = any(context_id == name for _, context_id, _ in self.sessions.values())
        return known or any(
            job.context_id == name and job.controller is controller for job in self.answering.jobs
        )

    def _failed(self, job: Job, error: Exception) -> None:
        if job.reading is not None:
            self.answering.close(job)
        job.end(JobState.failed, error)
        self._ended(job)

    def _cancelled(self, job: Job) -> bool:
        self._take(job)
        if not job.state.ended:
            job.end(JobState.cancelled, Cancelled(f"request {job.request_id} was cancelled"))
            self._ended(job)
        self._flush([job])
        return True

    def _ended(self, job: Job) -> None:
        """Frees what only a running job needs."""
        job.token_ids, job.keys = job.token_ids[:0], ()

    def _end_sessions(self) -> None:
        """Of clients that were not heard for long."""
        limit = time.monotonic() - self._limits.kept_s
        busy = {job.session_id for job in self.answering.jobs}
        for key, (session_id, _, used_s) in list(self.sessions.items()):
            if used_s < limit and session_id not in busy:
                del self.sessions[key]
                for controller in self._controllers():
                    controller.end_session(session_id)
