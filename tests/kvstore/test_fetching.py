"""Payloads that a device fetches from the host store's slabs, without a copy between."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ringspan.cluster import host_store
from ringspan.errors import CorruptPage
from ringspan.kvstore import planes, transfer
from ringspan.kvstore.batches import batches
from ringspan.kvstore.codecs.registry import CODECS, codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.fetching import fetched_sums
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.supply import Supply
from ringspan.kvstore.testing import make_context, page_tokens_of
from ringspan.kvstore.tiers import host_wire as wire
from ringspan.kvstore.tiers import pinned
from ringspan.kvstore.tiers.base import form_id
from ringspan.kvstore.tiers.counters import QUARANTINED, VERIFIED, StoreCounters
from ringspan.kvstore.tiers.disk import SegmentReader
from ringspan.kvstore.tiers.ids import PageId
from ringspan.kvstore.tiers.quarantine import Quarantine
from ringspan.kvstore.transfer import load_shard

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def tier():
    """On a file system in memory: only there can a GPU's driver pin a file."""
    with tempfile.TemporaryDirectory(prefix="ringspan-test-", dir="/dev/shm") as folder:
        tier = host_store.host_tier(Path(folder, "host"), 16 << 20)
        yield tier
        tier._ask(wire.Stop(keep=False), wire.Stated)
        tier.close()


class Context:
    """Stored on disk and in the host store."""

    def __init__(self, root, tier, name="raw", pages=9):
        step = page_tokens_of(name)
        self.made = make_context(root, (pages - 1) * step + 5, 2, name)
        self.manifest, self.root, self.tier = self.made.manifest, self.made.store.root, tier
        self.counters = StoreCounters()
        origin, keys = self.manifest.origin, tuple(self.manifest.keys)
        for shard in self.made.shards:
            count = len(shard.pages())
            tier.put([shard.export_page(i, origin, keys) for i in range(count)])
        self.reader = self._reader()
        self.reader.close()

    def _reader(self):
        form = form_id(self.manifest.form, self.manifest.origin)
        return self.tier.reading(form, self.manifest.pages)

    def opened(self, device="cpu", disk=True):
        """Payloads of all pages in position order, as a fresh shard has them."""
        form = self.manifest.form
        shard = ContextShard(
            codec(form.codec), form.num_layers, form.num_kv_heads, form.head_dim,
            dtype_of(form.dtype), device, self.manifest.num_tokens, form.page_tokens,
        )  # fmt: skip
        readers = [self._reader()]
        if disk:
            readers.append(SegmentReader(self.made.store.folder(self.manifest)))
        supply = Supply(self.manifest, readers, Quarantine(self.root), self.counters)
        load_shard(self.root, self.manifest, self.manifest.pages, shard, supply=supply, mapped=True)
        origin, keys = self.manifest.origin, self.manifest.keys
        return [bytes(shard.export_page(i, origin, keys).payload) for i in range(len(keys))]

    def count(self, kind, road):
        return self.counters.snapshot().get(kind, {}).get(road, 0)

    @property
    def wanted(self):
        origin, keys = self.manifest.origin, self.manifest.keys
        pages = [
            shard.export_page(i, origin, keys)
            for shard in self.made.shards
            for i in range(len(shard.pages()))
        ]
        pages.sort(key=lambda page: page.header.span)
        return [bytes(page.payload) for page in pages]

    def flip(self, index, behind_head):
        """A bit of page `index` in its slab: of the payload, or of the header."""
        record = self.manifest.pages[index]
        place = self.reader._places[record.key]
        at = place.offset + (
            record.frame_bytes - record.payload_bytes & ~4095 if behind_head else 50
        )
        slab = self.tier._slab(place)
        byte = os.pread(slab.fd, 1, at)[0]
        os.pwrite(slab.fd, bytes([byte ^ 4]), at)


@pytest.fixture
def nothing_else(monkeypatch):
    """Pages come by mapped memory, or the test fails."""

    def read(self, readers):
        raise AssertionError("pages were read through a copy")

    monkeypatch.setattr(transfer._Loading, "_read", read)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fetch_bytes", [1, 30_000, 1 << 27])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_fetched_is_what_was_put(
    tmp_path, tier, monkeypatch, nothing_else, name, fetch_bytes, device
):
    monkeypatch.setattr(transfer, "FETCH_BYTES", fetch_bytes)
    context = Context(tmp_path / "store", tier, name)
    assert context.opened(device) == context.wanted
    assert context.count(VERIFIED, "host") == 9
    assert context.opened(device) == context.wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("behind_head", [True, False], ids=["payload", "header"])
