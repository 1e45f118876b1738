"""Contexts from tier to tier: copied, read back and verified there, and only then dropped here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ringspan.errors import BadInput, StoreError, TooLarge
from ringspan.kvstore.folder import Store, segment_path
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.manifest import cipher_for
from ringspan.kvstore.page import Page, verify_sums
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.segment import SegmentWriter
from ringspan.kvstore.supply import NO_QUARANTINE, Supply
from ringspan.kvstore.tiers.base import PageId, form_id
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.disk import DISK
from ringspan.kvstore.tiers.evicting import InUse, Limits, make_room, nobody
from ringspan.kvstore.tiers.host import HOST
from ringspan.kvstore.tiers.placement import (
    Placement,
    TierName,
    context_supply,
    open_tier,
    read_placement,
    reader_of,
    write_placement,
)
from ringspan.kvstore.tiers.remote import REMOTE

if TYPE_CHECKING:
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.tiers.base import Tier

Progress = Callable[[int, int], None]
"""(pages done, pages in all)."""


def move(
    store: Store,
    name: str,
    to: TierName,
    *,
    keep: bool = False,
    progress: Progress | None = None,
    limits: Limits | None = None,
    in_use: InUse = nobody,
) -> Placement:
    """All pages of a context (id or prefix) to a tier; from where they were they go, unless `keep`.

    Every page is verified as it is read, and once more as the tier gives it back. A host store that
    has no room for them, or a tier beyond its `limits`, gives up copies that are elsewhere too and
    not in use (`evicting`). Raises `CorruptPage`, `StoreError`, `TooLarge` beyond the limits; the
    context is then where it was.
    """
    manifest = store.manifest(name)
    folder = store.folder(manifest)
    before = read_placement(folder)
    if to not in before.tiers:
        if limits is not None and to.kind != REMOTE:
            coming = {manifest.namespace: _coming_bytes(manifest, to)}
            make_room(store, to, coming, limits, keep=(manifest.context_id,), in_use=in_use)
        if to.kind == DISK:
            manifest = _to_segments(store, manifest, progress)
        else:
            _to_tier(store, manifest, to, progress, in_use)
    _verify_at(store, manifest, to)
    both = tuple(dict.fromkeys((*before.tiers, to)))
    write_placement(folder, msgspec.structs.replace(before, tiers=both))
    if keep:
        return read_placement(folder)
    after = msgspec.structs.replace(before, tiers=(to,))
    write_placement(folder, after)
    for tier in before.tiers:
        if tier != to:
            _drop_from(store, manifest, tier)
    return after


def pin(store: Store, name: str, pinned: bool) -> Placement:
    """Whether a context (id or prefix) may be removed."""
    folder = store.folder(store.manifest(name))
    placement = msgspec.structs.replace(read_placement(folder), pinned=pinned)
    write_placement(folder, placement)
    return placement


def check_unpinned(store: Store, name: str) -> None:
    """BadInput for a context (its id) that may not be removed."""
    try:
        pinned = read_placement(store.root / "contexts" / name).pinned
    except StoreError:
        return  # what cannot be read pins nothing
    if pinned:
        raise BadInput(f"context {name} is pinned: ringspan contexts pin {name} --off")


def forget(store: Store, name: str) -> list[str]:
    """Remove a context (its id) from the store and from every tier; gives back a line about each
    tier that could not be reached, which keeps its copy. Raises BadInput for a pinned one."""
    folder = store.root / "contexts" / name
    check_unpinned(store, name)
    left: list[str] = []
    manifest: Manifest | None = None
    placement = Placement()
    with contextlib.suppress(StoreError):  # a damaged context can be removed too
        placement = read_placement(folder)
        manifest = store.manifest(name)
    if manifest is not None:
        for tier in placement.tiers:
            if tier.kind == DISK:
                continue
            try:
                _drop_from(store, manifest, tier)
            except (StoreError, BadInput) as error:
                left.append(f"{tier} keeps its copy: {error}")
    store.remove(name)
    return left


def _to_tier(
    store: Store, manifest: Manifest, to: TierName, progress: Progress | None, in_use: InUse
) -> None:
    """A host store that is full is asked once more, after as much of it has gone as is coming."""
    tier = open_tier(to)
    try:
        try:
            tier.put(_pages(store, manifest, progress))
        except StoreError as full:
            if to.kind != HOST or not _made_room(store, manifest, to, tier, in_use):
                raise full from None
            tier.put(_pages(store, manifest, progress))
    finally:
        tier.close()


def _made_room(store: Store, manifest: Manifest, to: TierName, tier: Tier, in_use: InUse) -> bool:
    """Whether enough went. What a store has in slabs of other slots, its bytes do not tell: so it
    is not what would fit that goes, but as much as comes."""
    coming = {manifest.namespace: _coming_bytes(manifest, to)}
    limits = Limits(capacity_bytes=tier.stat().used_bytes)
    try:
        gone = make_room(store, to, coming, limits, keep=(manifest.context_id,), in_use=in_use)
    except TooLarge:
        return False
    return gone.pages > 0


def _coming_bytes(manifest: Manifest, to: TierName) -> int:
    """Of frames that a tier does not hold yet."""
    there = [False] * len(manifest.pages)
    if to.kind == HOST:
        form = form_id(manifest.form, manifest.origin)
        tier = open_tier(to)
        try:
            there = tier.holds([PageId(key, form) for key in manifest.keys])
        finally:
            tier.close()
    pairs = zip(manifest.pages, there, strict=True)
    return sum(record.frame_bytes for record, has in pairs if not has)


def _verify_at(store: Store, manifest: Manifest, to: TierName) -> None:
    """Before anything else is dropped."""
    reader = reader_of(to, store.folder(manifest), manifest, manifest.pages)
    with Supply(manifest, [reader], NO_QUARANTINE, StoreCounters()) as back:
        for record in manifest.pages:
            room = memoryview(bytearray(aligned(record.payload_bytes)))
            back.stored_page(record, room)


def _to_segments(store: Store, manifest: Manifest, progress: Progress | None) -> Manifest:
    """Back to segments of the context's own folder, which is replaced in one step."""
    tokens = store.tokens(manifest)
    placement = read_placement(store.folder(manifest))
    with store.staged(manifest.context_id, tokens, cipher_for(manifest)) as staging:
        with SegmentWriter(segment_path(staging, 0)) as writer:
            records = tuple(writer.append(page) for page in _pages(store, manifest, progress))
        write_placement(Path(staging), placement)
        return store.publish(staging, msgspec.structs.replace(manifest, pages=records))


