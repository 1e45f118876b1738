"""Room in a tier is made of what is elsewhere and unused; nothing else goes, nothing is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringspan.cluster import host_store
from ringspan.errors import BadInput, StoreError, TooLarge
from ringspan.kvstore.evict import Quota
from ringspan.kvstore.testing import make_context, open_shard
from ringspan.kvstore.tiers import host_wire as wire
from ringspan.kvstore.tiers.base import PageId, form_id
from ringspan.kvstore.tiers.evicting import EvictionCounts, Limits, make_room
from ringspan.kvstore.tiers.host import HostTier
from ringspan.kvstore.tiers.moving import move, pin
from ringspan.kvstore.tiers.placement import TierName, last_used_s, read_placement

DISK = TierName("disk")
NOW_S = 2_000_000_000.0


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


@pytest.fixture
def contexts(tmp_path):
    """Three of five pages, the first one used last."""
    made = [make_context(tmp_path / "store", seed=seed) for seed in range(3)]
    for age, one in enumerate(made):
        used(one, NOW_S - 3600.0 * age)
    return made


def used(made, at_s):
    path = made.store.folder(made.manifest) / "tokens.npy"
    os.utime(path, (at_s, path.stat().st_mtime))


def frames(made):
    return sum(page.frame_bytes for page in made.manifest.pages)


def held(tier, made):
    """Which of its pages the tier holds."""
    manifest = made.manifest
    form = form_id(manifest.form, manifest.origin)
    opened = HostTier(Path(tier.at))
    try:
        return opened.holds([PageId(key, form) for key in manifest.keys])
    finally:
        opened.close()


def evict(contexts, tier, capacity, *, coming=0, **more):
    counts = more.pop("counts", EvictionCounts())
    limits = Limits(capacity, more.pop("quotas", ()))
    namespace = contexts[0].manifest.namespace
    return make_room(
        contexts[0].store, tier, {namespace: coming}, limits, now_s=NOW_S, counts=counts, **more
    )


def tiers_of(made):
    return read_placement(made.store.folder(made.manifest)).tiers


def opens(made):
    return open_shard(made, made.manifest.pages).num_tokens == made.manifest.num_tokens


def test_the_least_used_pages_leave_the_host_the_last_of_each_context_first(contexts, host):
    for made in contexts:
        move(made.store, made.manifest.context_id, host, keep=True)
    page = max(record.frame_bytes for record in contexts[2].manifest.pages)
    everything = sum(map(frames, contexts))
    counts = EvictionCounts()
    gone = evict(contexts, host, everything, coming=2 * page, counts=counts)
    assert 2 <= gone.pages <= 3
    assert gone.size_bytes >= 2 * page
    assert gone.contexts == (contexts[2].manifest.context_id,)
    assert counts.snapshot() == {"host": (gone.pages, gone.size_bytes)}
    left = held(host, contexts[2])
    assert left == [True] * (5 - gone.pages) + [False] * gone.pages
    assert all(all(held(host, made)) for made in contexts[:2])
    assert all(map(opens, contexts))


def test_nothing_goes_where_there_is_room(contexts, host):
    for made in contexts:
        move(made.store, made.manifest.context_id, host, keep=True)
    assert evict(contexts, host, 1 << 30).pages == 0
    assert evict(contexts, DISK, 1 << 30).pages == 0


@pytest.mark.parametrize("why", ["pinned", "kept", "referred to", "the only copy"])
def test_what_may_not_go_stays(contexts, host, why):
    kept = contexts[2]
    name = kept.manifest.context_id
    for made in contexts:
        move(made.store, made.manifest.context_id, host, keep=made is not kept or why[0] != "t")
    more = {}
    if why == "pinned":
        pin(kept.store, name, pinned=True)
    elif why == "kept":
        more["keep"] = (name,)
    elif why == "referred to":
        digest = kept.manifest.origin.namespace
        more["in_use"] = lambda ns, key: int(ns == digest and key in kept.manifest.keys)
    everything = sum(map(frames, contexts))
    gone = evict(contexts, host, everything, coming=frames(contexts[1]), **more)
    assert gone.contexts == (contexts[1].manifest.context_id,)
    assert all(held(host, kept))
    with pytest.raises(TooLarge, match="are in use"):
        evict(contexts, host, 0, **more)
    assert all(held(host, kept))
    assert all(held(host, contexts[0]))
    assert all(map(opens, contexts))


def test_a_disk_over_its_quota_gives_up_whole_copies_that_are_elsewhere(contexts, remote):
    for made in contexts[:2]:
        move(made.store, made.manifest.context_id, remote, keep=True)
    everything = sum(map(frames, contexts))
    gone = evict(contexts, DISK, everything - 1)
    older = contexts[1]
    assert gone == (5, frames(older), (older.manifest.context_id,))
    assert tiers_of(older) == (remote,)
    assert not list(older.store.folder(older.manifest).glob("*.seg"))
    assert all(map(opens, contexts))
    with pytest.raises(TooLarge):  # the third one has no other copy
        evict(contexts, DISK, frames(contexts[2]) - 1)
    assert all(map(opens, contexts))


def test_a_copy_said_to_be_elsewhere_that_is_not_counts_for_nothing(contexts, remote):
    made = contexts[1]
    move(made.store, made.manifest.context_id, remote, keep=True)
    for path in sorted(Path(remote.at.removeprefix("file://")).rglob("*")):
        if path.is_file():
            path.unlink()
    with pytest.raises(TooLarge):
        evict(contexts, DISK, 0)
    assert all(map(opens, contexts))


def test_told_so_only_copies_go_as_whole_contexts(contexts):
    everything = sum(map(frames, contexts))
    gone = evict(contexts, DISK, everything - 1, only_copies=True)
    assert gone.contexts == (contexts[2].manifest.context_id,)
    assert len(contexts[0].store.ids()) == 2
    assert all(map(opens, contexts[:2]))


def test_a_namespace_stays_within_its_quota(contexts, host):
    for made in contexts:
        move(made.store, made.manifest.context_id, host, keep=True)
    namespace = contexts[0].manifest.namespace
    quota = Quota(namespace, frames(contexts[0]) + frames(contexts[1]))
    gone = evict(contexts, host, 1 << 30, quotas=(quota,))
    assert gone.contexts == (contexts[2].manifest.context_id,)
    assert not any(held(host, contexts[2]))
    with pytest.raises(BadInput, match="more than the quota"):
        evict(contexts, host, 1 << 30, coming=1 << 40, quotas=(quota,))


def test_a_full_host_store_takes_a_context_by_giving_up_what_the_disk_has(tmp_path):
    """Through `move`, against a real store that can hold one context and not two."""
    root = tmp_path / "store"
    made = [make_context(root, 3000, 1, page_tokens=64, seed=seed) for seed in (0, 1)]
    folder = tmp_path / "host"
    tier = host_store.host_tier(folder, int(1.5 * frames(made[0])))
    host = TierName("host", str(folder))
    try:
        first, second = (one.manifest.context_id for one in made)
        move(made[0].store, first, host, keep=True)
        move(made[0].store, second, host, keep=True)
        assert all(held(host, made[1]))
        assert not all(held(host, made[0]))
        assert all(map(opens, made))
        pin(made[0].store, second, pinned=True)
        large = make_context(root, 6000, 1, page_tokens=64, seed=2)
        with pytest.raises(StoreError, match="full"):
            move(large.store, large.manifest.context_id, host)
        assert all(held(host, made[1]))
    finally:
        tier._ask(wire.Stop(keep=False), wire.Stated)
        tier.close()


def test_a_context_that_is_opened_is_used(contexts):
    folder = contexts[2].store.folder(contexts[2].manifest)
    used(contexts[2], 5.0)
    assert last_used_s(folder) == 5.0
    assert opens(contexts[2])
    assert last_used_s(folder) > 1e9


def test_room_is_not_made_in_remote_tiers(contexts, remote):
    with pytest.raises(BadInput, match="room is made on disk and in host stores"):
        evict(contexts, remote, 0)
