"""Several real gangs behind one placement: decisions of `placing.py`, carried out.

    place -> take time and memory in the state -> prefix moved there -> prefill -> [hand-off] -> ask

A question goes to `Gangs.answer`, from as many threads as there are clients. The state is kept true
by the ledger (gangs_ledger.py); who works on a gang has its turn, and nobody who has one waits for
another's, unless all are taken in order of their numbers. Pages go to the gang that decodes while
the prefill runs, if that gang is free between two chunks, else behind it; what fails of a hand-off
is answered in place, by the gang that prefilled. A gang that loses ranks is mended, or begun anew,
or left alone; then the request is placed again, and what the store has of it is not computed twice.

Not carried out: pauses of a long prefill for a short one (`Rules.preempts` is off), copies on a
second node. Answers of one gang are given one after the other; `Service` is for many on one gang.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from ringspan.cluster.controller import Controller
from ringspan.cluster.gang import Gang
from ringspan.cluster.gangs_handing import HandsOver
from ringspan.cluster.gangs_ledger import Ledger
from ringspan.cluster.gangs_types import (
    Answered,
    Ask,
    GangPlace,
    LoggedLoss,
    Member,
    NotNow,
    Work,
    logged,
)
from ringspan.cluster.metrics import DecisionLog, Metrics
from ringspan.cluster.page_directory import PageDirectory
from ringspan.cluster.placing_blocks import Node
from ringspan.cluster.placing_costs import Costs
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Refused, Rules
from ringspan.cluster.planner import PrefillOptions
from ringspan.errors import BadInput, RankLost, RingspanError, TooLarge
from ringspan.kvstore.directory import Directory
from ringspan.kvstore.folder import Store
from ringspan.kvstore.handoff import JOIN_TIMEOUT_S
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, page_keys

MOST_TRIES = 3
"""Placements of a request whose gangs are lost one after the other."""
MEND_TIMEOUT_S = 600.0
"""For new ranks to find a place and load the weights."""


class Gangs:
    """`answer` places a question and carries the decision out."""

    def __init__(
        self,
        places: Sequence[GangPlace],
        costs: Costs,
        device_bytes: float,
        *,
        store: Store | None = None,
        directory: PageDirectory | None = None,
        namespace: bytes = PUBLIC_NAMESPACE,
        rules: Rules = Rules(),  # noqa: B008 - an immutable value
        options: PrefillOptions | None = None,
        log: DecisionLog | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        first_epoch: int = 0,
        handoff_silence_s: float = JOIN_TIMEOUT_S,
    ) -> None:
        """Starts a gang at every place. Raises BadInput for places that make no cluster, and what
        starting a gang does.

        device_bytes: of KV on each rank's device. options: of all prefills; chunks None: as placed.
        first_epoch: larger than any that the ranks have seen; 0: the time. handoff_silence_s: of a
        peer, before a hand-off is given up.
        """
        if not places:
            raise BadInput("no place for a gang was given: wanted at least one")
        if options is not None and options.codec != "raw":
            raise BadInput(
                f"codec {options.codec}: gangs behind one placement keep raw pages; leave it out"
            )
        self._store, self._namespace = store, namespace
        self._directory: PageDirectory = Directory() if directory is None else directory
        self._options = options or PrefillOptions()
        self._log, self._metrics = log, metrics
        nodes, order = _nodes(places)
        state = ClusterState(nodes, device_bytes)
        self.ledger = Ledger(state, costs, rules._replace(preempts=False), clock)
        epochs = itertools.count(first_epoch or time.time_ns() // 1_000_000)
        self._handing = HandsOver(
            self.ledger, namespace, epochs, self._write, metrics, handoff_silence_s
        )
        try:
            for block, at in zip(state.blocks, order, strict=True):
                gang = places[at].start()
                controller = self._controller(gang)
                self.ledger.members.append(Member(at, places[at], gang, controller, block))
                if gang.world_size != places[at].ranks:
                    raise BadInput(
                        f"gang {at} has {gang.world_size} ranks, its place {places[at].ranks}"
                    )
        except BaseException:
            self.close()
            raise
        self.ledger.members.sort(key=lambda member: member.number)
        self._fingerprint = self.members[0].gang.ready[0].facts.fingerprint

    @property
    def members(self) -> tuple[Member, ...]:
        """In the order of their places."""
        return tuple(self.ledger.members)

    def answer(self, ask: Ask) -> Answered:
        """Any thread may ask. TooLarge for what no gang has room for, `NotNow` for what cannot be
        placed for the moment, RankLost where gangs were lost time and again."""
        ask = _checked(ask)
        arrival_s = self.ledger.clock()
        keys = page_keys(
            self._fingerprint, self._namespace, ask.context, self.ledger.costs.page_tokens
        )
        name = context_id(keys)
        for tries in itertools.count(1):
            work = self._place(ask, name, keys, arrival_s)
            done = False
            try:
                answered = self._carry_out(work, tries)
                done = True
                return answered
            except RankLost:
                if tries == MOST_TRIES:
                    raise
            finally:
                self.ledger.ended(work, done)
        raise AssertionError("unreachable")

    def drop(self, number: int, name: str) -> bool:
        """Frees a context's memory on a gang; False while a request uses it there."""
        member = self.members[number]
        with self._turns(member):
            if not self.ledger.let_go(member, name):
                return False
            member.controller.drop(name)
        return True

    def regain(self, number: int) -> bool:
        """Tries again to have a gang that could neither be mended nor begun anew."""
        member = self.members[number]
        with member.turn:
            return self._whole(member)

    def close(self) -> None:
        """Ends all gangs. May be repeated."""
        for member in self.ledger.members:
            member.controller.close()

    # placing

    def _place(self, ask: Ask, name: str, keys: Sequence[str], arrival_s: float) -> Work:
        decision, work = self.ledger.decide(ask, name, keys, arrival_s)
        gang_of = {member.block.number: member.number for member in self.members}
        self._write("placement", name, logged(decision, gang_of))
        if work is not None:
            return work
        assert isinstance(decision, Refused)
        if decision.quoted_s is None:
            raise TooLarge(decision.reason)
        raise NotNow(decision.reason, decision.quoted_s)

    # carrying out

    def _carry_out(self, work: Work, tries: int) -> Answered:
        a, b = work.prefill, work.decode
        if not work.in_place:
            with self._turns(b):
                if self._handing.usable(b, work):  # nothing is to be computed or moved
                    self.ledger.prefilled(work)
                    return self._ask(work, b, tries)
        self._fetch_prefix(work)
        with self._turns(a):
            self._prefill(work)
            if work.in_place:
                return self._ask(work, a, tries)
        with self._turns(a, b, needed=a):
            self._prefill(work)  # it may have been lost in between
            self._handing.finish(work)
            if work.in_place:  # it was given up
                self._whole(b)
                self._whole(a)
                self._prefill(work)
                return self._ask(work, a, tries)
        with self._turns(b):
            if not self._handing.usable(b, work):
                raise RankLost(f"context {work.name} was lost with a rank of gang {b.number}")
            return self._ask(work, b, tries)

    def _fetch_prefix(self, work: Work) -> None:
        """Brings the pages that the context begins with from the gang that they were placed from;
        what cannot be had is read from the store or computed."""
        holding = work.placed.chosen.holding
        if holding is None or holding.on_host or holding.block is work.prefill.block:
            return
        owner = self.ledger.member_of(holding.block)
        with self._turns(owner, work.prefill, needed=work.prefill):
            self._handing.fetch(work, owner, holding.prefix_id)
            self._whole(owner)

    def _prefill(self, work: Work) -> None:
        """The gang has the context: as it is there already, or by reading or computing it."""
        member = work.prefill
        self._need(member)
        controller = member.controller
        if not self._handing.usable(member, work):
            if self._handing.held(member, work.name):
                controller.drop(work.name)  # in a worse form than this request takes
            chosen = work.placed.chosen
            options = self._options
            if options.chunk_tokens is None:
                whole = chosen.cost.chunk_tokens
                options = msgspec.structs.replace(options, chunk_tokens=whole)
            interlude = self._handing.between_chunks(work)
            done = controller.prefill(
                work.ask.context,
                options,
                on_event=lambda event: self.ledger.slower(work, event.left_s),
                on_pause=interlude.on_pause,
                save=self._store is not None,
                interlude=interlude,
            )
            if done.reused:
                controller.open(done.context_id)
        self.ledger.prefilled(work)

    def _ask(self, work: Work, member: Member, tries: int) -> Answered:
        ask, controller = work.ask, member.controller
        session = controller.begin_session(work.name)
        try:
            tokens = controller.ask(
                session,
                work.name,
                ask.question,
                max_tokens=ask.max_tokens,
                temperature=ask.temperature,
                top_p=ask.top_p,
                seed=ask.seed,
                stop_ids=ask.stop_ids,
            )
            answer = tuple(token.token_id for token in tokens)
        except RankLost:
            self._whole(member)
            raise
        finally:
            if not member.gang.lost:
                controller.end_session(session)
        return Answered(
            token_ids=answer,
            context_id=work.name,
            placed=work.placed,
            prefill_gang=work.prefill.number,
            decode_gang=member.number,
            handed=work.handed,
            tries=tries,
        )

    # gangs

    @contextmanager
    def _turns(self, *members: Member, needed: Member | None = None) -> Iterator[None]:
        """Alone with these gangs, taken in order of their numbers, which are whole and hold nothing
        that nobody wants. needed: only this one must be whole."""
        taken: list[Member] = []
        try:
            for member in sorted(members, key=lambda one: one.number):
                member.turn.acquire()
                taken.append(member)
            for member in taken:
                if needed is None or member is needed:
                    self._need(member)
                else:
                    self._whole(member)
            yield
        finally:
            for member in reversed(taken):
                member.turn.release()

    def _need(self, member: Member) -> None:
        if not self._whole(member):
            raise RankLost(f"gang {member.number} was lost and could not be begun anew")

    def _whole(self, member: Member) -> bool:
        """Mends a gang that lost ranks or begins it anew, and clears away what is left over; False
        where it cannot be had. Only in its turn."""
        for _ in range(2):
            try:
                if member.gang.lost or member.gone:
                    self._bring_back(member)
                self._handing.clear_away(member)
                held = [handle.context_id for handle in member.controller.contexts]
                for name in self.ledger.unwanted(member, held):
                    member.controller.drop(name)
                return True
            except RankLost as error:
                why = str(error)
        self.ledger.left(member)
        self._write("loss", f"gang {member.number}", _loss(member, (), "gone", why))
        return False

    def _bring_back(self, member: Member) -> None:
        ranks = tuple(range(member.gang.world_size))
        try:
            if member.gone:
                raise RankLost("it could not be begun anew before")
            mended = member.gang.mend(MEND_TIMEOUT_S)
            ranks, done, why = mended.replaced, "mended", "it lost ranks"
            member.controller.mended()
        except RankLost as error:
            done, why = ("regained" if member.gone else "begun anew"), str(error)
            member.controller.close()
            member.overdue.clear()
            try:
                member.gang = member.place.start()
            except RingspanError as failed:
                raise RankLost(f"gang {member.number} cannot be started: {failed}") from failed
            member.controller = self._controller(member.gang)
        self.ledger.lost(member, ranks) if not member.gone else self.ledger.came_back(member)
        self._write("loss", f"gang {member.number}", _loss(member, ranks, done, why))

    def _controller(self, gang: Gang) -> Controller:
        controller = Controller(
            gang, self._store, directory=self._directory, namespace=self._namespace
        )
        controller.mends_itself = True
        return controller

    def _write(self, kind: str, subject: str, decision: msgspec.Struct) -> None:
        if self._log is not None:
            self._log.write(kind, subject, decision)


