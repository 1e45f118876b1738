"""Layers read ahead and layers streamed: the same bits, verified, or an error for who waits."""

from __future__ import annotations

import threading

import pytest
import torch

from ringspan.attention.kv import unit_tokens
from ringspan.errors import BadInput, CorruptPage, PeerTimeout
from ringspan.kvstore import batches, layerwise
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.layerwise import LayerGate, LoadingShard, load_layers
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.streamed import StreamedShard
from ringspan.kvstore.testing import make_context, make_shards, open_shard
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.moving import move
from ringspan.kvstore.tiers.placement import TierName, context_supply


def made_with(tmp_path, name="raw", layers=5):
    step = max(16, unit_tokens(CODECS[name].specs(2, 32, torch.float32)))
    return make_context(
        tmp_path / "store", 4 * step + 3, 3, name, page_tokens=step, num_layers=layers
    )


def empty(made):
    form = made.manifest.form
    return ContextShard(
        CODECS[form.codec], form.num_layers, form.num_kv_heads, form.head_dim,
        dtype_of(form.dtype), "cpu", made.manifest.num_tokens, form.page_tokens,
    )  # fmt: skip


def supply_of(made, counters=None):
    pages = made.manifest.pages
    return context_supply(made.store.root, made.manifest, pages, counters or StoreCounters())


def same(a, b, layers=5):
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for layer in range(layers)
        for x, y in zip(a.tensors(layer), b.tensors(layer), strict=True)
    )


@pytest.mark.parametrize("batch_bytes", [1, 1 << 26])
@pytest.mark.parametrize("read_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("name", CODECS)
def test_layers_read_ahead_are_the_shard(tmp_path, monkeypatch, name, read_bytes, batch_bytes):
    monkeypatch.setattr(layerwise, "READ_BYTES", read_bytes)
    monkeypatch.setattr(batches, "BATCH_BYTES", batch_bytes)
    made = made_with(tmp_path, name)
    shard, counters = empty(made), StoreCounters()
    gate = LayerGate(5)
    load_layers(supply_of(made, counters), made.manifest.pages, shard, gate)
    assert gate.ready == 5
    assert counters.snapshot()["verified"] == {"disk": 5}
    assert same(shard, open_shard(made, made.manifest.pages))


def test_the_first_layer_is_there_before_the_last_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "READ_BYTES", 1)
    made = made_with(tmp_path)
    shard, gate = empty(made), LayerGate(5)
    supply, allowed = supply_of(made), threading.Semaphore(2 * len(made.manifest.pages))
    part = supply.part

    def held_back(*args):
        assert allowed.acquire(timeout=30)
        part(*args)

    monkeypatch.setattr(supply, "part", held_back)
    loading = LoadingShard(shard, gate, timeout_s=0.3)
    worker = threading.Thread(
        target=load_layers, args=(supply, made.manifest.pages, shard, gate), daemon=True
    )
    worker.start()
    whole = open_shard(made, made.manifest.pages)
    with pytest.raises(PeerTimeout, match="layer 2"):
        loading.tensors(2)
    for layer in (0, 1):
        assert torch.equal(loading.tensors(layer)[1], whole.tensors(layer)[1])
    with pytest.raises(ValueError, match="has written 0"):
        shard.tensors(2)  # nobody reads what is not verified, waiting or not
    with pytest.raises(BadInput, match="cannot grow"):
        loading.reserve(())
    for _ in range(100):
        allowed.release()
    worker.join(30)
    assert same(loading, whole)


def flip(made, index, layer):
    record = made.manifest.pages[index]
    path = made.store.folder(made.manifest) / record.segment
    data = bytearray(path.read_bytes())
    data[record.offset + 4096 + layer * record.payload_bytes // 5 + 9] ^= 1
    path.write_bytes(data)


def test_a_bad_plane_stops_its_layer_and_all_behind_it(tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "READ_BYTES", 1)
    made = made_with(tmp_path)
    flip(made, 2, 3)
    shard, gate = empty(made), LayerGate(5)
    with pytest.raises(CorruptPage, match="xxh3-128 differs"):
        load_layers(supply_of(made), made.manifest.pages, shard, gate)
    assert gate.ready == 3
    with pytest.raises(CorruptPage):
        LoadingShard(shard, gate, 1.0).tensors(4)
    assert shard.num_tokens == 0


def test_a_bad_plane_is_read_from_the_next_tier(tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "READ_BYTES", 1)
    made = made_with(tmp_path)
    whole = open_shard(made, made.manifest.pages)
    remote = TierName("remote", f"file://{tmp_path}/remote")
    move(made.store, made.manifest.context_id, remote, keep=True)
    flip(made, 2, 3)
    shard, counters = empty(made), StoreCounters()
    load_layers(supply_of(made, counters), made.manifest.pages, shard, LayerGate(5))
    assert same(shard, whole)
    assert counters.snapshot()["verified"] == {"disk": 4, "remote": 1}
    assert counters.snapshot()["quarantined"] == {"disk": 1}


# streamed


@pytest.mark.parametrize("order", ["forward", "backward", "twice"])
@pytest.mark.parametrize("name", CODECS)
def test_a_streamed_context_is_the_context(tmp_path, name, order):
    made = made_with(tmp_path, name)
    held = open_shard(made, made.manifest.pages)
    streamed = StreamedShard(held, held.all_plane_sums(), "cpu")
    layers = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    if order != "forward":
        layers = layers[::-1] if order == "backward" else [x for x in layers for _ in range(2)]
    for layer in layers:
        for mine, theirs in zip(streamed.tensors(layer), held.tensors(layer), strict=True):
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert streamed.ring_bytes == 2 * held.capacity_bytes // 5
    cut = streamed.tensors(2, 2 * held.page_tokens, held.page_tokens)
    assert torch.equal(cut[0], held.tensors(2, 2 * held.page_tokens, held.page_tokens)[0])
    assert (streamed.spans, streamed.num_tokens) == (held.spans, held.num_tokens)
    with pytest.raises(BadInput, match="cannot grow"):
        streamed.reserve(())
    streamed.close()
    streamed.close()


def test_what_changed_in_host_memory_is_not_handed_out(tmp_path):
    made = made_with(tmp_path)
    held = open_shard(made, made.manifest.pages)
    sums = held.all_plane_sums()
    held._layers[2][0][20, 1, 3] += 1
    streamed = StreamedShard(held, sums, "cpu")
    streamed.tensors(1)
    for _ in range(2):
        with pytest.raises(CorruptPage, match=r"page \[16, 32\) streamed .* in layer 2"):
            streamed.tensors(2)
    assert torch.equal(streamed.tensors(3)[0], held.tensors(3)[0])
    held._layers[2][0][20, 1, 3] -= 1
    assert torch.equal(streamed.tensors(2)[0], held.tensors(2)[0])
    streamed.close()


def test_sums_of_other_pages_are_refused():
    (shard,) = make_shards(40, 1)
    with pytest.raises(ValueError, match="sums of 1 pages for 3"):
        StreamedShard(shard, [[1, 2, 3]], "cpu")
