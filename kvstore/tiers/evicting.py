"""Copies that go from a tier so that others find room: `kvstore.evict` decides, this carries out.

    host    page by page: the pages of a context that are left there are a prefix, the rest of it
            comes by the next road
    disk    context by context: a segment goes with all its pages

What nobody may lose does not go: pages of pinned contexts, pages that the directory counts as in
use, and a copy that is the only one. Where only copies may go (`only_copies`), their contexts are
removed as a whole: one with holes would only be computed again in part. Parity is no copy.
A placement is written before its copies go, so that whoever comes between asks elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.evict import Candidate, Quota, over_quota, quota_victims, recompute_s, victims
from ringspan.kvstore.tiers.base import PageId, form_id
from ringspan.kvstore.tiers.disk import DISK
from ringspan.kvstore.tiers.host import HOST
from ringspan.kvstore.tiers.placement import (
    TierName,
    last_used_s,
    open_tier,
    read_placement,
    write_placement,
)

if TYPE_CHECKING:
    from ringspan.kvstore.folder import Store
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.page import PageForm
    from ringspan.kvstore.tiers.placement import Placement

InUse = Callable[[str, str], int]
"""(namespace's digest, page key) -> references and leases: `Directory.in_use`."""


class Costs(NamedTuple):
    """What having a page again takes, for `evict.recompute_s` and for fetching."""

    linear_flops_per_token: float
    attention_flops_per_pair: float
    flops_per_s: float
    fetch_bytes_per_s: Mapping[str, float]
    """By the kind of tier that it comes from."""


class Limits(NamedTuple):
    """How much a tier may hold: of all, and of each namespace (hex) that has a quota."""

    capacity_bytes: int | None = None
    """None: what the tier says itself, as a host store does."""
    quotas: tuple[Quota, ...] = ()


class Evicted(NamedTuple):
    """What went."""

    pages: int = 0
    size_bytes: int = 0
    contexts: tuple[str, ...] = ()
    """Those of which something went, by id."""


class EvictionCounts:
    """Pages and bytes that went, by tier. Any thread may add."""

    def __init__(self) -> None:
        self._pages: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, kind: str, gone: Evicted) -> None:
        with self._lock:
            self._pages[kind] += gone.pages
            self._bytes[kind] += gone.size_bytes

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """{tier: (pages, bytes)}."""
        with self._lock:
            return {kind: (pages, self._bytes[kind]) for kind, pages in self._pages.items()}


EVICTIONS = EvictionCounts()
"""Of this process."""


def nominal_costs(form: PageForm) -> Costs:
    """For an order where nothing was measured: a dense model with four q heads to a KV head, and
    twelve squares of its width a layer, on a device of 100 TFLOP/s."""
    width = 4 * form.num_kv_heads * form.head_dim
    return Costs(
        linear_flops_per_token=24.0 * form.num_layers * width * width,
        attention_flops_per_pair=4.0 * form.num_layers * width,
        flops_per_s=1e14,
        fetch_bytes_per_s={HOST: 1e10, DISK: 1e9, "remote": 1e8},
    )


def nobody(namespace: str, key: str) -> int:
    """For a store that no directory knows."""
    return 0


def make_room(
    store: Store,
    tier: TierName,
    coming: Mapping[str, int],
    limits: Limits | None = None,
    *,
    keep: Collection[str] = (),
    only_copies: bool = False,
    in_use: InUse = nobody,
    costs: Callable[[PageForm], Costs] = nominal_costs,
    now_s: float | None = None,
    counts: EvictionCounts = EVICTIONS,
) -> Evicted:
    """What must go from the tier so that `coming` (bytes by namespace, hex) fits within `limits`,
    goes; nothing where it fits.

    keep: contexts (ids) of which nothing may go. now_s: seconds since 1970; None: now. Raises
    `TooLarge` where what may go is not enough, `BadInput` for more than a whole quota: then nothing
    went; `StoreError` where the tier cannot be reached.
    """
    if tier.kind not in (HOST, DISK):
        raise BadInput(f"tier {tier}: room is made on disk and in host stores, not there")
    limits, now_s = limits or Limits(), time.time() if now_s is None else now_s
    copies = _Copies(store, tier, frozenset(keep), only_copies, in_use, costs)
    try:
        copies.look()
        gone = copies.drop(_chosen(copies, coming, limits, now_s))
    finally:
        copies.close()
    counts.add(tier.kind, gone)
    return gone


