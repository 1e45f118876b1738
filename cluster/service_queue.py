"""Who may wait, and who comes next: short work before long, oldest first, and nobody for ever."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from ringspan.cluster.service_jobs import Job
from ringspan.cluster.service_types import JobState, Limits, Overloaded, TenantLimits

AGE_S = 30.0
"""So long a wait makes long work count as short."""
SHORT_TOKENS = 1024
"""Work of fewer tokens counts as short, whatever the machine."""
MINUTE_S = 60.0


class Admission:
    """Says no with numbers. Its caller holds the service's lock."""

    def __init__(self, limits: Limits, of_tenant: Callable[[str], TenantLimits]) -> None:
        self._limits, self._of_tenant = limits, of_tenant
        self._spent: dict[str, deque[tuple[float, int]]] = {}
        """Of each tenant: when a request was taken, and its tokens."""

    def check(self, job: Job, jobs: Iterable[Job], tokens_per_s: float) -> None:
        """Overloaded. jobs: all that have not ended; tokens_per_s: of prefills, 0 unknown."""
        limits = self._limits
        jobs = list(jobs)
        waiting = [one for one in jobs if one.state is JobState.waiting]
        tokens = sum(one.given_tokens for one in waiting)
        wait_s = tokens / tokens_per_s if tokens_per_s else len(waiting) * limits.retry_after_s
        wait_s = max(limits.retry_after_s, wait_s)
        if len(waiting) >= limits.max_waiting:
            raise Overloaded(
                f"{len(waiting)} requests wait already, at most {limits.max_waiting} may: try "
                f"again in about {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        if waiting and tokens + job.given_tokens > limits.max_tokens_waiting:
            raise Overloaded(
                f"{tokens} tokens wait already and this request has {job.given_tokens}, at most "
                f"{limits.max_tokens_waiting} may wait: try again in about {wait_s:.0f} s",
                retry_after_s=wait_s,
            )
        if job.tenant:
            self._check_tenant(job, jobs, wait_s)

    def _check_tenant(self, job: Job, jobs: list[Job], wait_s: float) -> None:
        mine = self._of_tenant(job.tenant)
        running = sum(one.tenant == job.tenant for one in jobs)
        if mine.max_running and running >= mine.max_running:
            raise Overloaded(
                f"{running} requests of this tenant are under way, at most {mine.max_running} "
                f"may be: try again when one has ended",
                retry_after_s=wait_s,
                tenant=job.tenant,
            )
        now, want = time.monotonic(), _tokens(job)
        flying = sum(_tokens(one) for one in jobs if one.tenant == job.tenant)
        if mine.tokens_in_flight and flying and flying + want > mine.tokens_in_flight:
            raise Overloaded(
                f"{flying} tokens of this tenant are under way and this request has {want}, at "
                f"most {mine.tokens_in_flight} may be: try again when one has ended",
                retry_after_s=wait_s,
                tenant=job.tenant,
            )
        if not (mine.tokens_per_minute or mine.requests_per_minute):
            return
        spent = self._spent.setdefault(job.tenant, deque())
        while spent and spent[0][0] <= now - MINUTE_S:
            spent.popleft()
        if mine.requests_per_minute and len(spent) >= mine.requests_per_minute:
            free_s = spent[len(spent) - mine.requests_per_minute][0] + MINUTE_S - now
            free_s = max(self._limits.retry_after_s, free_s)
            raise Overloaded(
                f"{len(spent)} requests of this tenant came in the last minute, at most "
                f"{mine.requests_per_minute} may: try again in {free_s:.0f} s",
                retry_after_s=free_s,
                tenant=job.tenant,
            )
        used = sum(tokens for _, tokens in spent)
        if mine.tokens_per_minute and spent and used + want > mine.tokens_per_minute:
            free_s = next(
                at + MINUTE_S - now
                for index, (at, _) in enumerate(spent)
                if index + 1 == len(spent)
                or used - sum(t for _, t in list(spent)[: index + 1]) + want
                <= mine.tokens_per_minute
            )
            free_s = max(self._limits.retry_after_s, free_s)
            raise Overloaded(
                f"this tenant asked for {used} tokens in the last minute and now for {want}, at "
                f"most {mine.tokens_per_minute} a minute: try again in {free_s:.0f} s",
                retry_after_s=free_s,
                tenant=job.tenant,
            )
        spent.append((now, want))


def check_contexts(there: int, most: int, tenant: str) -> None:
    """Overloaded for one context more than the tenant may have."""
    if there >= most:
        raise Overloaded(
            f"this tenant has {there} contexts, at most {most} may be: delete one, then try again",
            retry_after_s=MINUTE_S,
            tenant=tenant,
        )


def _tokens(job: Job) -> int:
    """That a tenant is charged for: of the prompt, and the most that may be answered."""
    return job.given_tokens + (job.sampling.max_tokens if job.is_answer else 0)


class Waiting:
    """Jobs that were admitted and not begun. The service's thread takes from it."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs = [*self._jobs, job]

    def remove(self, job: Job) -> None:
        self._jobs = [one for one in self._jobs if one is not job]

    def order(self) -> list[Job]:
        """The next one first."""
        now = time.monotonic()

        def rank(job: Job) -> tuple[float, float]:
            age = (now - job.created_s) / AGE_S
            return (job.cost > SHORT_TOKENS) - age // 1 - job.priority, job.created_s

        return sorted(self._jobs, key=rank)
