"""Keeps a `ClusterState` true while gangs work: what was decided, what is held, what was lost.

Every method takes the ledger's lock for as long as it looks or changes, never for as long as a gang
works. A context of n tokens is a holding of its own on each gang that has it; a context that begins
with all whole pages of another one finds it by the key of the last of them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from ringspan.cluster.gangs_types import Ask, Member, Work
from ringspan.cluster.placing import place
from ringspan.cluster.placing_blocks import Block, Holding, Session
from ringspan.cluster.placing_costs import Costs
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Decision, Placed, Refused, Request, Rules


class Ledger:
    def __init__(
        self,
        state: ClusterState,
        costs: Costs,
        rules: Rules,
        clock: Callable[[], float],
    ) -> None:
        self.state, self.costs, self.rules, self.clock = state, costs, rules, clock
        self.members: list[Member] = []
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._by_key: dict[str, tuple[str, int]] = {}
        """Context and its tokens up to there, by the key of its last page and last whole page."""
        self._known: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {}
        """Of each context that a gang holds: its tokens, which a hand-off begins with, and what
        `_by_key` has of it."""

    def decide(
        self, ask: Ask, name: str, keys: Sequence[str], arrival_s: float
    ) -> tuple[Decision, Work | None]:
        """Places the request, and takes the gangs' time and memory for it: the decision, and the
        work that it makes."""
        with self._lock:
            request = self._request(ask, keys, arrival_s)
            decision = place(request, self.state, self.costs, self.clock(), self.rules)
            if isinstance(decision, Refused):
                return decision, None
            return decision, self._take(decision, ask, name, keys)

    def _request(self, ask: Ask, keys: Sequence[str], arrival_s: float) -> Request:
        prefix_id, prefix_tokens = self._prefix(keys)
        tokens = len(ask.context) + len(ask.question)
        return Request(
            request_id=next(self._numbers),
            arrival_s=arrival_s,
            new_tokens=tokens - prefix_tokens,
            output_tokens=ask.max_tokens,
            ttft_s=ask.ttft_s,
            tpot_s=ask.tpot_s,
            prefix_id=prefix_id,
            prefix_tokens=prefix_tokens,
            # what is built on a context has all of its pages once more, but a question has not
            keeps=0 < prefix_tokens < len(ask.context),
            priority=ask.priority,
            lowest_bits=ask.lowest_bits,
            patience_s=ask.patience_s,
        )

    def _prefix(self, keys: Sequence[str]) -> tuple[str, int]:
        """The longest known context that the pages begin with: its id and tokens."""
        for key in reversed(keys):
            found = self._by_key.get(key)
            if found is not None and found[0] in self.state.holders:
                return found
        return "", 0

    def _take(self, placed: Placed, ask: Ask, name: str, keys: Sequence[str]) -> Work:
        chosen, decode, state = placed.chosen, placed.decode, self.state
        prefill = self.member_of(chosen.block)
        work = Work(
            placed.request.request_id, ask, name, placed, prefill, self.member_of(decode.block)
        )
        if chosen.holding is not None:
            state.pin(chosen.holding)
            work.pinned.append(chosen.holding)
        if chosen.block.sessions:
            state.hold_up(chosen.block, chosen.end_s - chosen.start_s)
        state.commit(chosen.block, chosen.end_s)
        self._remember(ask, name, keys)
        for member in dict.fromkeys((work.prefill, work.decode)):
            member.uses[name] += 1
            exact = member is work.prefill or decode.wire == "raw"
            self._hold(work, member, chosen.end_s, exact)
        self._join(work, work.decode)
        return work

    def _remember(self, ask: Ask, name: str, keys: Sequence[str]) -> None:
        tokens, page = len(ask.context), self.costs.page_tokens
        found = {keys[-1]: (name, tokens)}
        if tokens % page and len(keys) > 1:
            found[keys[-2]] = name, tokens // page * page
        self._by_key.update(found)
        self._known[name] = ask.context, tuple(found)

    def _hold(self, work: Work, member: Member, ready_s: float, exact: bool = True) -> None:
        """Memory for the context, unless it is there: others may use it if it is exact."""
        known = self.state.holders.get(work.name, ()) if exact else ()
        holding = next((one for one in known if one.block is member.block), None)
        if holding is not None:
            if holding not in work.pinned:
                self.state.pin(holding)
                work.pinned.append(holding)
            return
        name = work.name if exact else f"#{work.number} {work.name}"
        self._hold_as(name, len(work.ask.context), work, member, ready_s)

    def _hold_as(self, name: str, tokens: int, work: Work, member: Member, ready_s: float) -> None:
        size = member.block.size
        pages = -(-tokens // (self.costs.page_tokens * size))  # of the fullest rank
        each = self.costs.kv_bytes(pages * self.costs.page_tokens)
        holding = Holding(name, tokens, member.block, each, ready_s, 1)
        for dropped in self.state.hold(holding):
            self._forget(dropped.prefix_id)
        work.pinned.append(holding)

    def _join(self, work: Work, member: Member) -> None:
        """Its session will stand there; the tail's memory is taken."""
        ask, decode = work.ask, work.placed.decode
        tail = len(ask.question) + ask.max_tokens
        self._hold_as(f"#{work.number} tail", tail, work, member, self.clock())
        read = self.costs.kv_bytes(len(ask.context)) / member.block.size
        spare = max(0.0, ask.max_tokens * (ask.tpot_s - decode.step_s))
        self.state.join(member.block, work.number, Session(read, spare))
        work.joined = member

    # while it is carried out

    def slower(self, work: Work, left_s: float) -> None:
        """The prefill has so much before it."""
        with self._lock:
            if work.committed:
                self.state.extend(work.prefill.block, self.clock() + left_s)

    def prefilled(self, work: Work) -> None:
        """The gang has the context: from now on it is there."""
        with self._lock:
            if work.committed:
                self.state.release(work.prefill.block)
                work.committed = False
            for holding in work.pinned:
                holding.ready_s = min(holding.ready_s, self.clock())

    def stays(self, work: Work) -> None:
        """It is not handed over: the answer is to be made where the prefill was."""
        with self._lock:
            if work.joined is not None:
                self.state.leave(work.joined.block, work.number)
                work.joined = None
            for holding in [one for one in work.pinned if one.block is work.decode.block]:
                self._unpin(work, holding, whole=False)
            work.decode.uses[work.name] -= 1
            work.decode = work.prefill
            self._join(work, work.prefill)

    def ended(self, work: Work, done: bool) -> None:
        """Gives back all that the request has; its context stays for others if it was done."""
        with self._lock:
            if work.committed:
                self.state.release(work.prefill.block)
                work.committed = False
            if work.joined is not None:
                self.state.leave(work.joined.block, work.number)
                work.joined = None
            for holding in list(work.pinned):
                self._unpin(work, holding, whole=done)
            for member in dict.fromkeys((work.prefill, work.decode)):
                member.uses[work.name] -= 1

    def _unpin(self, work: Work, holding: Holding, *, whole: bool) -> None:
        work.pinned.remove(holding)
        self.state.unpin(holding)
        if holding.users or holding.lost:
            return
        own = holding.prefix_id.startswith("#")
        if own or (holding.prefix_id == work.name and not whole):
            self.state.drop(holding)
            self._forget(holding.prefix_id)

    # gangs

    def fetching(self, work: Work, name: str, tokens: int) -> Holding | None:
        """Memory on the prefilling gang for a prefix that comes from another; None for want of
        room."""
        with self._lock:
            pages = -(-tokens // (self.costs.page_tokens * work.prefill.block.size))
            each = self.costs.kv_bytes(pages * self.costs.page_tokens)
            if each > self.state.room(work.prefill.block):
                return None
            self._hold_as(name, tokens, work, work.prefill, self.clock())
            return work.pinned[-1]

    def not_fetched(self, work: Work, holding: Holding) -> None:
        with self._lock:
            self._unpin(work, holding, whole=True)
            if not holding.users and not holding.lost:
                self.state.drop(holding)

    def lost(self, member: Member, ranks: Sequence[int]) -> None:
        """They were replaced by empty ones: what they had a share of is on this gang no more."""
        with self._lock:
            for rank in ranks:
                for holding in self.state.lose(member.block.first + rank):
                    self._forget(holding.prefix_id)
                self.state.regain(member.block.first + rank)

    def held_again(self, work: Work, member: Member) -> None:
        """A context whose holding was lost with a rank is being put together again."""
        with self._lock:
            self._hold(work, member, work.placed.chosen.end_s)

    def left(self, member: Member) -> None:
        """The gang cannot be had any more."""
        with self._lock:
            if not member.gone:
                member.gone = True
                for number in member.block.devices:
                    for holding in self.state.lose(number):
                        self._forget(holding.prefix_id)

    def came_back(self, member: Member) -> None:
        with self._lock:
            if member.gone:
                member.gone = False
                for number in member.block.devices:
                    self.state.regain(number)

    def let_go(self, member: Member, name: str) -> bool:
        """Nobody finds the context on this gang any more; False while somebody uses it."""
        with self._lock:
            if member.uses[name]:
                return False
            for holding in list(self.state.holders.get(name, ())):
                if holding.block is member.block:
                    self.state.drop(holding)
            self._forget(name)
            return True

    def unwanted(self, member: Member, names: Sequence[str]) -> list[str]:
        """Of the contexts that the gang holds, those that no request uses and nobody would find."""
        with self._lock:
            found = []
            for name in names:
                known = self.state.holders.get(name, ())
                if not member.uses[name] and all(one.block is not member.block for one in known):
                    del member.uses[name]
                    found.append(name)
            return found

    def tokens_of(self, name: str) -> np.ndarray | None:
        with self._lock:
            return self._known[name][0] if name in self._known else None

    def member_of(self, block: Block) -> Member:
        return next(one for one in self.members if one.block is block)

    def check(self) -> None:
        """What must hold when nothing is under way; for tests."""
        with self._lock:
            for block in self.state.blocks:
                assert (block.prefills, block.sessions) == (0, 0), f"block {block.number} is busy"
            for number, device in enumerate(self.state.devices):
                assert abs(device.pinned_bytes) < 1, f"device {number} has pinned memory"
                assert not device.sessions, f"device {number} has sessions"
                held = sum(one.bytes_per_device for one in device.holdings.values())
                assert abs(held - device.cached_bytes) < 1, f"device {number}: {held} bytes held"
            for member in self.members:
                assert not +member.uses, f"gang {member.number} is in use: {member.uses}"

    def _forget(self, name: str) -> None:
        if name in self.state.holders or any(member.uses[name] for member in self.members):
            return
        for key in self._known.pop(name, (None, ()))[1]:
            if self._by_key.get(key, ("", 0))[0] == name:
                del self._by_key[key]
