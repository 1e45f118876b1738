"""A stored context made whole again in place.

Pages that are damaged where they lie are had by another road, in the order of the roads (another
tier, parity), and written anew; those that no road has are left to be computed again. New frames go
to new segments of the context's folder; then one rename of its manifest makes them its pages. Who
reads by the old manifest meanwhile reads the old frames, which stay.

A new segment is named after the rank whose page it replaces, so that the stripes of parity, which
take one page of each rank, stay as they are.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import msgspec

from ringspan.errors import CorruptPage, StoreError
from ringspan.kvstore import staging
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.manifest import MANIFEST, Manifest, encode_manifest, read_manifest, sealed
from ringspan.kvstore.page import Page, verify_sums
from ringspan.kvstore.parity import (
    check_rows,
    covered_pages,
    parity_path,
    parity_rows,
    stripes,
    write_parity,
    write_parity_rows,
)
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.segment import SegmentWriter, store_error
from ringspan.kvstore.tiers.counters import COUNTERS, StoreCounters
from ringspan.kvstore.tiers.disk import DISK
from ringspan.kvstore.tiers.placement import (
    TierName,
    context_supply,
    read_placement,
    write_placement,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.folder import Store


class Mended(msgspec.Struct, frozen=True, kw_only=True):
    """What `mend_stored` did."""

    manifest: Manifest
    roads: dict[str, int]
    """Pages written anew, by the road they were had by."""
    lost: tuple[PageRecord, ...]
    """No road has them."""


class PageWriter:
    """Frames that take the place of others, in new segments of a context's folder.

    Leaving it makes them durable, or by an error removes them. nonce: of the segments' names.
    """

    def __init__(self, folder: Path, nonce: str) -> None:
        self._folder, self._nonce = folder, nonce
        self._segments: dict[str, SegmentWriter] = {}
        self.records: tuple[PageRecord, ...] = ()

    def append(self, old: PageRecord, page: Page) -> None:
        """`page` instead of the frame at `old`."""
        home = old.segment.split(".")[0]
        if home not in self._segments:
            path = self._folder / f"{home}.{self._nonce}.seg"
            self._segments[home] = SegmentWriter(path)
        self.records = (*self.records, self._segments[home].append(page))

    def __enter__(self) -> PageWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                for segment in self._segments.values():
                    segment.close()
        except BaseException:
            self.discard()
            raise
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Remove what was written."""
        for segment in self._segments.values():
            segment.discard()


def mend_stored(
    store: Store,
    manifest: Manifest,
    damaged: Sequence[PageRecord],
    counters: StoreCounters = COUNTERS,
) -> Mended:
    """Writes the pages `damaged` anew from wherever they can be had, verified, and republishes.

    Raises `StoreError` where nothing can be written; the context is then as it was.
    """
    folder, form = store.folder(manifest), manifest.form
    lost: list[PageRecord] = []
    roads: dict[str, int] = {}
    with (
        context_supply(store.root, manifest, damaged, counters) as supply,
        PageWriter(folder, f"r{secrets.token_hex(4)}") as writer,
    ):
        for record in damaged:
            room = memoryview(bytearray(aligned(record.payload_bytes)))
            try:
                had = supply.page(record, room)
                payload = room[: record.payload_bytes]
                sums = payload_sums(payload, form.specs, form.num_layers, record.span.tokens)
                verify_sums(had.header, sums)
            except (CorruptPage, StoreError):
                lost.append(record)
                continue
            writer.append(record, Page(had.header, payload))
            road = supply.road(had.road)
            roads[road] = roads.get(road, 0) + 1
    if writer.records:
        manifest = republish(store, manifest, writer.records)
    return Mended(manifest=manifest, roads=roads, lost=tuple(lost))


def republish(store: Store, manifest: Manifest, records: Sequence[PageRecord]) -> Manifest:
    """The context with `records` instead of its own of the same pages; one rename.

    The frames must be durable. Raises `StoreError`, also where the context has changed since
    `manifest` was read; it is then as it was.
    """
    folder = store.folder(manifest)
    new = {record.key: record for record in records}
    pages = tuple(new.get(record.key, record) for record in manifest.pages)
    mended = sealed(msgspec.structs.replace(manifest, pages=pages))
    if read_manifest(folder).checksum != manifest.checksum:
        raise StoreError(
            f"context {manifest.context_id} was changed while it was repaired: repair it again"
        )
    part = folder / f"{MANIFEST}.{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            file.write(encode_manifest(mended))
            file.flush()
            os.fsync(file.fileno())
        _on_disk_too(folder)
        os.replace(part, folder / MANIFEST)
        staging.sync_folder(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise store_error(error, "cannot republish in", folder) from None
    return mended


def _on_disk_too(folder: Path) -> None:
    """The new frames lie in the context's own folder, whatever tier has the others."""
    placement = read_placement(folder)
    if not any(tier.kind == DISK for tier in placement.tiers):
        tiers = (*placement.tiers, TierName(DISK))
        write_placement(folder, msgspec.structs.replace(placement, tiers=tiers))


def mend_parity(store: Store, manifest: Manifest, rows: int | None = None) -> int:
    """Parity for the pages that have none (any more); how many stripes were written.

    rows: from now on; None: as many as the context has. Raises `CorruptPage`, `StoreError`.
    """
    folder = store.folder(manifest)
    rows = parity_rows(folder) if rows is None else rows
    check_rows(rows)
    if not rows:
        return 0
    covered = covered_pages(folder, manifest.pages)[0]
    wanted = [
        (stripe, row)
        for row in range(rows)
        for stripe in stripes(manifest.pages)
        if not covered[row].issuperset((record.key, record.xxh3) for record in stripe)
    ]
    if wanted:
        path = parity_path(folder, f"r{secrets.token_hex(4)}")
        with context_supply(store.root, manifest, manifest.pages, StoreCounters()) as supply:
            write_parity(path, supply, wanted)
    write_parity_rows(folder, rows)
    return len(wanted)
