"""200 seeded random schedules of faults over real gangs, not over a model of them.

Real are the ranks (threads of this process, each with the model and its pages), the placement, the
controllers, the hand-offs over gloo with their threads, and the mending. Only the clock that
placement reads is a fake one. Ranks are lost in calls that the schedule names, whole gangs end,
contexts are dropped, tokens are asked for under limits of all kinds. Every answer is compared with
that of one undisturbed rank, and afterwards nothing may be held that nobody has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.gangs_placed import Gangs
from ringspan.cluster.gangs_types import Answered, Ask, GangPlace, NotNow
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.placing_types import Rules
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.cluster.simulate_runs import costs_of
from ringspan.errors import RankLost

SCHEDULES, BLOCKS, FAST = 200, 10, 2
SIZES = (2, 1)
"""Ranks of the gangs; each may prefill and decode."""
MODEL = ModelSpec(name="random:tiny", seed=3)
CHUNK, LENGTHS = 128, (128, 200, 256)
TOKEN_BYTES = 4096
QUESTION = (7, 31)
CALLS = (
    "begin_prefill", "prefill_chunk", "prefill_chunk", "prefill_chunk", "resume_prefill",
    "offer_handoff", "host_handoff", "begin_receiving", "begin_sending", "end_sending",
    "end_receiving", "install_handoff", "generate", "drop", "end_session",
)  # fmt: skip
RULES = (
    Rules(),
    Rules(decode="in place"),
    Rules(decode="remote", sizes=(1, 2)),
    Rules(decode="remote", sizes=(1, 2), soonest=True),
)
CONTEXTS = tuple(
    np.random.default_rng(k).integers(0, 256, size=length, dtype=np.int32)
    for k, length in enumerate(LENGTHS)
)


@dataclass
class Death:
    """Rank `rank` of the gang of `size` is lost in its `nth` call of `method`: before it did
    anything, or once all is done but said."""

    size: int
    rank: int
    method: str
    nth: int
    after: bool
    struck: bool = False


@dataclass
class Tally:
    """What the schedules came to, so that they are known to have tried something."""

    answered: int = 0
    given_up: int = 0
    deaths: int = 0
    handed: int = 0
    not_handed: int = 0
    again: int = 0
    clock_s: float = 0.0
    gangs_made: int = 0
    deaths_in: set[str] = field(default_factory=set)


class Mortal(Rank):
    deaths: ClassVar[list[Death]] = []

    def __init__(self, rank: int, spec: GangSpec) -> None:
        super().__init__(rank, spec)
        self.at = spec.world_size, rank

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not any(d.method == name and not d.struck for d in Mortal.deaths):
            return found

        def mortal(*args: Any) -> Any:
            here = [d for d in Mortal.deaths if (d.size, d.rank) == self.at and not d.struck]
            due = [d for d in here if d.method == name]
            for death in due:
                death.nth -= 1
            strikes = [death for death in due if death.nth < 0]
            if any(not death.after for death in strikes):
                self._die(strikes)
            result = found(*args)
            if strikes:
                self._die(strikes)
            return result

        return mortal

    def _die(self, strikes: list[Death]) -> None:
        for death in strikes:
            death.struck = True
        super().__getattribute__("handoffs").clear()  # its connections end, as a process's do
        raise ConnectionAbortedError("killed on purpose")


def start(size: int, tally: Tally | None = None) -> LocalGang:
    spec = GangSpec(
        world_size=size, model=MODEL, device="cpu", threads=1, timeout_s=10.0, measure=False
    )
    if tally is not None:
        tally.gangs_made += 1
    return LocalGang(spec, rank_class=Mortal).start()


@pytest.fixture(scope="module")
def expected() -> Iterator[list[tuple[int, ...]]]:
    """What one rank answers that is never disturbed."""
    controller = Controller(start(1))
    said = []
    for tokens in CONTEXTS:
        name = controller.prefill(tokens).context_id
        session = controller.begin_session(name)
        answer = controller.ask(session, name, QUESTION, max_tokens=2)
        said.append(tuple(token.token_id for token in answer))
    yield said
    controller.close()


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.fixture(scope="module")
def gangs(tally: Tally) -> Iterator[Gangs]:
    """The same ones through all schedules: what a fault leaves behind is met by the next."""
    first = start(1)
    costs = costs_of(first.ready[0].facts, "h200", 50.0, 8)
    first.close()
    places = [
        GangPlace(f"n{at}", lambda size=size: start(size, tally), size)  # type: ignore[misc]
        for at, size in enumerate(SIZES)
    ]
    options = PrefillOptions(chunk_tokens=CHUNK, audit_rows=0)
    room = 700.0 * TOKEN_BYTES
    gangs = Gangs(
        places, costs, room, options=options, clock=lambda: tally.clock_s, handoff_silence_s=2.0
    )
    yield gangs
    gangs.close()


def drawn(rng: np.random.Generator) -> list[Death]:
    deaths = []
    for _ in range(rng.integers(0, 3)):
        size = int(rng.choice(SIZES))
        rank, nth = int(rng.integers(size)), int(rng.integers(2))
        deaths.append(Death(size, rank, str(rng.choice(CALLS)), nth, bool(rng.integers(2))))
    return deaths


def run(seed: int, gangs: Gangs, tally: Tally) -> list[tuple[int, Answered]]:
    """One schedule; every request ends, by an answer or by a word on why there is none."""
    rng = np.random.default_rng(1000 + seed)
    Mortal.deaths = []
    for member in gangs.members:
        for handle in member.controller.contexts if rng.random() < 0.6 else ():
            assert gangs.drop(member.number, handle.context_id)
    gangs.ledger.rules = RULES[rng.integers(len(RULES))]._replace(preempts=False)
    Mortal.deaths = drawn(rng)
    if rng.random() < 0.03:
        gangs.members[rng.integers(len(SIZES))].gang.close()
    answers = []
    for which in rng.permutation(len(CONTEXTS))[: 1 + int(rng.random() < 0.3)]:
        tally.clock_s += float(rng.exponential(2.0))
        ask = Ask(CONTEXTS[which], QUESTION, max_tokens=2, tpot_s=float(rng.choice([0.01, 1.0])))
        try:
            answers.append((int(which), gangs.answer(ask)))
        except (RankLost, NotNow):
            tally.given_up += 1
    struck = [death for death in Mortal.deaths if death.struck]
    tally.deaths += len(struck)
    tally.deaths_in |= {death.method for death in struck}
    Mortal.deaths = []
    return answers


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=[pytest.mark.slow] * (block >= FAST)) for block in range(BLOCKS)],
)
def test_no_schedule_of_faults_makes_a_wrong_answer_or_none(
    block: int, gangs: Gangs, expected: list[tuple[int, ...]], tally: Tally
) -> None:
    for seed in range(block * SCHEDULES // BLOCKS, (block + 1) * SCHEDULES // BLOCKS):
        for which, answered in run(seed, gangs, tally):
            assert answered.token_ids == expected[which], f"schedule {seed}"
            tally.answered += 1
            tally.again += answered.tries > 1
            tally.handed += answered.handed is not None
            sought = not answered.placed.decode.in_place
            tally.not_handed += sought and answered.prefill_gang == answered.decode_gang
        gangs.ledger.check()


def test_the_schedules_tried_what_they_are_meant_to(tally: Tally) -> None:
    """The block of all schedules above has run in the same session."""
    if tally.answered + tally.given_up < SCHEDULES:
        pytest.skip("not all schedules were run")
    assert tally.deaths > 40
    assert tally.given_up <= 4
    assert tally.handed > 20
    assert tally.not_handed > 2
    assert tally.again > 5
    assert tally.gangs_made > len(SIZES)
    assert {"prefill_chunk", "generate", "end_receiving", "end_sending"} <= tally.deaths_in