def _pages(store: Store, manifest: Manifest, progress: Progress | None) -> Iterator[Page]:
    """Every page, verified in full, one at a time."""
    form = manifest.form
    with context_supply(store.root, manifest, manifest.pages) as supply:
        for index, record in enumerate(manifest.pages):
            room = memoryview(bytearray(aligned(record.payload_bytes)))
            header = supply.stored_page(record, room).header
            payload = room[: record.payload_bytes]
            verify_sums(
                header, payload_sums(payload, form.specs, form.num_layers, record.span.tokens)
            )
            yield Page(header, payload)
            if progress is not None:
                progress(index + 1, len(manifest.pages))


def _drop_from(store: Store, manifest: Manifest, tier: TierName) -> None:
    """The context's pages, but those that another context has in the same tier."""
    if tier.kind == DISK:
        for path in store.folder(manifest).glob("*.seg"):
            path.unlink(missing_ok=True)
        return
    form = form_id(manifest.form, manifest.origin)
    shared: set[PageId] = set()
    for other in store.contexts()[0]:
        if other.context_id == manifest.context_id:
            continue
        if tier in read_placement(store.folder(other)).tiers:
            other_form = form_id(other.form, other.origin)
            shared.update(PageId(key, other_form) for key in other.keys)
    opened = open_tier(tier)
    try:
        opened.delete({PageId(key, form) for key in manifest.keys} - shared)
    finally:
        opened.close()
