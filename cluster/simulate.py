"""A cluster on a simulated clock: the placement of `placing.py`, carried out event by event.

What the controller does with a decision, in virtual time: commits the gang, pins the pages, lets a
prefill run chunk by chunk, pauses it at a boundary, hands its pages over, decodes, takes up after a
fault at the last sealed chunk. No thread and no clock of the machine: one seed, one result.

Simplified: a prefill takes what was predicted; a session's time per token is that of the load when
it began; while a prefill runs on a device its sessions stand still.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable

from ringspan.cluster.placing import place
from ringspan.cluster.placing_blocks import Block, Holding, Preemptible, Session
from ringspan.cluster.placing_costs import Costs
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Placed, Refused, Request, Rules
from ringspan.cluster.simulate_faults import Fault
from ringspan.cluster.simulate_losses import fail, place_anew, verify
from ringspan.cluster.simulate_score import Outcome, Score
from ringspan.cluster.simulate_work import Decoding, Prefill


class Simulation:
    """`run` takes requests in order of arrival and gives the score."""

    def __init__(
        self,
        state: ClusterState,
        costs: Costs,
        rules: Rules,
        *,
        faults: Iterable[Fault] = (),
        resumes: bool = True,
        check: bool = False,
    ) -> None:
        """resumes: after a fault from the last sealed chunk, else from token 0. check: every event
        is followed by a look at all that must hold."""
        self.state, self.costs, self.rules = state, costs, rules
        self.score = Score()
        self.now_s = 0.0
        self.decisions_s: list[float] = []
        self.resumes, self._check = resumes, check
        self._events: list[tuple[float, int, Callable[..., None], object]] = []
        self._count = 0
        self.committed: list[dict[int, Prefill]] = [{} for _ in state.devices]
        self.on_device: list[Prefill | None] = [None] * len(state.devices)
        self.decoding: dict[int, Decoding] = {}
        self.down: set[int] = set()
        self._known: dict[str, int] = {}
        self.faults = iter(faults)

    def run(self, requests: Iterable[Request]) -> Score:
        self.next_fault()
        for request in requests:
            self._until(request.arrival_s)
            self.now_s = request.arrival_s
            self.arrive(request, self.score.new(request))
        self.faults = iter(())
        self._until(float("inf"))
        self.score.ends(self.now_s)
        return self.score

    def _until(self, limit_s: float) -> None:
        events = self._events
        while events and events[0][0] <= limit_s:
            self.now_s, _, act, what = heapq.heappop(events)
            act(what)
            if self._check:
                verify(self)

    def at(self, when_s: float, act: Callable[..., None], what: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, act, what))

    def arrive(self, request: Request, outcome: Outcome) -> None:
        began = time.thread_time()
        decision = place(request, self.state, self.costs, self.now_s, self.rules)
        self.decisions_s.append(time.thread_time() - began)
        match decision:
            case Refused():
                self.score.refused(outcome, decision.reason, self.now_s)
            case Placed():
                self._commit(decision, outcome)

    def _commit(self, placed: Placed, outcome: Outcome) -> None:
        request, chosen, decode = placed.request, placed.chosen, placed.decode
        block, state = chosen.block, self.state
        prefill = Prefill(request, chosen, decode, outcome, chosen.start_s, chosen.end_s, [], None)
        if chosen.holding is not None:
            state.pin(chosen.holding)
        prefill.pages = self._hold(request, block, chosen.holding, chosen.end_s)
        if placed.preempts is not None:
            self._pause(placed.preempts, chosen.start_s, chosen.end_s - chosen.start_s)
        for number in block.devices:
            committed = self.committed[number]
            for other in committed.values():
                if placed.preempts is None:
                    state.running.pop(other.request.request_id, None)
                    if prefill not in other.behind:
                        other.behind.append(prefill)
            committed[request.request_id] = prefill
        if block.sessions:
            state.hold_up(block, prefill.end_s - prefill.start_s)
        state.commit(block, prefill.end_s)
        outcome.moved_bytes += chosen.moved_bytes + decode.moved_bytes
        outcome.ranks = block.size
        if not decode.in_place:
            prefill.sent = self._hold(request, decode.block, decode.holding, chosen.end_s)
        if request.output_tokens > 1:
            prefill.kept = self.session(request, decode.step_s, decode.block)
            state.join(decode.block, request.request_id, prefill.kept)
        self.at(prefill.start_s, self._start, prefill)

    def _hold(
        self, request: Request, block: Block, holding: Holding | None, ready_s: float
    ) -> list[Holding]:
        """Memory for a request's pages on a block: those others may use, and its own."""
        state, costs = self.state, self.costs
        taken: list[Holding] = []
        shared = request.tokens if request.keeps else request.prefix_tokens
        there = 0
        here = holding is not None and holding.block is block and not holding.on_host
        if holding is not None and here and not request.keeps:
            state.pin(holding)
            taken.append(holding)
            there = min(holding.tokens, request.prefix_tokens)
        own = request.tokens + request.output_tokens - there
        if request.prefix_id and shared > there:
            kept = Holding(
                request.prefix_id, shared, block, costs.kv_bytes(shared - there) / block.size,
                ready_s, 1,
            )  # fmt: skip
            self._take(kept)
            taken.append(kept)
            own -= shared - there
        mine = Holding(f"#{request.request_id}", own, block, costs.kv_bytes(own) / block.size,
                       ready_s, 1)  # fmt: skip
        self._take(mine)
        taken.append(mine)
        return taken

    def _take(self, holding: Holding) -> None:
        for dropped in self.state.hold(holding):
            if dropped.prefix_id and dropped.ready_s <= self.now_s:
                copy = Holding(
                    dropped.prefix_id, dropped.tokens, dropped.block, dropped.bytes_per_device,
                    dropped.ready_s,
                )  # fmt: skip
                self.state.hold_on_host(copy)

    def give_back(self, pages: list[Holding], *, whole: bool = True) -> None:
        """A request's own pages go, shared ones stay for others; none of them if they never became
        whole."""
        for holding in pages:
            self.state.unpin(holding)
            if not holding.users and (holding.prefix_id[:1] == "#" or not whole):
                self.state.drop(holding)

    def _replace_shorter(self, prefill: Prefill) -> None:
        """A conversation's pages up to its last turn are also in those of this turn, on the same
        gang."""
        old = prefill.chosen.holding
        if (
            prefill.request.keeps
            and old is not None
            and not (old.users or old.lost or old.on_host)
            and any(new is not old and new.block is old.block and new.prefix_id == old.prefix_id
                    for new in prefill.pages)
        ):  # fmt: skip
            self.state.drop(old)

    def _start(self, prefill: Prefill) -> None:
        if prefill.over or prefill.started:
            return
        if prefill.start_s > self.now_s:  # what runs before it was paused
            self.at(prefill.start_s, self._start, prefill)
            return
        holding = prefill.chosen.holding
        if holding is not None and (holding.lost or holding.ready_s > self.now_s + 1e-9):
            place_anew(self, prefill, None)
            return
        prefill.started = True
        block = prefill.chosen.block
        for number in block.devices:
            self.on_device[number] = prefill
        prefill.outcome.waited_s += self.now_s - prefill.request.arrival_s
        prefill.chunk_ends_s = self._chunk_ends(prefill)
        if len(prefill.chunk_ends_s) > 2 and not prefill.behind:
            spare = prefill.request.arrival_s + prefill.request.ttft_s - prefill.end_s
            self.state.running[prefill.request.request_id] = Preemptible(
                prefill.request.request_id, block, prefill.request.priority,
                tuple(prefill.chunk_ends_s), spare,
            )  # fmt: skip
        self.at(prefill.end_s, self._finish, prefill)

    def _chunk_ends(self, prefill: Prefill) -> list[float]:
        """By how much of the work each chunk is."""
        chosen = prefill.chosen
        todo, chunk = prefill.request.tokens - chosen.cached_tokens, chosen.cost.chunk_tokens
        if todo <= chunk:
            return [prefill.end_s]
        size, cached = chosen.block.size, chosen.cached_tokens
        spent = [
            self.costs.prefill(done, cached, size).seconds for done in range(chunk, todo, chunk)
        ]
        scale = (prefill.end_s - prefill.start_s) / chosen.cost.seconds
        return [
            *(min(prefill.start_s + scale * seconds, prefill.end_s) for seconds in spent),
            prefill.end_s,
        ]

    def _pause(self, key: int, start_s: float, seconds: float) -> None:
        """The prefill stops at a boundary for so long; those behind it start later."""
        victim = self.state.running[key]
        prefill = next(iter(self.committed[victim.block.first].values()))
        for other in self.committed[victim.block.first].values():
            if other.request.request_id == key:
                prefill = other
        ahead = bisect_right(prefill.chunk_ends_s, start_s)
        prefill.chunk_ends_s[ahead:] = [end + seconds for end in prefill.chunk_ends_s[ahead:]]
        victim.chunk_ends_s = tuple(prefill.chunk_ends_s)
        victim.spare_s -= seconds
        victim.paused_until_s = start_s + seconds
        self.score.preempted += 1
        self._delay(prefill, seconds)

    def _delay(self, prefill: Prefill, seconds: float) -> None:
        prefill.end_s += seconds
        for holding in (*prefill.pages, *prefill.sent):
            if holding.ready_s > self.now_s:
                holding.ready_s = max(holding.ready_s, prefill.end_s)
        self.state.extend(prefill.chosen.block, prefill.end_s)
        for other in prefill.behind:
            if not other.over and other.start_s < prefill.end_s:
                late = prefill.end_s - other.start_s
                other.start_s += late
                self._delay(other, late)

    def _finish(self, prefill: Prefill) -> None:
        if prefill.over:
            return
        if prefill.end_s > self.now_s:
            self.at(prefill.end_s, self._finish, prefill)
            return
        request, chosen, decode = prefill.request, prefill.chosen, prefill.decode
        if chosen.holding is not None and chosen.holding.lost:  # its pages did not all come
            place_anew(self, prefill, None)
            return
        self.end(prefill)
        self._replace_shorter(prefill)
        outcome = prefill.outcome
        self.score.computed_tokens += request.tokens - chosen.cached_tokens
        if request.prefix_id:
            known = min(self._known.get(request.prefix_id, 0), request.prefix_tokens)
            outcome.recomputed_tokens += max(0, known - chosen.cached_tokens)
            shared = request.tokens if request.keeps else request.prefix_tokens
            self._known[request.prefix_id] = max(shared, self._known.get(request.prefix_id, 0))
        self._stall(chosen.block, prefill.start_s)
        step = self.costs.step_s(decode.block.size, self.state.read_bytes(decode.block))
        first = self.now_s + decode.exposed_s + step
        if outcome.first_s is None:
            outcome.first_s = first
        outcome.device_s += chosen.block.size * (chosen.end_s - chosen.start_s)
        pages = prefill.pages
        if not decode.in_place:
            self.give_back(pages)
            pages = prefill.sent
        if prefill.kept is None:
            self.give_back(pages)
            self.score.done(outcome, first)
            return
        prefill.kept.spare_s += decode.step_s * request.output_tokens
        prefill.kept.spare_s -= step * request.output_tokens
        session = prefill.kept
        ends = first + (request.output_tokens - 1) * step
        one = Decoding(request, outcome, decode.block, session, self.now_s, ends, pages)
        self.decoding[request.request_id] = one
        self.at(ends, self._decoded, one)

    def end(self, prefill: Prefill) -> None:
        """A prefill leaves its devices, done or not."""
        prefill.over = True
        block = prefill.chosen.block
        for number in block.devices:
            self.committed[number].pop(prefill.request.request_id, None)
            if self.on_device[number] is prefill:
                self.on_device[number] = None
        if prefill.started and len(self.committed[block.first]):
            for number in block.devices:  # one that was paused goes on
                for other in self.committed[number].values():
                    if other.started:
                        self.on_device[number] = other
        self.state.running.pop(prefill.request.request_id, None)
        self.state.release(block)
        if prefill.chosen.holding is not None:
            self.state.unpin(prefill.chosen.holding)

    def _stall(self, block: Block, since_s: float) -> None:
        """Sessions on the block stood still."""
        if not block.sessions:
            return
        seen: set[int] = set()
        for number in block.devices:
            for key in self.state.devices[number].sessions:
                one = self.decoding.get(key)
                if one is None or key in seen:
                    continue
                seen.add(key)
                stood = self.now_s - max(since_s, one.began_s)
                if stood > 0:
                    one.ends_s += stood
                    if one.waits:
                        one.waits = False
                        self.at(one.ends_s, self._decoded, one)

    def _decoded(self, one: Decoding) -> None:
        if one.over:
            return
        if one.ends_s > self.now_s:
            self.at(one.ends_s, self._decoded, one)
            return
        if one.block.prefills and any(self.on_device[n] is not None for n in one.block.devices):
            one.waits = True
            return
        self.leave(one)
        self.give_back(one.pages)
        self.score.done(one.outcome, self.now_s)

    def leave(self, one: Decoding) -> None:
        one.over = True
        key = one.request.request_id
        del self.decoding[key]
        self.state.leave(one.block, key)
        one.outcome.device_s += (
            one.block.size
            * (self.now_s - one.began_s)
            / (1 + len(self.state.devices[one.block.first].sessions))
        )

    def next_fault(self) -> None:
        fault = next(self.faults, None)
        if fault is not None:
            self.at(max(fault.at_s, self.now_s), self._fail, fault)

    def _fail(self, fault: Fault) -> None:
        fail(self, fault)
        self.next_fault()

    def place_again(self, what: tuple[Request, Outcome]) -> None:
        self.arrive(*what)

    def session(self, request: Request, step_s: float, block: Block) -> Session:
        read = self.costs.kv_bytes(request.tokens) / block.size
        return Session(read, max(0.0, request.output_tokens * (request.tpot_s - step_s)))
