"""A context in several tiers: whatever is wrong in one, another gives the right bits or nothing."""

from __future__ import annotations

import json

import pytest

from ringspan.cluster import host_store
from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore import transfer
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.testing import make_context
from ringspan.kvstore.tiers import host_wire as wire
from ringspan.kvstore.tiers.base import form_id
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.host import HostTier
from ringspan.kvstore.tiers.moving import forget, move, pin
from ringspan.kvstore.tiers.placement import (
    Placement,
    TierName,
    context_supply,
    read_placement,
    tier_name,
)
from ringspan.kvstore.tiers.remote import RemoteTier

DISK = TierName("disk")


@pytest.fixture
def host(tmp_path):
    folder = tmp_path / "host"
    tier = host_store.host_tier(folder, 16 << 20)
    yield TierName("host", str(folder))
    tier._ask(wire.Stop(keep=False), wire.Stated)
    tier.close()


@pytest.fixture
def remote(tmp_path):
    return TierName("remote", f"file://{tmp_path}/remote")


def opened(made, manifest=None, repair=None):
    """(payloads of all pages as a fresh shard has them, counters)."""
    manifest = manifest or made.manifest
    form = manifest.form
    shard = ContextShard(
        codec(form.codec), form.num_layers, form.num_kv_heads, form.head_dim,
        dtype_of(form.dtype), "cpu", manifest.num_tokens, form.page_tokens,
    )  # fmt: skip
    counters = StoreCounters()
    supply = context_supply(made.store.root, manifest, manifest.pages, counters)
    transfer.load_shard(
        made.store.root, manifest, manifest.pages, shard, supply=supply, repair=repair
    )
    origin, keys = manifest.origin, manifest.keys
    return [bytes(shard.export_page(i, origin, keys).payload) for i in range(len(keys))], counters


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


def flip_on_disk(made, index):
    record = made.manifest.pages[index]
    flip(made.store.folder(made.manifest) / record.segment, record.offset + 4200)


def flip_in_host(made, host, index):
    from pathlib import Path

    tier = HostTier(Path(host.at))
    form = form_id(made.manifest.form, made.manifest.origin)
    reader = tier.reading(form, made.manifest.pages)
    reader._frame(made.manifest.pages[index])[4300] ^= 1
    reader.close()
    tier.close()


def test_a_context_goes_round_all_tiers_bit_for_bit(tmp_path, host, remote):
    made = make_context(tmp_path / "store")
    wanted, _ = opened(made)
    folder = made.store.folder(made.manifest)
    for to in (host, remote, DISK, remote, host, DISK):
        move(made.store, made.manifest.context_id, to)
        manifest = made.store.manifest(made.manifest.context_id)
        assert read_placement(folder) == Placement((to,))
        payloads, counters = opened(made, manifest)
        assert payloads == wanted
        assert counters.snapshot()["verified"] == {to.kind: 5}
        assert bool(list(folder.glob("*.seg"))) == (to == DISK)
        assert made.store.verify(manifest.context_id).ok


def test_the_nearest_tier_is_asked_first_and_the_next_where_it_is_wrong(tmp_path, host, remote):
    made = make_context(tmp_path / "store")
    wanted, _ = opened(made)
    for to in (remote, host):
        move(made.store, made.manifest.context_id, to, keep=True)
    payloads, counters = opened(made)
    assert payloads == wanted
    assert counters.snapshot()["verified"] == {"host": 5}
    for index in (1, 2):
        flip_in_host(made, host, index)
    flip_on_disk(made, 2)
    payloads, counters = opened(made)
    assert payloads == wanted
    assert counters.snapshot() == {
        "verified": {"host": 3, "disk": 1, "remote": 1},
        "quarantined": {"host": 2, "disk": 1},
        "repaired": {},
        "recomputed": {},
    }
    reasons = [
        json.loads(path.read_text()) for path in (tmp_path / "store/quarantine").glob("*.json")
    ]
    assert sorted(reason["road"] for reason in reasons) == ["disk", "host", "host"]
    assert all("xxh3-128 differs" in reason["what"] for reason in reasons)
    assert len(list((tmp_path / "store/quarantine").glob("*.frame"))) == 3
    payloads, counters = opened(made)  # not asked again for what is in quarantine
    assert payloads == wanted
    assert counters.total("quarantined") == 0
    report = made.store.verify(made.manifest.context_id)
    assert len(report.bad_pages) == 3


