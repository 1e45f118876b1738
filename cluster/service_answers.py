"""Continuous batching: answers that advance together, slice by slice, joined and left between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ringspan.cluster.batched import going_on, next_slice
from ringspan.cluster.gang import Gang
from ringspan.cluster.messages import TokenChunk
from ringspan.cluster.metrics import Metrics
from ringspan.cluster.service_jobs import Job
from ringspan.cluster.service_types import JobState, TokenEvent
from ringspan.errors import BadInput, RankLost, RingspanError, TooLarge

SLICE_S = 0.1
"""How long those who want to join or to leave wait for a step that lets them ..."""
MOST_STEPS = 32
"""... and the most steps of it."""


class Answering:
    """Of one gang; one thread. flush: tells the jobs' listeners what is new.

    make_room: frees some of the gang's memory; False if there is nothing to give up.
    """

    def __init__(
        self,
        gang: Gang,
        metrics: Metrics,
        flush: Callable[[Sequence[Job]], None],
        make_room: Callable[[], bool],
        ended: Callable[[Job], None],
    ) -> None:
        self._gang, self._metrics, self._flush = gang, metrics, flush
        self._make_room, self._ended = make_room, ended
        self._joining: list[Job] = []
        self._going: list[Job] = []
        self._step_s = 0.0
        self._over: list[Job] = []

    @property
    def jobs(self) -> list[Job]:
        return [*self._joining, *self._going]

    def join(self, job: Job) -> None:
        """Its context is on the gang, its session has begun."""
        self._joining.append(job)
        job.goes(JobState.answering)

    def clear(self) -> list[Job]:
        """After a rank was lost: who was there."""
        jobs, self._joining, self._going, self._over = self.jobs, [], [], []
        return jobs

    def drop(self, job: Job) -> None:
        """Its client left."""
        self._joining = [one for one in self._joining if one is not job]
        self._going = [one for one in self._going if one is not job]

    def slice(self) -> None:
        """First tokens of those that join; then a few of everybody. RankLost."""
        if joining := list(self._joining):
            self._advance(joining, 1)
            self._joining = [job for job in self._joining if job not in joining]
            self._going += [job for job in joining if job.state is JobState.answering]
        if self._going:
            steps = int(SLICE_S / self._step_s) if self._step_s else 1
            began = time.perf_counter()
            taken = self._advance(self._going, max(1, min(MOST_STEPS, steps)))
            if taken:
                step_s = (time.perf_counter() - began) / taken
                self._step_s = 0.5 * (self._step_s or step_s) + 0.5 * step_s
            self._going = [job for job in self._going if job.state is JobState.answering]
        self.tidy()

    def _advance(self, jobs: Sequence[Job], tokens: int) -> int:
        """Steps that were taken. What is wrong with one answer fails that one."""
        by_session = {job.session_id: job for job in jobs}
        taken = 0
        try:
            requests = [job.request for job in jobs if job.request is not None]
            for step in next_slice(self._gang, requests, tokens):
                taken += 1
                for chunk in step:
                    self._told(by_session[chunk.session_id], chunk)
                self._flush(jobs)
        except RankLost:
            raise
        except RingspanError as error:
            if isinstance(error, TooLarge) and not taken and self._make_room():
                return self._advance(jobs, tokens)
            left = [job for job in jobs if job.state is JobState.answering]
            if len(left) > 1 and not taken and isinstance(error, BadInput):
                half = len(left) // 2
                return max(self._advance(part, tokens) for part in (left[:half], left[half:]))
            for job in left:
                self._fail(job, error)
            self._flush(jobs)
        return taken

    def _told(self, job: Job, chunk: TokenChunk) -> None:
        assert job.request is not None
        if not job.told:
            job.request = going_on(job.request)
            job.first_s = time.monotonic()
        job.told += 1
        job.tell(
            TokenEvent(chunk.token_id, chunk.index, chunk.finish_reason, chunk.logprob, chunk.top)
        )
        if chunk.finish_reason is not None:
            self.close(job)
            job.end(JobState.done)
            self._ended(job)
            now = time.monotonic()
            self._metrics.answered(
                job.told,
                job.first_s - job.created_s,
                now - job.created_s,
                chunk.finish_reason,
            )

    def _fail(self, job: Job, error: Exception) -> None:
        self.close(job)
        job.end(JobState.failed, error)
        self._ended(job)

    def close(self, job: Job) -> None:
        """What the job held of the gang."""
        if job.reading is not None:
            job.reading.end()
            job.reading = None
        if job.session_id and not job.session_name:
            self._over.append(job)

    def tidy(self) -> None:
        """Sessions of answers that are over end on the ranks. RankLost."""
        while self._over and not self._gang.lost:
            job = self._over.pop()
            job.controller.end_session(job.session_id)
