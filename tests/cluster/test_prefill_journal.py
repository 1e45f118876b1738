"""A controller's process is killed in the middle of a prefill; the next one goes on with it: pages
bit for bit those of an undisturbed run, at most one chunk computed again, and never a wrong page
whatever became of what was left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.events import PrefillResumed
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.kvstore import staging
from ringspan.kvstore.folder import Store
from ringspan.kvstore.keys import PUBLIC_NAMESPACE
from ringspan.kvstore.tenancy import tenant_namespace

OPTIONS = PrefillOptions(chunk_tokens=384, parity=1)
TOKENS = np.random.default_rng(11).integers(0, 256, size=1500, dtype=np.int32)
"""Four chunks, the last one short."""
WORLD_SIZE = 3

VICTIM = """
import os, signal, sys
import numpy as np
from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.kvstore.folder import Store

root, method, nth, after, namespace = sys.argv[1:]

class Mortal(Rank):
    calls = 0

    def __init__(self, rank, spec):
        super().__init__(rank, spec)
        self.number = rank

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name != method or self.number != 1:
            return found

        def deadly(*args):
            Mortal.calls += 1
            last = Mortal.calls == int(nth) + 1
            if last and after == "no":
                os.kill(os.getpid(), signal.SIGKILL)
            result = found(*args)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return deadly

tokens = np.random.default_rng(11).integers(0, 256, size=1500, dtype=np.int32)
model = ModelSpec(name="random:tiny", seed=3)
spec = GangSpec(world_size=3, model=model, device="cpu", threads=1, timeout_s=30.0)
with LocalGang(spec, rank_class=Mortal) as gang:
    controller = Controller(gang, Store(root), namespace=bytes.fromhex(namespace))
    controller.prefill(tokens, PrefillOptions(chunk_tokens=384, parity=1))
