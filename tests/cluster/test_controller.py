"""The controller on loopback ranks with a small random model: prefill, store, reopen, answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.events import Cancelled, PrefillProgress
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import ChunkDone, GangSpec, ModelSpec, ShardSaved
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.cluster.stored import Description
from ringspan.errors import BadInput, RankLost, StoreError, TooLarge, UnknownName
from ringspan.kvstore.folder import Store

MODEL = ModelSpec(name="random:tiny", seed=3)
OPTIONS = PrefillOptions(chunk_tokens=256)
TOKENS = np.random.default_rng(11).integers(0, 256, size=701, dtype=np.int32)
"""Three chunks, the last one of a whole page and a short one."""
QUESTION = (5, 17, 200)


def spec(world_size: int, model: ModelSpec = MODEL) -> GangSpec:
    return GangSpec(world_size=world_size, model=model, device="cpu", threads=1, timeout_s=30.0)


@pytest.fixture(scope="module")
def gang() -> Iterator[LocalGang]:
    with LocalGang(spec(2)) as gang:
        yield gang


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def answer(controller: Controller, name: str, question: tuple[int, ...] = QUESTION) -> list[int]:
    session = controller.begin_session(name)
    return [t.token_id for t in controller.ask(session, name, question, max_tokens=6)]


def staging_left(store: Store) -> list[Path]:
    return list((store.root / "staging").glob("*"))


@pytest.fixture(scope="module")
def prefilled(
    gang: LocalGang, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, str, list[int]]:
    """A stored context, and what the ranks that prefilled it answer."""
    store = Store(tmp_path_factory.mktemp("kept") / "store")
    controller = Controller(gang, store)
    events: list[PrefillProgress] = []
    description = Description(title="noise", sources=("noise.npy",))
    done = controller.prefill(TOKENS, OPTIONS, description=description, on_event=events.append)
    assert [event.tokens_done for event in events] == [256, 512, 701]
    assert events[-1].left_s == 0.0
    assert events[-1].kv_bytes == done.kv_bytes > 0
    assert done.saved
    assert not done.reused
    assert len(done.timings.chunk_s) == 3
    facts, n = controller.facts, len(TOKENS)
    assert done.findings.seen_keys == facts.num_layers * facts.num_q_heads * n * (n + 1) // 2
    assert done.findings.audited_rows == 3 * 2 * done.plan.audit_rows
    assert 0 < done.findings.audit_error < 1e-5
    assert sum(done.findings.exposed_s) > 0
    assert staging_left(store) == []
    return store, done.context_id, answer(controller, done.context_id)


def test_a_stored_context_says_what_it_is(prefilled: tuple[Store, str, list[int]]) -> None:
    store, name, _ = prefilled
    manifest = store.manifest(name[:5])
    assert (manifest.num_tokens, manifest.world_size, manifest.title) == (701, 2, "noise")
    assert manifest.model == MODEL
    assert manifest.exact
    np.testing.assert_array_equal(store.tokens(manifest), TOKENS)


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_answers_the_same_from_the_store(
    prefilled: tuple[Store, str, list[int]], world_size: int
) -> None:
    store, name, expected = prefilled
    with LocalGang(spec(world_size)) as other:
        controller = Controller(other, Store(store.root))
        handle = controller.open(name[:6])
        assert (handle.context_id, handle.num_tokens) == (name, 701)
        assert answer(controller, name) == expected


def test_a_context_that_is_stored_is_not_computed_again(
    gang: LocalGang, prefilled: tuple[Store, str, list[int]]
) -> None:
    store, name, _ = prefilled
    events: list[PrefillProgress] = []
    controller = Controller(gang, store)
    done = controller.prefill(TOKENS, OPTIONS, on_event=events.append)
    assert (done.reused, done.context_id, events) == (True, name, [])
    again = controller.prefill(TOKENS, OPTIONS, on_event=events.append, again=True)
    assert (again.reused, len(events)) == (False, 3)
    assert store.ids() == [name]


def test_a_session_goes_on_and_another_one_begins_anew(
    gang: LocalGang, prefilled: tuple[Store, str, list[int]]
) -> None:
    store, name, expected = prefilled
    controller = Controller(gang, store)
    controller.open(name)
    session = controller.begin_session(name)
    first = [t.token_id for t in controller.ask(session, name, QUESTION, max_tokens=6)]
    list(controller.ask(session, name, (9,), max_tokens=2))
    assert first == answer(controller, name) == expected
    controller.end_session(session)
    controller.end_session(session)
    with pytest.raises(BadInput, match=f"session '{session}' is not open"):
        controller.ask(session, name, QUESTION)


def test_an_answer_can_be_left_and_the_gang_goes_on(
    gang: LocalGang, prefilled: tuple[Store, str, list[int]]
) -> None:
    store, name, expected = prefilled
    controller = Controller(gang, store)
    controller.open(name)
    session = controller.begin_session(name)
    tokens = controller.ask(session, name, QUESTION, max_tokens=500, cancelled=lambda: True)
    assert [t.token_id for t in tokens] == expected[:1]
    assert answer(controller, name) == expected


def test_a_cancelled_prefill_leaves_nothing(gang: LocalGang, store: Store) -> None:
    controller = Controller(gang, store)
    events: list[PrefillProgress] = []
    with pytest.raises(Cancelled, match="cancelled after 1 of 6 chunks; nothing of it was kept"):
        controller.prefill(
            TOKENS,
            PrefillOptions(chunk_tokens=128),
            on_event=events.append,
            cancelled=lambda: bool(events),
        )
    assert (store.ids(), staging_left(store), controller.contexts) == ([], [], ())
    with pytest.raises(BadInput, match="does not hold context"):
        gang.call("save", controller.plan(TOKENS).context_id, "x", timeout_s=9, what="looking")
    assert controller.prefill(TOKENS, OPTIONS).saved  # the gang is as good as before


def test_a_context_of_another_model_is_refused_by_name(
    prefilled: tuple[Store, str, list[int]],
) -> None:
    store, name, _ = prefilled
    with (
        LocalGang(spec(1, ModelSpec(name="random:tiny", seed=4))) as other,
        pytest.raises(BadInput, match=rf"context {name} was made with --model random:tiny"),
    ):
        Controller(other, store).open(name)


def test_what_is_not_there_is_refused(gang: LocalGang, store: Store) -> None:
    controller = Controller(gang, store)
    with pytest.raises(UnknownName, match="unknown context 'feed'"):
        controller.open("feed")
    with pytest.raises(UnknownName, match="unknown context 'feed'"):
        controller.begin_session("feed")
    with pytest.raises(TooLarge, match="positions"):
        controller.prefill(np.zeros(controller.facts.max_positions + 1, dtype=np.int32))
    assert not store.root.exists() or store.ids() == []


class Faulty(Rank):
    """Rank 1 fails in a third chunk, and once it has saved."""

    def __init__(self, rank: int, spec: GangSpec) -> None:
        super().__init__(rank, spec)
        self.number = rank

    def prefill_chunk(self, context_id: str, chunk_index: int) -> ChunkDone:
        if self.number == 1 and chunk_index == 2:
            raise ArithmeticError("a rank's own mistake")
        return super().prefill_chunk(context_id, chunk_index)

    def save(self, context_id: str, staging: str) -> ShardSaved:
        saved = super().save(context_id, staging)
        if self.number == 1:
            raise StoreError("no room left")
        return saved


def test_a_save_that_fails_leaves_nothing_but_the_gang(store: Store) -> None:
    with LocalGang(spec(2), rank_class=Faulty) as gang:
        controller = Controller(gang, store)
        with pytest.raises(StoreError, match=r"^rank 1 .* in saving context .*: no room left"):
            controller.prefill(TOKENS[:300], OPTIONS)
        assert not gang.lost
        assert (store.ids(), staging_left(store), controller.contexts) == ([], [], ())


def test_a_rank_that_fails_is_named_with_its_chunk_and_nothing_stays(store: Store) -> None:
    with LocalGang(spec(2), rank_class=Faulty) as gang:
        controller = Controller(gang, store)
        with pytest.raises(RankLost, match=r"^rank 1 .* prefill chunk 2 \[512, 701\): Arithmetic"):
            controller.prefill(TOKENS, OPTIONS)
        assert gang.lost
    assert (store.ids(), staging_left(store)) == ([], [])
