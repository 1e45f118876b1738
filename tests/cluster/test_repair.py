"""Pages that are lost for good: computed again over those that are left, and never served else."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.mending import recompute_lost
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.kvstore.folder import Store
from ringspan.kvstore.page import RECOMPUTED
from ringspan.kvstore.segment import read_frame

TINY = ModelSpec(name="random:tiny", seed=5, dtype="float32")
TOKENS = np.random.default_rng(3).integers(0, 1024, size=1100, dtype=np.int32)
PAGE = 128


@functools.cache
def gang_of(world_size: int) -> LocalGang:
    spec = GangSpec(world_size=world_size, model=TINY, device="cpu", threads=1, timeout_s=30.0)
    return LocalGang(spec).start()


@pytest.fixture(scope="module", autouse=True)
def _end_gangs():
    yield
    gang_of.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def prefilled(store: Store, ranks: int, codec: str = "raw", chunk_tokens: int = 512):
    controller = Controller(gang_of(ranks), store)
    options = PrefillOptions(chunk_tokens=chunk_tokens, codec=codec)
    done = controller.prefill(TOKENS, options)
    said = answer(controller, done.context_id)
    controller.drop(done.context_id)
    return store.manifest(done.context_id), said


def answer(controller: Controller, name: str) -> list[int]:
    session = controller.begin_session(name)
    said = [t.token_id for t in controller.ask(session, name, (17, 4), max_tokens=8)]
    controller.end_session(session)
    return said


def flip(store: Store, manifest, index: int) -> None:
    record = manifest.pages[index]
    with open(store.folder(manifest) / record.segment, "r+b") as file:
        file.seek(record.offset + record.frame_bytes // 2)
        value = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([value[0] ^ 1]))


LOSSES = {
    "first": (0,),
    "last": (8,),
    "several": (1, 3, 4, 8),
    "all but one": (0, 1, 2, 3, 4, 6, 7, 8),
}


@pytest.mark.parametrize("lost", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("saved", "opened"), [(1, 1), (2, 3), (4, 2)])
def test_lost_pages_are_computed_again(store, saved, opened, lost):
    manifest, said = prefilled(store, saved)
    for index in lost:
        flip(store, manifest, index)
    done = recompute_lost(gang_of(opened), store, manifest)
    assert [span.start // PAGE for span in done.spans] == list(lost)
    assert store.verify(manifest.context_id).ok
    for index, record in enumerate(done.manifest.pages):
        header = read_frame(store.folder(manifest) / record.segment, record).header
        assert (RECOMPUTED in header.origin.provenance) == (index in lost)
        assert record.key == manifest.pages[index].key
    controller = Controller(gang_of(opened), store)
    name = controller.open(manifest.context_id).context_id
    assert answer(controller, name) == said
    controller.drop(name)