def _chosen(
    copies: _Copies, coming: Mapping[str, int], limits: Limits, now_s: float
) -> frozenset[str]:
    """Keys of the candidates that go, first for the quotas, then for the tier."""
    going: dict[str, int] = {}
    if limits.quotas:
        over = over_quota(copies.used_bytes, limits.quotas, coming)
        going = {one.key: one.size_bytes for one in quota_victims(copies.candidates, over, now_s)}
    capacity = copies.capacity_bytes if limits.capacity_bytes is None else limits.capacity_bytes
    if capacity is not None:
        need = copies.held_bytes + sum(coming.values()) - capacity - sum(going.values())
        left = [candidate for candidate in copies.candidates if candidate.key not in going]
        going |= {one.key: one.size_bytes for one in victims(left, need, now_s)}
    return frozenset(going)


class _Held(NamedTuple):
    """A context that has copies in the tier."""

    manifest: Manifest
    placement: Placement
    form: str
    elsewhere: frozenset[str]
    """Keys of its pages that another of its tiers holds."""


class _Copies:
    """What one tier has of the contexts of a store."""

    def __init__(
        self,
        store: Store,
        tier: TierName,
        keep: frozenset[str],
        only_copies: bool,
        in_use: InUse,
        costs: Callable[[PageForm], Costs],
    ) -> None:
        self._store, self._tier = store, tier
        self._keep, self._only_copies = keep, only_copies
        self._in_use, self._costs = in_use, costs
        self._opened = open_tier(tier) if tier.kind == HOST else None
        self._held: list[_Held] = []
        self._pages: dict[str, tuple[PageId, tuple[str, ...]]] = {}
        """By a candidate's key: a page and the contexts that have it here."""
        self.used_bytes: Counter[str] = Counter()
        """By namespace."""
        self.held_bytes = 0
        self.capacity_bytes: int | None = None
        self.candidates: list[Candidate] = []

    def look(self) -> None:
        """What is there, and what of it could go."""
        found = map(self._of, self._store.contexts()[0])
        self._held = [held for held in found if held is not None]
        self.candidates = list(self._on_disk() if self._opened is None else self._on_host())
        if self._opened is not None:
            stat = self._opened.stat()
            self.held_bytes, self.capacity_bytes = stat.used_bytes, stat.capacity_bytes

    def _of(self, manifest: Manifest) -> _Held | None:
        try:
            placement = read_placement(self._store.folder(manifest))
        except StoreError:
            return None  # nobody knows what it has here
        if self._tier not in placement.tiers:
            return None
        form = form_id(manifest.form, manifest.origin)
        elsewhere: set[str] = set()
        for name in placement.tiers:
            if name != self._tier:
                elsewhere |= self._keys_at(name, manifest, form)
        return _Held(manifest, placement, form, frozenset(elsewhere))

    def _keys_at(self, name: TierName, manifest: Manifest, form: str) -> set[str]:
        """Pages that another tier holds; of one that cannot be asked, none."""
        if name.kind == DISK:
            sizes = {
                path.name: path.stat().st_size
                for path in self._store.folder(manifest).glob("*.seg")
            }
            return {
                page.key
                for page in manifest.pages
                if sizes.get(page.segment, 0) >= page.offset + page.frame_bytes
            }
        try:
            tier = open_tier(name)
            try:
                held = tier.holds([PageId(key, form) for key in manifest.keys])
            finally:
                tier.close()
        except (StoreError, BadInput):
            return set()
        return {key for key, has in zip(manifest.keys, held, strict=True) if has}

    def _uses(self, held: _Held, key: str) -> int:
        """References, leases, and a pin."""
        manifest = held.manifest
        stays = held.placement.pinned or manifest.context_id in self._keep
        return int(stays) + self._in_use(manifest.origin.namespace, key)

    def _on_disk(self) -> Iterator[Candidate]:
        for held in self._held:
            manifest = held.manifest
            size = sum(page.frame_bytes for page in manifest.pages)
            self.used_bytes[manifest.namespace] += size
            self.held_bytes += size
            alone = not held.elsewhere.issuperset(manifest.keys)
            uses = max(self._uses(held, key) for key in manifest.keys)
            yield self._whole(held, size, alone, uses + int(alone and not self._only_copies))

    def _on_host(self) -> Iterator[Candidate]:
        """Pages that are elsewhere too, and contexts of which this is the only copy."""
        assert self._opened is not None
        having: dict[PageId, list[tuple[_Held, int]]] = {}
        for held in self._held:
            ids = [PageId(key, held.form) for key in held.manifest.keys]
            for index, (page, here) in enumerate(zip(ids, self._opened.holds(ids), strict=True)):
                if here:
                    having.setdefault(page, []).append((held, index))
        alone: dict[str, tuple[_Held, int, int]] = {}
        for page, owners in having.items():
            size = owners[0][0].manifest.pages[owners[0][1]].frame_bytes
            for namespace in {held.manifest.namespace for held, _ in owners}:
                self.used_bytes[namespace] += size
            uses = sum(self._uses(held, page.key) for held, _ in owners)
            bare = [held for held, _ in owners if page.key not in held.elsewhere]
            if not bare:
                yield self._page(page, owners, size, uses)
            for held in bare:
                name = held.manifest.context_id
                _, bytes_, most = alone.get(name, (held, 0, 0))
                shared = 0 if len(owners) > 1 else size  # frees nothing alone
                alone[name] = (held, bytes_ + shared, max(most, uses))
        for held, size, uses in alone.values():
            yield self._whole(held, size, True, uses + int(not self._only_copies))

    def _page(
        self, page: PageId, owners: list[tuple[_Held, int]], size: int, uses: int
    ) -> Candidate:
        name = f"{page.key} {page.form}"
        self._pages[name] = (page, tuple(held.manifest.context_id for held, _ in owners))
        held, index = owners[0]
        costs = self._costs(held.manifest.form)
        folders = [self._store.folder(held.manifest) for held, _ in owners]
        refetch_s = self._refetch_s(held, size, costs)
        return Candidate(
            key=name,
            namespace=held.manifest.namespace,
            position=index,
            size_bytes=size,
            # what another tier has is fetched, even where computing it would be quicker
            recompute_s=max(_recompute_s(held.manifest, index, costs), refetch_s),
            refetch_s=refetch_s,
            last_used_s=max(map(last_used_s, folders)),
            in_use=uses,
        )

    def _whole(self, held: _Held, size: int, alone: bool, uses: int) -> Candidate:
        manifest = held.manifest
        costs = self._costs(manifest.form)
        again_s = sum(_recompute_s(manifest, i, costs) for i in range(len(manifest.pages)))
        refetch_s = None if alone else self._refetch_s(held, size, costs)
        return Candidate(
            key=manifest.context_id,
            namespace=manifest.namespace,
            position=0,
            size_bytes=size,
            recompute_s=max(again_s, refetch_s or 0.0),
            refetch_s=refetch_s,
            last_used_s=last_used_s(self._store.folder(manifest)),
            in_use=uses,
        )

    def _refetch_s(self, held: _Held, size: int, costs: Costs) -> float:
        """From the fastest of the other tiers."""
        others = [name.kind for name in held.placement.tiers if name != self._tier]
        return size / max(costs.fetch_bytes_per_s[kind] for kind in others)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def drop(self, keys: Collection[str]) -> Evicted:
        """These candidates."""
        chosen = [candidate for candidate in self.candidates if candidate.key in keys]
        pages = [self._pages[one.key] for one in chosen if one.key in self._pages]
        wholes = {one.key for one in chosen if one.key not in self._pages}
        touched = {name for _, names in pages for name in names} | wholes
        count = len(pages)
        if pages and self._opened is not None:
            self._opened.delete([page for page, _ in pages])
        for held in self._held:
            if held.manifest.context_id in wholes:
                count += len(held.manifest.pages)
                self._drop_whole(held)
        return Evicted(count, sum(one.size_bytes for one in chosen), tuple(sorted(touched)))

    def _drop_whole(self, held: _Held) -> None:
        """The context's copy here, or the context where it has no other."""
        from ringspan.kvstore.tiers.moving import forget  # which makes room by this module

        if not held.elsewhere.issuperset(held.manifest.keys):
            forget(self._store, held.manifest.context_id)
            return
        folder = self._store.folder(held.manifest)
        others = tuple(name for name in held.placement.tiers if name != self._tier)
        write_placement(folder, msgspec.structs.replace(held.placement, tiers=others))
        for path in folder.glob("*.seg"):
            path.unlink(missing_ok=True)


def _recompute_s(manifest: Manifest, index: int, costs: Costs) -> float:
    return recompute_s(
        index,
        manifest.page_tokens,
        linear_flops_per_token=costs.linear_flops_per_token,
        attention_flops_per_pair=costs.attention_flops_per_pair,
        flops_per_s=costs.flops_per_s,
    )
