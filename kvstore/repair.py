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
from ringspan.kvstore.index_copy import write_index_copy
from ringspan.kvstore.manifest import MANIFEST, Manifest, encode_manifest, read_manifest, sealed
from ringspan.kvstore.page import Page, verify_sums
from ringspan.kvstore.parity import (
    check_rows,
    covered_pages,
    parity_path,
    parity_rows,
    stripe_widths,
    stripes,
    write_parity,
    write_parity_rows,
)
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.repair_plan import (
    RECOMPUTE,
    Choice,
    LostRange,
    RepairRates,
    joined,
    plan_repairs,
)
from ringspan.kvstore.segment import SegmentWriter, store_error
from ringspan.kvstore.segment_reader import read_frame
from ringspan.kvstore.tiers.base import page_id
from ringspan.kvstore.tiers.counters import COUNTERS, StoreCounters
from ringspan.kvstore.tiers.disk import DISK
from ringspan.kvstore.tiers.placement import (
    TierName,
    context_supply,
    open_tier,
    read_placement,
    write_placement,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.audit import VerifyReport
    from ringspan.kvstore.encryption import PageCipher
    from ringspan.kvstore.folder import Store
    from ringspan.kvstore.supply import Supply
    from ringspan.types import Span


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
    cipher: for pages that are to be encrypted and are not yet.
    """

    def __init__(self, folder: Path, nonce: str, cipher: PageCipher | None = None) -> None:
        self._folder, self._nonce, self._cipher = folder, nonce, cipher
        self._segments: dict[str, SegmentWriter] = {}
        self.records: tuple[PageRecord, ...] = ()

    def append(self, old: PageRecord, page: Page) -> None:
        """`page` instead of the frame at `old`."""
        home = old.segment.split(".")[0]
        if home not in self._segments:
            path = self._folder / f"{home}.{self._nonce}.seg"
            self._segments[home] = SegmentWriter(path, cipher=self._cipher)
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
    *,
    roads: Mapping[str, str] | None = None,
    tiers: Mapping[str, Sequence[TierName]] | None = None,
) -> Mended:
    """Writes damaged pages anew, from wherever they can be had, verified; republishes the context
    where its own segments changed.

    roads: by key, the road to try first (`repair_plan`), or `RECOMPUTE` to leave a page to that.
    tiers: by key, whose copies are damaged; of a page that is not named, the one on the disk.
    Raises `StoreError` where nothing can be written; the context is then as it was.
    """
    roads, tiers = roads or {}, tiers or {}
    lost: list[PageRecord] = []
    used: dict[str, int] = {}
    loose: dict[TierName, list[Page]] = {}
    with (
        context_supply(store.root, manifest, damaged, counters) as supply,
        PageWriter(store.folder(manifest), f"r{secrets.token_hex(4)}") as writer,
    ):
        for record in damaged:
            had = None
            if roads.get(record.key) != RECOMPUTE:
                had = _had(supply, record, roads.get(record.key))
            if had is None:
                lost.append(record)
                continue
            page, road = had
            used[road] = used.get(road, 0) + 1
            for tier in tiers.get(record.key, (TierName(DISK),)):
                if tier.kind == DISK:
                    writer.append(record, page)
                else:
                    loose.setdefault(tier, []).append(page)
    for tier, pages in loose.items():
        _replace_in(tier, pages)
    if writer.records:
        manifest = republish(store, manifest, writer.records)
    return Mended(manifest=manifest, roads=used, lost=tuple(lost))


def choose_roads(
    store: Store,
    manifest: Manifest,
    report: VerifyReport,
    flops: Callable[[Span], float] = lambda span: 0.0,
    flops_s: float | None = None,
) -> tuple[tuple[Choice, ...], dict[str, str]]:
    """What is best done about the pages that a report names, range by range; the roads by key.

    Reading is taken to be as fast as it was for the report. flops, flops_s: see `plan_repairs`.
    """
    folder = store.folder(manifest)
    bad: dict[str, set[TierName]] = {}
    for page in report.bad_pages:
        bad.setdefault(page.key, set()).add(page.tier)
    records = [record for record in manifest.pages if record.key in bad]
    if not records:
        return (), {}
    names = read_placement(folder).tiers
    widths = stripe_widths(folder, manifest.pages, bad)
    lost = joined(
        [
            LostRange(
                record.span,
                record.payload_bytes,
                tuple(name.kind for name in names if name not in bad[record.key]),
                widths.get(record.key, 0),
            )
            for record in records
        ]
    )
    read_bytes = report.payload_bytes * len(names)
    rates = RepairRates(max(1.0, read_bytes / max(report.elapsed_s, 1e-9)), flops_s=flops_s)
    gone = sum(record.payload_bytes for record in records)
    choices = plan_repairs(lost, rates, flops, manifest.payload_bytes - gone)
    roads = {
        record.key: choice.road
        for choice in choices
        for record in records
        if choice.span.start <= record.span.start < choice.span.stop
    }
    return choices, roads


def _had(supply: Supply, record: PageRecord, road: str | None) -> tuple[Page, str] | None:
    """The page, verified in full, and its road: the one wanted, if it has it."""
    form = supply.manifest.form
    room = memoryview(bytearray(aligned(record.payload_bytes)))
    firsts = (supply.roads.index(road), 0) if road in supply.roads else (0,)
    for first in firsts:
        try:
            had = supply.stored_page(record, room, first)
            payload = room[: record.payload_bytes]
            sums = payload_sums(payload, form.specs, form.num_layers, record.span.tokens)
            verify_sums(had.header, sums)
        except (CorruptPage, StoreError):
            continue
        return Page(had.header, payload), supply.road(had.road)
    return None


def _replace_in(name: TierName, pages: Sequence[Page]) -> None:
    """In a tier that holds pages by key."""
    tier = open_tier(name)
    try:
        tier.delete([page_id(page.header) for page in pages])
        tier.put(pages)
    finally:
        tier.close()


def adopt(store: Store, manifest: Manifest, records: Sequence[PageRecord]) -> Manifest:
    """Pages that were computed again and lie in the context's folder become its pages, in all its
    tiers; where `disk` is none of them the folder keeps none. Raises as `republish` does."""
    folder = store.folder(manifest)
    before = read_placement(folder)
    mended = republish(store, manifest, records)
    loose = [name for name in before.tiers if name.kind != DISK]
    if loose:
        pages = [read_frame(folder / record.segment, record) for record in records]
        for name in loose:
            _replace_in(name, pages)
    if len(loose) == len(before.tiers):
        write_placement(folder, before)
        for segment in {record.segment for record in records}:
            (folder / segment).unlink(missing_ok=True)
    return mended


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
        write_index_copy(folder, mended)
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