def test_a_flipped_bit_in_a_slab_sends_to_the_next_road(tmp_path, tier, behind_head, device):
    context = Context(tmp_path / "store", tier)
    context.flip(3, behind_head)
    assert context.opened(device) == context.wanted
    assert context.count(QUARANTINED, "host") == 1
    assert context.count(VERIFIED, "host") == 8
    assert context.count(VERIFIED, "disk") == 1


@pytest.mark.parametrize("behind_head", [True, False], ids=["payload", "header"])
def test_a_flipped_bit_in_the_only_copy_is_told_and_nothing_is_opened(tmp_path, tier, behind_head):
    context = Context(tmp_path / "store", tier)
    context.flip(0, behind_head)
    with pytest.raises(CorruptPage, match="differs"):
        context.opened(disk=False)


def test_a_page_in_quarantine_is_not_fetched(tmp_path, tier):
    context = Context(tmp_path / "store", tier)
    context.flip(3, True)
    context.opened()
    before = context.count(QUARANTINED, "host")
    assert context.opened() == context.wanted  # by threads: quarantine holds the page
    assert context.count(QUARANTINED, "host") == before


def test_a_context_that_is_in_the_host_store_in_part_is_read_page_by_page(tmp_path, tier):
    context = Context(tmp_path / "store", tier)
    form = form_id(context.manifest.form, context.manifest.origin)
    tier.delete([PageId(context.manifest.pages[2].key, form)])
    assert context.opened() == context.wanted
    assert context.count(VERIFIED, "disk") == 1


def test_slabs_are_pinned_at_the_third_reading(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(pinned, "pin", lambda address, size: not taken.append(size))
    monkeypatch.setattr(pinned, "unpin", lambda address: None)
    path = tmp_path / "slab"
    path.write_bytes(b"abcd" * 1024)
    with open(path, "r+b") as file:
        for _ in range(pinned.PATIENCE):
            assert pinned.mapped_file(file.fileno(), True, pinned.PATIENCE) is None
        assert not taken
        for _ in range(2):
            assert pinned.mapped_file(file.fileno(), True, pinned.PATIENCE).numel() == 4096
        assert taken == [4096]
    path.unlink()
    pinned.unmap_gone()


def test_slabs_that_cannot_be_pinned_are_asked_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pinned, "pin", lambda address, size: asked.append(size))
    path = tmp_path / "slab"
    path.write_bytes(b"abcd" * 1024)
    with open(path, "r+b") as file:
        assert pinned.mapped_file(file.fileno(), True) is None
        assert pinned.mapped_file(file.fileno(), True) is None
    assert len(asked) == 1
    path.unlink()
    pinned.unmap_gone()


def test_slabs_are_mapped_once_and_unmapped_when_their_file_is_gone(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    for file in (path, other):
        file.write_bytes(bytes(range(256)) * 16)
    with open(path, "r+b") as first, open(path, "r+b") as again:
        data = pinned.mapped_file(first.fileno(), False)
        assert data.data_ptr() == pinned.mapped_file(again.fileno(), False).data_ptr()
    with open(other, "r+b") as third:
        pinned.mapped_file(third.fileno(), False)
    held = len(pinned._files)
    path.unlink()
    pinned.unmap_gone()
    assert len(pinned._files) == held - 1
    assert data.tolist() == list(range(256)) * 16  # whoever has it keeps it


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_told_and_the_next_launch_works():
    data = np.zeros(1 << 20, np.uint8)
    address = data.ctypes.data
    assert pinned.pin(address, data.nbytes)
    assert not pinned.pin(address, data.nbytes)  # it is pinned already
    assert int(torch.ones(4, device="cuda").sum()) == 4
    pinned.unpin(address)


@pytest.mark.parametrize("device", DEVICES)
def test_a_caller_who_stops_early_leaves_nothing_running(device):
    raw = codec("raw")
    specs = raw.specs(2, 32, torch.float32)
    layers = tuple(
        tuple(torch.zeros(64, *spec.shape, dtype=spec.dtype, device=device) for spec in specs)
        for _ in range(2)
    )
    width = 2 * planes.specs_bytes(specs, 16)
    payloads = [torch.randint(0, 256, (width,), dtype=torch.uint8) for _ in range(4)]
    load = batches([16] * 4, lambda tokens: width, 0, 1)
    sums = fetched_sums(payloads, load, layers, specs, 2)
    first = next(sums)
    sums.close()
    assert first == planes.page_sums(layers, specs, 0, 16, 1).tolist()
