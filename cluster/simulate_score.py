"""What became of simulated requests, and the figures they give."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec

from ringspan.cluster.placing_types import Request


@dataclass(slots=True, eq=False)
class Outcome:
    """Of one request. It ends once: done, or refused."""

    request: Request
    first_s: float | None = None
    """When its first token came."""
    end_s: float | None = None
    reason: str = ""
    """Of a refusal."""
    waited_s: float = 0.0
    moved_bytes: float = 0.0
    recomputed_tokens: int = 0
    device_s: float = 0.0
    ranks: int = 0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run."""

    requests: int
    done: int
    refused: int
    good: int
    """Done within both limits."""
    late: int
    """Done with a first token behind its limit."""
    slow: int
    """Done over their limit per token."""
    goodput: float
    """Good requests a second of simulated time."""
    good_share: float
    ttft_s: tuple[float, float, float]
    """p50, p90, p99 of what was done."""
    tpot_s: tuple[float, float, float]
    """The same."""
    computed_tokens: int
    recomputed_tokens: int
    """Known before and computed again: cheaper than to fetch, dropped, or lost."""
    moved_bytes: float
    preempted: int
    faults: int
    ranks: dict[str, int]
    """Prefills by size of gang."""
    simulated_s: float


@dataclass
class Score:
    """Filled while a simulation runs."""

    requests: int = 0
    refusals: int = 0
    finished: int = 0
    good: int = 0
    late: int = 0
    slow: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    moved_bytes: float = 0.0
    preempted: int = 0
    faults: int = 0
    ended_s: float = 0.0
    last_arrival_s: float = 0.0
    ttfts: list[float] = field(default_factory=list)
    tpots: list[float] = field(default_factory=list)
    ranks: Counter[int] = field(default_factory=Counter)
    open: dict[int, Outcome] = field(default_factory=dict)
    """Requests that have not ended."""
    broken: list[str] = field(default_factory=list)
    """What must never be, and was."""

    def new(self, request: Request) -> Outcome:
        if request.request_id in self.open:
            self.broken.append(f"request {request.request_id} came twice")
        self.requests += 1
        self.last_arrival_s = request.arrival_s
        outcome = self.open[request.request_id] = Outcome(request)
        return outcome

    def refused(self, outcome: Outcome, reason: str, now_s: float) -> None:
        self.refusals += 1
        outcome.reason = reason
        self._end(outcome, now_s)

    def done(self, outcome: Outcome, now_s: float) -> None:
        request = outcome.request
        self.finished += 1
        self._end(outcome, now_s)
        if outcome.first_s is None:
            self.broken.append(f"request {request.request_id} ended without a first token")
            return
        ttft = outcome.first_s - request.arrival_s
        count = request.output_tokens - 1
        tpot = (now_s - outcome.first_s) / count if count > 0 else 0.0
        if ttft < 0 or tpot < 0:
            self.broken.append(f"request {request.request_id}: first token after {ttft:.3g} s")
        late, slow = ttft > request.ttft_s, tpot > request.tpot_s
        self.late += late
        self.slow += slow
        self.good += not (late or slow)
        self.ttfts.append(ttft)
        if count > 0:
            self.tpots.append(tpot)

    def ends(self, now_s: float) -> None:
        self.ended_s = now_s
        self.broken += [f"request {key} never ended" for key in self.open]

    def figures(self) -> Figures:
        """Goodput counts over the time in which requests came."""
        over = max(self.last_arrival_s, 1e-9)
        return Figures(
            requests=self.requests,
            done=self.finished,
            refused=self.refusals,
            good=self.good,
            late=self.late,
            slow=self.slow,
            goodput=self.good / over,
            good_share=self.good / max(self.requests, 1),
            ttft_s=_percentiles(self.ttfts),
            tpot_s=_percentiles(self.tpots),
            computed_tokens=self.computed_tokens,
            recomputed_tokens=self.recomputed_tokens,
            moved_bytes=self.moved_bytes,
            preempted=self.preempted,
            faults=self.faults,
            ranks={str(size): count for size, count in sorted(self.ranks.items())},
            simulated_s=self.ended_s,
        )

    def _end(self, outcome: Outcome, now_s: float) -> None:
        request_id = outcome.request.request_id
        if self.open.pop(request_id, None) is None:
            self.broken.append(f"request {request_id} ended twice")
        outcome.end_s = now_s
        self.recomputed_tokens += outcome.recomputed_tokens
        self.moved_bytes += outcome.moved_bytes
        if outcome.ranks:
            self.ranks[outcome.ranks] += 1


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    if not values:
        return 0.0, 0.0, 0.0
    ordered = sorted(values)
    last = len(ordered) - 1
    p50, p90, p99 = (ordered[round(share * last)] for share in (0.5, 0.9, 0.99))
    return p50, p90, p99
