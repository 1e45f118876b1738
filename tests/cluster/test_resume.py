"""A prefill goes on after a rank was lost, in every phase: pages bit for bit those of an
undisturbed run, at most one chunk computed again, survivors the same objects as before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.events import PauseEvent, PrefillPaused, PrefillResumed
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.kvstore.folder import Store

MODEL = ModelSpec(name="random:tiny", seed=3)
OPTIONS = PrefillOptions(chunk_tokens=384, parity=1)
TOKENS = np.random.default_rng(11).integers(0, 256, size=1500, dtype=np.int32)
"""Four chunks on three ranks, the last one short."""
WORLD_SIZE = 3
QUESTION = (5, 17, 200)


@dataclass
class Fault:
    """Rank `rank` is lost in its `nth` call of `method`: before it did anything, or once all is
    done but said."""

    rank: int
    method: str
    nth: int = 0
    after: bool = False
    struck: bool = field(default=False, compare=False)


class Mortal(Rank):
    """Loses its life by the schedule; a thread cannot be killed, so the rank is given up whole."""

    schedule: ClassVar[list[Fault]] = []
    made: ClassVar[list[int]] = []

    def __init__(self, rank: int, spec: GangSpec) -> None:
        super().__init__(rank, spec)
        self.number = rank
        self.calls: dict[str, int] = {}
        self.made.append(rank)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        faults = [f for f in Mortal.schedule if f.method == name and not f.struck]
        if not faults or not callable(found):
            return found

        def mortal(*args: Any) -> Any:
            nth = self.calls[name] = self.calls.get(name, -1) + 1
            fault = next((f for f in faults if (f.rank, f.nth) == (self.number, nth)), None)
            if fault is not None and not fault.after:
                fault.struck = True
                raise ConnectionAbortedError("killed on purpose")
            result = found(*args)
            if fault is not None:
                fault.struck = True
                raise ConnectionAbortedError("killed on purpose")
            return result

        return mortal


@pytest.fixture(autouse=True)
def _schedule() -> Iterator[None]:
    Mortal.schedule, Mortal.made = [], []
    yield
    Mortal.schedule, Mortal.made = [], []


def spec(world_size: int = WORLD_SIZE) -> GangSpec:
    return GangSpec(world_size=world_size, model=MODEL, device="cpu", threads=1, timeout_s=30.0)


@dataclass
class Outcome:
    digests: list[tuple[int, str]]
    answer: list[int]
    resumed: tuple[PrefillResumed, ...]


def prefill(root: Path, schedule: list[Fault], store: bool = True) -> Outcome:
    """Prefill under the schedule; what is stored, and what is answered."""
    Mortal.schedule, Mortal.made = schedule, []
    events: list[PauseEvent] = []
    kept = Store(root) if store else None
    with LocalGang(spec(), rank_class=Mortal) as gang:
        controller = Controller(gang, kept)
        done = controller.prefill(TOKENS, OPTIONS, on_pause=events.append)
        assert all(fault.struck for fault in schedule)
        assert [e for e in events if isinstance(e, PrefillResumed)] == list(done.resumed)
        assert sum(isinstance(e, PrefillPaused) for e in events) == len(done.resumed)
        session = controller.begin_session(done.context_id)
        question = controller.ask(session, done.context_id, QUESTION, max_tokens=6)
        answer = [token.token_id for token in question]
        assert len(Mortal.made) == WORLD_SIZE + sum(len(one.replaced) for one in done.resumed)
    digests: list[tuple[int, str]] = []
    if kept is not None:
        manifest = kept.manifest(done.context_id)
        digests = [(page.span.start, page.xxh3) for page in manifest.pages]
        assert kept.verify(done.context_id).problems == ()
        assert list((kept.root / "staging").glob("*")) == []
    return Outcome(digests, answer, done.resumed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return prefill(tmp_path_factory.mktemp("undisturbed"), [])


PHASES = [
    ("first-chunk-before", [Fault(1, "prefill_chunk", 0)]),
    ("chunk-before", [Fault(0, "prefill_chunk", 2)]),
    ("chunk-after", [Fault(2, "prefill_chunk", 1, after=True)]),
    ("last-chunk-after", [Fault(1, "prefill_chunk", 3, after=True)]),
    ("begin", [Fault(1, "begin_prefill", 0, after=True)]),
    ("begin-saving", [Fault(2, "begin_saving", 0, after=True)]),
    ("save-before", [Fault(0, "save", 0)]),
    ("save-after", [Fault(1, "save", 0, after=True)]),
    ("parity", [Fault(2, "write_parity", 0, after=True)]),
    ("resuming", [Fault(1, "prefill_chunk", 2), Fault(2, "resume_prefill", 0)]),
    ("two-at-once", [Fault(0, "prefill_chunk", 2), Fault(1, "prefill_chunk", 2)]),
    ("two-apart", [Fault(0, "prefill_chunk", 1), Fault(1, "prefill_chunk", 3, after=True)]),
]


@pytest.mark.parametrize("schedule", [s for _, s in PHASES], ids=[name for name, _ in PHASES])
def test_a_rank_lost_in_any_phase_changes_no_bit_of_the_context(
    schedule: list[Fault], undisturbed: Outcome, tmp_path: Path
) -> None:
    outcome = prefill(tmp_path / "store", schedule)
    assert outcome.digests == undisturbed.digests
    assert outcome.answer == undisturbed.answer
    for resumed in outcome.resumed:
        assert resumed.recomputed_tokens <= OPTIONS.chunk_tokens
        assert resumed.pause_s >= resumed.load_s >= 0


def test_what_a_lost_rank_had_is_read_and_only_the_chunk_under_way_computed_again(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    outcome = prefill(tmp_path / "store", [Fault(1, "prefill_chunk", 3)])
    (resumed,) = outcome.resumed
    assert resumed.replaced == (1,)
    assert resumed.chunk_index == 3
    assert resumed.restored_pages == 3  # of three chunks of three pages on three ranks
    assert resumed.recomputed_tokens == len(TOKENS) - 3 * 384
    assert outcome.digests == undisturbed.digests


def test_without_a_store_all_is_computed_again_and_the_answer_is_the_same(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    outcome = prefill(tmp_path, [Fault(1, "prefill_chunk", 2)], store=False)
    (resumed,) = outcome.resumed
    assert (resumed.chunk_index, resumed.recomputed_tokens) == (0, 3 * 384)
    assert outcome.answer == undisturbed.answer


def test_other_contexts_leave_the_gang_and_come_back_from_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with LocalGang(spec(), rank_class=Mortal) as gang:
        controller = Controller(gang, store)
        first = controller.prefill(TOKENS[::-1], OPTIONS).context_id
        Mortal.schedule = [Fault(1, "prefill_chunk", 2)]
        second = controller.prefill(TOKENS, OPTIONS).context_id
        assert [handle.context_id for handle in controller.contexts] == [second]
        controller.open(first)
        session = controller.begin_session(first)
        assert len(list(controller.ask(session, first, QUESTION, max_tokens=3))) == 3


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_of_faults_change_no_bit(
    seed: int, undisturbed: Outcome, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    methods = ["begin_prefill", "begin_saving", "prefill_chunk", "prefill_chunk", "save"]
    drawn = [
        Fault(
            int(rng.integers(WORLD_SIZE)),
            method,
            int(rng.integers(4)) if method == "prefill_chunk" else 0,
            bool(rng.integers(2)),
        )
        for method in rng.permutation(methods)[: rng.integers(1, 3)]
    ]
    Mortal.schedule, Mortal.made = drawn, []
    store = Store(tmp_path)
    with LocalGang(spec(), rank_class=Mortal) as gang:
        done = Controller(gang, store).prefill(TOKENS, OPTIONS)
    manifest = store.manifest(done.context_id)
    assert [(p.span.start, p.xxh3) for p in manifest.pages] == undisturbed.digests
    assert all(one.recomputed_tokens <= OPTIONS.chunk_tokens for one in done.resumed)
