"""Pages that are lost for good: computed again over those that are left, and never served else."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.mending import deep_verify, recompute_lost
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.folder import Store
from ringspan.kvstore.page import RECOMPUTED, seal
from ringspan.kvstore.parity import check_parity
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.repair import PageWriter, republish
from ringspan.kvstore.segment_reader import read_frame

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


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_opening_computes_what_is_lost_again(store, codec):
    manifest, said = prefilled(store, 2, codec)
    for index in (2, 8):
        flip(store, manifest, index)
    controller = Controller(gang_of(2), store)
    handle = controller.open(manifest.context_id)
    assert handle.recomputed == 2
    assert handle.fidelity == manifest.fidelity
    assert handle.pages["verified"] == {"disk": 9}
    heard = answer(controller, handle.context_id)
    assert len(heard) == 8
    assert codec != "raw" or heard == said
    controller.drop(handle.context_id)
    again = controller.open(manifest.context_id)
    assert again.recomputed == 0
    controller.drop(manifest.context_id)


def test_a_rank_whose_segments_are_gone_is_computed_again(store):
    manifest, said = prefilled(store, 3)
    (store.folder(manifest) / "rank-1.seg").unlink()
    controller = Controller(gang_of(2), store)
    handle = controller.open(manifest.context_id)
    assert handle.recomputed == sum(page.segment == "rank-1.seg" for page in manifest.pages)
    assert answer(controller, handle.context_id) == said
    controller.drop(handle.context_id)


def test_without_tokens_what_is_lost_is_an_error_and_nothing_changes(store):
    manifest, _ = prefilled(store, 2)
    flip(store, manifest, 3)
    (store.folder(manifest) / "tokens.npy").unlink()
    controller = Controller(gang_of(2), store)
    with pytest.raises((CorruptPage, StoreError), match=r"tokens\.npy"):
        controller.open(manifest.context_id)
    assert store.manifest(manifest.context_id) == manifest
    assert not gang_of(2).lost


def test_another_model_computes_nothing(store):
    manifest, _ = prefilled(store, 2)
    flip(store, manifest, 3)
    spec = GangSpec(
        world_size=1, model=ModelSpec(name="random:tiny", seed=6, dtype="float32"), device="cpu"
    )
    with LocalGang(spec).start() as other, pytest.raises(BadInput, match="was made with"):
        recompute_lost(other, store, manifest)
    assert store.manifest(manifest.context_id) == manifest


def with_parity(store: Store, ranks: int):
    controller = Controller(gang_of(ranks), store)
    done = controller.prefill(TOKENS, PrefillOptions(chunk_tokens=512, parity=1))
    said = answer(controller, done.context_id)
    controller.drop(done.context_id)
    return store.manifest(done.context_id), said


@pytest.mark.parametrize("ranks", [1, 3])
def test_prefill_with_parity_brings_pages_back_without_computing(store, ranks):
    manifest, said = with_parity(store, ranks)
    flip(store, manifest, 1)
    controller = Controller(gang_of(2), store)
    handle = controller.open(manifest.context_id)
    assert handle.recomputed == 0
    assert handle.pages["repaired"] == {"parity": 1}
    assert answer(controller, handle.context_id) == said
    controller.drop(handle.context_id)


def test_a_member_and_its_parity_lost_is_computed_again_and_has_parity_then(store):
    manifest, said = with_parity(store, 3)
    flip(store, manifest, 1)
    for path in store.folder(manifest).glob("*.par"):
        path.unlink()
    controller = Controller(gang_of(2), store)
    handle = controller.open(manifest.context_id)
    assert handle.recomputed == 1
    assert answer(controller, handle.context_id) == said
    controller.drop(handle.context_id)
    mended = store.manifest(manifest.context_id)
    assert check_parity(store.folder(mended), mended.pages) == []
    flip(store, mended, 1)  # the recomputed page itself
    handle = controller.open(manifest.context_id)
    assert (handle.recomputed, handle.pages["repaired"]) == (0, {"parity": 1})
    controller.drop(handle.context_id)


@pytest.mark.parametrize("codec", ["raw", "int8", "fp8", "int4"])
def test_deep_verify_passes_what_was_prefilled(store, codec):
    manifest, _ = prefilled(store, 2, codec)
    report = deep_verify(gang_of(2), store, manifest, sample=3)
    assert len(report.pages) == 3
    assert not report.bad, report
    if codec == "raw":
        assert max(report.worst(page).error for page in report.pages) < 1e-5


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_deep_verify_sees_pages_that_are_whole_and_wrong(store, codec):
    """Every sum is right: the page was sealed so, of other tokens' KV."""
    manifest, _ = prefilled(store, 2, codec)
    forged = forge(store, manifest, 3, 5)
    assert store.verify(forged.context_id).ok
    report = deep_verify(gang_of(2), store, forged, sample=9)
    assert PAGE * 3 in [page.span.start for page in report.bad]


def forge(store: Store, manifest, index: int, other: int):
    """Page `index` of the context sealed anew with the payload of page `other`."""
    folder = store.folder(manifest)
    payload = read_frame(folder / manifest.pages[other].segment, manifest.pages[other]).payload
    record, form = manifest.pages[index], manifest.form
    sums = payload_sums(payload, form.specs, form.num_layers, PAGE)
    page = seal(form, manifest.origin, record.span, manifest.keys, sums, payload)
    with PageWriter(folder, "forged") as writer:
        writer.append(record, page)
    return republish(store, manifest, writer.records)


def test_deep_verify_of_a_damaged_context_says_to_repair_it(store):
    manifest, _ = prefilled(store, 2)
    flip(store, manifest, 3)
    with pytest.raises(CorruptPage, match="contexts repair"):
        deep_verify(gang_of(2), store, manifest, sample=9)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt-oss"])
def test_pages_are_computed_again_under_windows_sinks_and_caps(store, family):
    """Rows in the middle of held positions, some of whose keys no window reaches."""
    spec = GangSpec(
        world_size=3,
        model=ModelSpec(name=f"random:tiny-{family}", dtype="float32"),
        device="cpu",
        threads=1,
    )
    with LocalGang(spec).start() as gang:
        controller = Controller(gang, store)
        ids = (TOKENS % 500).astype(np.int32)
        done = controller.prefill(ids, PrefillOptions(chunk_tokens=384))
        controller.drop(done.context_id)
        report = deep_verify(gang, store, store.manifest(done.context_id), sample=5)
    assert not report.bad
    assert max(report.worst(page).error for page in report.pages) < 1e-5