def test_what_is_wrong_everywhere_is_an_error_that_names_every_road(tmp_path, remote):
    made = make_context(tmp_path / "store")
    move(made.store, made.manifest.context_id, remote, keep=True)
    flip_on_disk(made, 3)
    (pack,) = (tmp_path / "remote/packs").glob("*.pack")
    flip(pack, 3 * made.manifest.pages[0].frame_bytes + 5000)
    with pytest.raises(CorruptPage, match=r"cannot be had: .*differs.*; .*differs"):
        opened(made)


def test_what_no_tier_has_is_handed_to_repair_and_verified(tmp_path):
    made = make_context(tmp_path / "store")
    wanted, _ = opened(made)
    lost = [1, 4]
    for index in lost:
        flip_on_disk(made, index)
    asked = []
    pages = {
        page.header.key: page
        for shard in made.shards
        for page in (
            shard.export_page(i, made.manifest.origin, made.manifest.keys)
            for i in range(len(shard.pages()))
        )
    }

    def repair(records):
        asked.extend(records)
        return [pages[record.key] for record in records]

    payloads, counters = opened(made, repair=repair)
    assert payloads == wanted
    assert asked == [made.manifest.pages[index] for index in lost]
    assert counters.total("repaired") == 2
    other = pages[made.manifest.pages[1].key]
    bad = other._replace(payload=memoryview(bytes(other.payload.nbytes)))
    with pytest.raises(CorruptPage, match="xxh3-128"):
        opened(made, repair=lambda records: [bad])
    with pytest.raises(CorruptPage, match="quarantine"):
        opened(made, repair=lambda records: [])


def test_a_host_store_that_is_gone_is_passed_over(tmp_path, remote):
    made = make_context(tmp_path / "store")
    gone = TierName("host", str(tmp_path / "nobody"))
    from ringspan.kvstore.tiers.placement import write_placement

    write_placement(made.store.folder(made.manifest), Placement((gone, DISK)))
    payloads, counters = opened(made)
    assert len(payloads) == 5
    assert counters.snapshot()["verified"] == {"disk": 5}
    write_placement(made.store.folder(made.manifest), Placement((gone,)))
    with pytest.raises(StoreError, match="is it running"):
        opened(made)


def test_a_move_that_fails_leaves_the_context_where_it_was(tmp_path, remote, monkeypatch):
    made = make_context(tmp_path / "store")
    flip_on_disk(made, 2)
    with pytest.raises(CorruptPage):
        move(made.store, made.manifest.context_id, remote)
    assert read_placement(made.store.folder(made.manifest)) == Placement()
    assert len(list(made.store.folder(made.manifest).glob("*.seg"))) == 3


def test_pages_that_another_context_has_too_stay(tmp_path, remote):
    """The same tokens and one more page: the keys of the first pages are the same."""
    made = make_context(tmp_path / "a")
    move(made.store, made.manifest.context_id, remote)
    twin = make_context(tmp_path / "b")
    move(twin.store, twin.manifest.context_id, remote)
    assert RemoteTier(remote.at).stat().pages == 5
    other = make_context(tmp_path / "a", seed=1)
    move(other.store, other.manifest.context_id, remote)
    assert forget(other.store, other.manifest.context_id) == []
    assert RemoteTier(remote.at).stat().pages == 5
    assert opened(made)[1].snapshot()["verified"] == {"remote": 5}


def test_a_pinned_context_is_not_removed(tmp_path):
    made = make_context(tmp_path / "store")
    name = made.manifest.context_id
    pin(made.store, name, pinned=True)
    with pytest.raises(BadInput, match=f"is pinned: ringspan contexts pin {name} --off"):
        forget(made.store, name)
    pin(made.store, name, pinned=False)
    assert forget(made.store, name) == []
    assert made.store.ids() == []


@pytest.mark.parametrize("text", ["", "tape", "remote", "remote:", "host:relative", "disk:x"])
def test_a_tier_that_does_not_exist_is_refused(text):
    with pytest.raises(BadInput, match="wanted host, disk or remote:URL"):
        tier_name(text, "/dev/shm/x")