"""


def spec(world_size: int = WORLD_SIZE) -> GangSpec:
    model = ModelSpec(name="random:tiny", seed=3)
    return GangSpec(world_size=world_size, model=model, device="cpu", threads=1, timeout_s=30.0)


@dataclass
class Outcome:
    digests: list[tuple[int, str]]
    answer: list[int]
    resumed: tuple[PrefillResumed, ...]
    chunks: int
    """That this process did."""


def prefill(
    root: Path,
    options: PrefillOptions = OPTIONS,
    world_size: int = WORLD_SIZE,
    namespace: bytes = PUBLIC_NAMESPACE,
) -> Outcome:
    store = Store(root, (namespace,))
    chunks: list[int] = []
    with LocalGang(spec(world_size)) as gang:
        controller = Controller(gang, store, namespace=namespace)
        done = controller.prefill(
            TOKENS, options, on_event=lambda event: chunks.append(event.chunk_index)
        )
        session = controller.begin_session(done.context_id)
        question = controller.ask(session, done.context_id, (5, 17, 200), max_tokens=6)
        answer = [token.token_id for token in question]
    manifest = store.manifest(done.context_id)
    assert store.verify(done.context_id).problems == ()
    assert len(done.timings.chunk_s) == len(done.plan.chunks)
    assert done.kv_bytes == manifest.payload_bytes
    assert not {"owner.json", staging.JOURNAL} & set(os.listdir(store.folder(manifest)))
    return Outcome(
        [(page.span.start, page.xxh3) for page in manifest.pages],
        answer,
        done.resumed,
        len(chunks),
    )


def killed(
    root: Path,
    method: str,
    nth: int = 0,
    after: bool = False,
    namespace: bytes = PUBLIC_NAMESPACE,
) -> Path:
    """What a process left that was killed in rank 1's `nth` call of `method`."""
    arguments = [str(root), method, str(nth), "yes" if after else "no", namespace.hex()]
    dead = subprocess.run(
        [sys.executable, "-c", VICTIM, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert dead.returncode == -9
    (left,) = (root / "staging").iterdir()
    return left


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return prefill(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def left_at_chunk_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose writer was killed in its third chunk; tests take copies of it."""
    root = tmp_path_factory.mktemp("left") / "store"
    killed(root, "prefill_chunk", 2)
    return root


@pytest.fixture
def left(left_at_chunk_2: Path, tmp_path: Path) -> Path:
    shutil.copytree(left_at_chunk_2, tmp_path / "store")
    return tmp_path / "store"


PHASES = [
    ("first-chunk-before", "prefill_chunk", 0, False, 0),
    ("last-chunk-after", "prefill_chunk", 3, True, 3),
    ("save-before", "save", 0, False, 4),
    ("parity-after", "write_parity", 0, True, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "nth", "after", "sealed"), [p[1:] for p in PHASES], ids=[p[0] for p in PHASES]
)
def test_a_controller_killed_in_any_phase_is_gone_on_after(
    method: str, nth: int, after: bool, sealed: int, undisturbed: Outcome, tmp_path: Path
) -> None:
    killed(tmp_path, method, nth, after)
    outcome = prefill(tmp_path)
    assert (outcome.digests, outcome.answer) == (undisturbed.digests, undisturbed.answer)
    (resumed,) = outcome.resumed
    assert resumed.chunk_index >= sealed - 1
    assert resumed.recomputed_tokens <= OPTIONS.chunk_tokens
    assert outcome.chunks == 4 - resumed.chunk_index
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_controller_killed_in_a_chunk_is_gone_on_behind_the_chunks_before(
    undisturbed: Outcome, left: Path
) -> None:
    outcome = prefill(left)
    assert (outcome.digests, outcome.answer) == (undisturbed.digests, undisturbed.answer)
    (resumed,) = outcome.resumed
    assert resumed.chunk_index == 2
    assert outcome.chunks == 2
    assert resumed.recomputed_tokens == OPTIONS.chunk_tokens
    assert resumed.restored_pages == 6
    assert resumed.replaced == (0, 1, 2)
    assert "(pid " in resumed.reason
    assert list((left / "staging").iterdir()) == []


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def journal(folder: Path) -> Path:
    return folder / staging.JOURNAL


def damage_opening(folder: Path) -> None:
    flip(journal(folder), 40)


def damage_last_line(folder: Path) -> None:
    flip(journal(folder), -10)


def tear_last_line(folder: Path) -> None:
    os.truncate(journal(folder), journal(folder).stat().st_size - 7)


def damage_last_page(folder: Path) -> None:
    flip(folder / "rank-1.seg", -5000)


def damage_first_page(folder: Path) -> None:
    flip(folder / "rank-2.seg", 9000)


def cut_a_page(folder: Path) -> None:
    os.truncate(folder / "rank-0.seg", (folder / "rank-0.seg").stat().st_size - 4096)


def lose_a_rank(folder: Path) -> None:
    (folder / "rank-1.seg").unlink()


def another_version(folder: Path) -> None:
    lines = staging.journal_lines(folder)
    opening = msgspec.json.decode(lines[0])
    lines[0] = msgspec.json.encode({**opening, "version": "0.0.0"})
    written = b"".join(staging.journal_line(n, line) for n, line in enumerate(lines))
    journal(folder).write_bytes(written)


DAMAGE: list[tuple[Callable[[Path], None], int | None]] = [
    (damage_opening, None),
    (damage_last_line, 1),
    (tear_last_line, 1),
    (damage_last_page, 1),
    (damage_first_page, 0),
    (cut_a_page, 1),
    (lose_a_rank, 0),
    (another_version, None),
]
"""And the chunk that is gone on with; None: nothing of it is used."""


@pytest.mark.parametrize(("damage", "chunk"), DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damage_to_what_was_left_costs_chunks_and_never_a_wrong_page(
    damage: Callable[[Path], None], chunk: int | None, undisturbed: Outcome, left: Path
) -> None:
    (folder,) = (left / "staging").iterdir()
    damage(folder)
    outcome = prefill(left)
    assert (outcome.digests, outcome.answer) == (undisturbed.digests, undisturbed.answer)
    assert [one.chunk_index for one in outcome.resumed] == ([] if chunk is None else [chunk])
    assert outcome.chunks == 4 - (chunk or 0)


@pytest.mark.parametrize(
    ("options", "world_size"),
    [
        (PrefillOptions(chunk_tokens=768, parity=1), WORLD_SIZE),
        (PrefillOptions(chunk_tokens=384, parity=1, codec="int8"), WORLD_SIZE),
        (OPTIONS, 2),
    ],
    ids=["chunk-tokens", "codec", "ranks"],
)
def test_what_was_asked_for_otherwise_begins_anew_and_leaves_it(
    options: PrefillOptions, world_size: int, left: Path
) -> None:
    before = list((left / "staging").iterdir())
    assert prefill(left, options, world_size).resumed == ()
    assert list((left / "staging").iterdir()) == before


def test_what_a_living_process_writes_is_not_taken(undisturbed: Outcome, left: Path) -> None:
    (folder,) = (left / "staging").iterdir()
    assert staging.abandoned(left / "staging", folder.name[:16]) == [folder]
    (folder / "owner.json").unlink()
    marked = staging.new_folder(left / "mine", "it") / "owner.json"  # this process's mark
    shutil.copy(marked, folder)
    assert staging.claim(folder, folder.name[:16]) is None
    outcome = prefill(left)
    assert outcome.digests == undisturbed.digests
    assert outcome.resumed == ()
    assert list((left / "staging").iterdir()) == [folder]


@pytest.mark.slow
def test_what_a_tenant_left_is_gone_on_with_by_the_tenant_alone(tmp_path: Path) -> None:
    namespace = tenant_namespace("anna", bytes(range(32)))
    folder = killed(tmp_path, "prefill_chunk", 2, namespace=namespace)
    assert namespace.hex().encode() not in b"".join(p.read_bytes() for p in folder.glob("*"))
    assert prefill(tmp_path).resumed == ()
    (resumed,) = prefill(tmp_path, namespace=namespace).resumed
    assert resumed.chunk_index == 2