def _loss(member: Member, ranks: tuple[int, ...], done: str, why: str) -> LoggedLoss:
    return LoggedLoss(gang=member.number, ranks=ranks, done=done, why=why)


def _nodes(places: Sequence[GangPlace]) -> tuple[list[Node], list[int]]:
    """Nodes in the order of their first gang; the places in the order of the state's blocks."""
    on: dict[str, list[int]] = {}
    for number, place in enumerate(places):
        on.setdefault(place.node_id, []).append(number)
    nodes = []
    for node_id, numbers in on.items():
        first = places[numbers[0]]
        for number in numbers:
            other = places[number]
            if (other.pool, other.rack) != (first.pool, first.rack):
                raise BadInput(
                    f"gangs {numbers[0]} and {number} are on node {node_id}, in pools"
                    f" {first.pool!r} and {other.pool!r}, racks {first.rack!r} and {other.rack!r}:"
                    " wanted one of each"
                )
        sizes = tuple(places[number].ranks for number in numbers)
        nodes.append(Node(node_id, sum(sizes), first.rack, first.pool, sizes))
    return nodes, [number for numbers in on.values() for number in numbers]


def _checked(ask: Ask) -> Ask:
    context = np.ascontiguousarray(ask.context, dtype=np.int32)
    if context.ndim != 1 or not len(context) or not ask.question or ask.max_tokens < 1:
        raise BadInput(
            f"a context of shape {context.shape}, a question of {len(ask.question)} tokens,"
            f" max_tokens {ask.max_tokens}: wanted at least one token of each"
        )
    return Ask(**{**ask.__dict__, "context": context})
