"""Several real gangs behind one placement: what is decided is what is done, and answers are those
of a gang alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.gang import Gang
from ringspan.cluster.gangs_placed import Gangs
from ringspan.cluster.gangs_types import Ask, GangPlace, NotNow
from ringspan.cluster.handing import HandingOver
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.metrics import DecisionLog
from ringspan.cluster.placing_blocks import Node
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Rules
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.cluster.simulate_runs import costs_of
from ringspan.errors import BadInput, RankLost, TooLarge
from ringspan.kvstore.folder import Store
from ringspan.kvstore.handoff import StaleHandle

MODEL = ModelSpec(name="random:tiny", seed=3)
TOKENS = np.random.default_rng(5).integers(0, 256, size=1000, dtype=np.int32)
"""Seven pages of 128 and a short one."""
SHORT = TOKENS[:200] + 1
QUESTION = (7, 200, 31)
TOKEN_BYTES = 4096
"""Of KV: 4 layers, 2 heads of 64, K and V in fp32."""
ROOM = 4000 * TOKEN_BYTES
APART = Rules(prefill_pool="prefill", decode_pool="decode", decode="remote")


class Mortal(Rank):
    """Is lost in its `nth` call from now of a method that `dies` names, once."""

    dies: ClassVar[dict[tuple[int, int, str], int]] = {}
    """(ranks of the gang, rank, method) to nth."""

    def __init__(self, rank: int, spec: GangSpec) -> None:
        super().__init__(rank, spec)
        self.at = spec.world_size, rank

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name == "at" or not Mortal.dies or not callable(found):
            return found
        key = *self.at, name

        def mortal(*args: Any) -> Any:
            left = Mortal.dies.get(key)
            if left == 0:
                del Mortal.dies[key]
                super(Mortal, self).__getattribute__("handoffs").clear()  # as a process's end
                raise ConnectionAbortedError("killed on purpose")
            if left is not None:
                Mortal.dies[key] = left - 1
            return found(*args)

        return mortal


def start(ranks: int) -> LocalGang:
    spec = GangSpec(
        world_size=ranks, model=MODEL, device="cpu", threads=1, timeout_s=30.0, measure=False
    )
    return LocalGang(spec, rank_class=Mortal).start()


def places(apart: bool = False) -> list[GangPlace]:
    """A gang of two ranks and one of one, on one node or on two."""
    if apart:
        return [
            GangPlace("n0", lambda: start(2), 2, "prefill"),
            GangPlace("n1", lambda: start(1), 1, "decode"),
        ]
    return [GangPlace("n0", lambda: start(2), 2), GangPlace("n0", lambda: start(1), 1)]


@pytest.fixture(scope="module")
def alone() -> Iterator[Controller]:
    controller = Controller(start(1))
    yield controller
    controller.close()


@pytest.fixture(scope="module")
def expected(alone: Controller) -> Callable[[np.ndarray], tuple[int, ...]]:
    """What one rank answers that has nothing else to do."""

    def answer(tokens: np.ndarray) -> tuple[int, ...]:
        name = alone.prefill(tokens).context_id
        session = alone.begin_session(name)
        said = tuple(t.token_id for t in alone.ask(session, name, QUESTION, max_tokens=5))
        alone.end_session(session)
        return said

    return answer


def make(alone: Controller, apart: bool = False, room: float = ROOM, **more: Any) -> Gangs:
    Mortal.dies = {}
    costs = costs_of(alone.facts, "h200", 50.0, 8)
    more.setdefault("options", PrefillOptions(chunk_tokens=256))
    more.setdefault("handoff_silence_s", 3.0)
    return Gangs(places(apart), costs, room, rules=APART if apart else Rules(), **more)


@pytest.fixture
def apart(alone: Controller, tmp_path: Path) -> Iterator[Gangs]:
    gangs = make(alone, True, log=DecisionLog(tmp_path / "log"))
    yield gangs
    gangs.ledger.check()
    gangs.close()


def ask(tokens: np.ndarray, **more: Any) -> Ask:
    return Ask(tokens, QUESTION, max_tokens=5, **more)


def lines(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    read = [msgspec.json.decode(line) for line in (tmp_path / "log").read_bytes().splitlines()]
    return [line["decision"] for line in read if line["kind"] == kind]


def test_a_short_prompt_takes_one_rank_and_one_that_needs_two_takes_two(
    alone: Controller, expected: Callable[[np.ndarray], tuple[int, ...]]
) -> None:
    gangs = make(alone, room=700 * TOKEN_BYTES)
    try:
        short, long = gangs.answer(ask(SHORT)), gangs.answer(ask(TOKENS))
        assert (short.prefill_gang, short.decode_gang) == (1, 1)
        assert (long.prefill_gang, long.decode_gang) == (0, 0)
        assert (short.token_ids, long.token_ids) == (expected(SHORT), expected(TOKENS))
        again = gangs.answer(ask(TOKENS))
        assert again.placed.chosen.source == "in place"
        assert again.token_ids == long.token_ids
        more = np.concatenate([TOKENS, SHORT])
        grown = gangs.answer(ask(more[:1100]))  # for the old one there is no room beside it
        assert grown.token_ids == expected(more[:1100])
        with pytest.raises(TooLarge, match="a shorter prompt"):
            gangs.answer(ask(np.tile(TOKENS, 2)))
        with pytest.raises(NotNow, match="patience is 1e-09 s"):
            gangs.answer(ask(SHORT + 1, patience_s=1e-9))
        gangs.ledger.check()
    finally:
        gangs.close()


def test_pages_go_to_the_decoding_gang_while_the_prefill_runs(
    apart: Gangs, expected: Callable[[np.ndarray], tuple[int, ...]], tmp_path: Path
) -> None:
    first = apart.answer(ask(TOKENS))
    assert (first.prefill_gang, first.decode_gang) == (0, 1)
    assert first.handed is not None
    assert sum(moved.pages for moved in first.handed.receivers) == 8
    assert first.token_ids == expected(TOKENS)
    sender, receiver = apart.members
    with pytest.raises(StaleHandle, match="offer it under a newer one"):
        HandingOver.begin(
            sender.gang, receiver.gang, first.context_id, TOKENS, epoch=first.handed.epoch
        )
    assert apart.drop(0, first.context_id)  # the sender's copy; the answer needs it no more
    again = apart.answer(ask(TOKENS))
    assert (again.decode_gang, again.handed, again.token_ids) == (1, None, first.token_ids)
    assert sender.controller.contexts == ()
    other = apart.answer(ask(SHORT))
    assert other.handed is not None
    assert other.handed.epoch > first.handed.epoch
    (placement, *_), handoffs = lines(tmp_path, "placement"), lines(tmp_path, "handoff")
    assert (placement["chosen"]["ranks"], placement["decode_gang"]) == (2, 1)
    assert [line["outcome"] for line in handoffs] == ["begun", "done", "begun", "done"]


def test_a_context_is_built_upon_pages_that_come_from_the_gang_that_has_them(
    apart: Gangs, expected: Callable[[np.ndarray], tuple[int, ...]]
) -> None:
    name = apart.answer(ask(TOKENS[:512])).context_id
    apart.drop(0, name)
    longer = apart.answer(ask(TOKENS))
    assert (longer.placed.chosen.source, longer.placed.chosen.cached_tokens) == ("network", 512)
    assert longer.token_ids == expected(TOKENS)
    assert name in {handle.context_id for handle in apart.members[0].controller.contexts}


@pytest.mark.parametrize(
    "method",
    [
        "begin_receiving",
        "end_receiving",
        pytest.param("host_handoff", marks=pytest.mark.slow),
        pytest.param("install_handoff", marks=pytest.mark.slow),
    ],
)  # lost before any page came, it is mended and gets the whole behind the prefill
def test_a_receiver_that_dies_is_answered_for_by_the_gang_that_prefilled(
    apart: Gangs, expected: Callable[[np.ndarray], tuple[int, ...]], method: str, tmp_path: Path
) -> None:
    Mortal.dies = {(1, 0, method): 0}
    answered = apart.answer(ask(TOKENS))
    assert Mortal.dies == {}
    anew = method in ("host_handoff", "begin_receiving")
    assert (answered.decode_gang, answered.handed is not None) == (int(anew), anew)
    assert answered.token_ids == expected(TOKENS)
    assert any("rank 0" in line["outcome"] for line in lines(tmp_path, "handoff"))
    assert [line["done"] for line in lines(tmp_path, "loss")] == ["mended"]
    after = apart.answer(ask(SHORT))
    assert (after.decode_gang, after.token_ids) == (1, expected(SHORT))


@pytest.mark.parametrize(
    ("method", "nth"),
    [
        ("prefill_chunk", 3),
        ("end_sending", 0),
        pytest.param("prefill_chunk", 0, marks=pytest.mark.slow),
        pytest.param("begin_sending", 0, marks=pytest.mark.slow),
    ],
)
def test_a_sender_that_dies_begins_its_hand_off_anew_under_a_newer_epoch(
    apart: Gangs, expected: Callable[[np.ndarray], tuple[int, ...]], method: str, nth: int
) -> None:
    Mortal.dies = {(2, 1, method): nth}
    answered = apart.answer(ask(TOKENS))
    assert Mortal.dies == {}
    assert answered.token_ids == expected(TOKENS)
    assert answered.decode_gang == (0 if method == "end_sending" else 1)


def test_a_gang_that_cannot_be_mended_is_begun_anew_and_reads_from_the_store(
    alone: Controller, expected: Callable[[np.ndarray], tuple[int, ...]], tmp_path: Path
) -> None:
    gangs = make(alone, store=Store(tmp_path / "s"), log=DecisionLog(tmp_path / "log"))
    try:
        first = gangs.answer(ask(TOKENS))
        member = gangs.members[first.prefill_gang]
        member.gang.close()
        assert gangs.answer(ask(TOKENS)).token_ids == first.token_ids == expected(TOKENS)
        (loss,) = lines(tmp_path, "loss")
        assert (loss["gang"], loss["done"]) == (first.prefill_gang, "begun anew")
        chunk_work = [handle.open_s for handle in member.controller.contexts]
        assert all(chunk_work)  # opened, not computed
    finally:
        gangs.close()


def test_what_a_gang_that_is_gone_would_have_done_is_done_by_another(
    alone: Controller, expected: Callable[[np.ndarray], tuple[int, ...]]
) -> None:
    allowed = [True]

    def refuse() -> Gang:
        if not allowed[0]:
            raise RankLost("no machine is left")
        return start(1)

    costs = costs_of(alone.facts, "h200", 50.0, 8)
    two = [GangPlace("n0", lambda: start(2), 2), GangPlace("n1", refuse, 1)]
    gangs = Gangs(two, costs, ROOM)
    try:
        assert gangs.answer(ask(SHORT)).prefill_gang == 1
        allowed[0] = False
        gangs.members[1].gang.close()
        answered = gangs.answer(ask(SHORT))
        assert (answered.prefill_gang, answered.tries) == (0, 2)
        assert answered.token_ids == expected(SHORT)
        assert not gangs.regain(1)
        allowed[0] = True
        assert gangs.regain(1)
        assert gangs.answer(ask(SHORT + 3)).prefill_gang == 1
        gangs.ledger.check()
    finally:
        gangs.close()


def test_many_at_once_are_each_told_the_truth(
    alone: Controller, expected: Callable[[np.ndarray], tuple[int, ...]]
) -> None:
    contexts = [TOKENS[: 300 + 100 * k] for k in range(3)]
    wanted = [expected(tokens) for tokens in contexts]
    gangs = make(alone)
    try:
        with ThreadPoolExecutor(6) as pool:
            said = list(pool.map(lambda k: gangs.answer(ask(contexts[k % 3])), range(9)))
        assert [one.token_ids for one in said] == [wanted[k % 3] for k in range(9)]
        gangs.ledger.check()
    finally:
        gangs.close()


def test_bad_input_is_refused_in_a_line(alone: Controller, apart: Gangs) -> None:
    costs = costs_of(alone.facts, "h200", 50.0, 8)
    with pytest.raises(BadInput, match="wanted at least one token of each"):
        apart.answer(Ask(TOKENS[:0], QUESTION))
    with pytest.raises(BadInput, match="no place for a gang"):
        Gangs([], costs, ROOM)
    mixed = [GangPlace("n0", lambda: start(1), 1, "a"), GangPlace("n0", lambda: start(1), 1, "b")]
    with pytest.raises(BadInput, match="gangs 0 and 1 are on node n0, in pools 'a' and 'b'"):
        Gangs(mixed, costs, ROOM)
    with pytest.raises(BadInput, match="gang 0 has 1 ranks, its place 2"):
        Gangs([GangPlace("n0", lambda: start(1), 2)], costs, ROOM)
    with pytest.raises(BadInput, match="keep raw pages"):
        Gangs(places(), costs, ROOM, options=PrefillOptions(codec="int8"))
    with pytest.raises(BadInput, match="gangs of 2, 3 ranks on node n0 with 4 devices"):
        ClusterState([Node("n0", 4, gangs=(2, 3))], ROOM)
