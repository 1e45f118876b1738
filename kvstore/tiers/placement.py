"""Which tiers hold a context, beside its manifest: ROOT/contexts/<id>/tiers.json.

A context without that file lies in its own segments. Tiers are asked in the order host, disk,
remote; what is said here is where to look, never that a page there is good.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.rebuild import ParityReader, has_parity
from ringspan.kvstore.side_file import mend_side_file, read_side_file, write_side_file
from ringspan.kvstore.supply import Supply
from ringspan.kvstore.tiers.base import PageMissing, form_id
from ringspan.kvstore.tiers.counters import COUNTERS, StoreCounters
from ringspan.kvstore.tiers.disk import DISK, SegmentReader
from ringspan.kvstore.tiers.host import HOST, HostTier
from ringspan.kvstore.tiers.quarantine import Quarantine
from ringspan.kvstore.tiers.remote import REMOTE, RemoteTier
from ringspan.kvstore.tokens import TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.page import PageHeader
    from ringspan.kvstore.tiers.base import Reader, Tier

FILE = "tiers.json"
ORDER = (HOST, DISK, REMOTE)


class TierName(msgspec.Struct, frozen=True, order=True):
    """`disk`, `host` (at: the store's folder) or `remote` (at: its URL)."""

    kind: str
    at: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.at}" if self.at else self.kind


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a context lies."""

    tiers: tuple[TierName, ...] = (TierName(DISK),)
    pinned: bool = False
    """Neither evicted nor removed before it is unpinned."""


def tier_name(text: str, host_folder: str) -> TierName:
    """Of `host`, `disk` or `remote:URL`, as a person gives it. Raises BadInput."""
    kind, _, at = text.partition(":")
    if text == DISK:
        return TierName(DISK)
    if kind == HOST and not (at and not at.startswith("/")):
        return TierName(HOST, at or host_folder)
    if kind == REMOTE and at:
        return TierName(REMOTE, at)
    raise BadInput(f"tier {text!r}: wanted host, disk or remote:URL (remote:s3://bucket/folder)")


def open_tier(name: TierName) -> Tier:
    """A tier that holds pages by key; `disk` is none of them: a context has its own segments."""
    if name.kind == HOST:
        return HostTier(Path(name.at))
    if name.kind == REMOTE:
        return RemoteTier(name.at)
    raise ValueError(f"tier {name} is not opened by name")


def read_placement(folder: Path) -> Placement:
    """Of the context in `folder`. Raises `StoreError` for a file that cannot be read."""
    return read_side_file(folder / FILE, Placement) or Placement()


def write_placement(folder: Path, placement: Placement) -> None:
    """In one step."""
    write_side_file(folder / FILE, placement)


def mend_placement(folder: Path) -> tuple[str, ...]:
    """`tiers.json` from its copy; where neither is whole and the context's own segments are there,
    as a context that lies on disk. The name if it was written. Raises `StoreError` where nothing
    says where the pages are."""
    try:
        return mend_side_file(folder / FILE, Placement)
    except StoreError:
        if next(folder.glob("*.seg"), None) is None:
            raise
    write_placement(folder, Placement())
    return (FILE,)


def note_use(folder: Path) -> None:
    """The context in `folder` was read just now: its tokens' access time says so to eviction."""
    path = folder / TOKENS
    with contextlib.suppress(OSError):  # a store that is only read remembers nothing
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def last_used_s(folder: Path) -> float:
    """Seconds since 1970; 0 where it cannot be told."""
    try:
        return (folder / TOKENS).stat().st_atime
    except OSError:
        return 0.0


def context_supply(
    root: Path,
    manifest: Manifest,
    records: Sequence[PageRecord],
    counters: StoreCounters = COUNTERS,
) -> Supply:
    """The roads to these pages of a stored context, nearest first; parity, if it has any, last."""
    folder = root / "contexts" / manifest.context_id
    names = read_placement(folder).tiers
    readers = [
        reader_of(name, folder, manifest, records)
        for name in sorted(names, key=lambda name: ORDER.index(name.kind))
    ]
    quarantine = Quarantine(root)
    tiers = Supply(manifest, readers, quarantine, counters)
    if not has_parity(folder):
        return tiers
    return Supply(manifest, [*readers, ParityReader(folder, tiers)], quarantine, counters)


def reader_of(
    name: TierName, folder: Path, manifest: Manifest, records: Sequence[PageRecord]
) -> Reader:
    """Of one tier; of one that cannot be reached, a reader that says so for every page."""
    if name.kind == DISK:
        return SegmentReader(folder)
    try:
        form = form_id(manifest.form, manifest.origin)
        if name.kind == REMOTE:
            return RemoteTier(name.at).reading(form, records)
        reader = HostTier(Path(name.at)).reading(form, records)
        reader.owns_tier = True
        return reader
    except (StoreError, BadInput) as error:
        return _Unreachable(name, str(error))


class _Unreachable:
    """Holds no page, and says why."""

    def __init__(self, name: TierName, why: str) -> None:
        self.road = name.kind
        self._name, self._why = name, why

    def where(self, record: PageRecord) -> str:
        return str(self._name)

    def place(self, record: PageRecord) -> str:
        return str(self._name)

    def head(self, record: PageRecord) -> PageHeader:
        raise PageMissing(self._why)

    def payload(self, record: PageRecord, room: memoryview, first: int = 0) -> None:
        raise PageMissing(self._why)

    def close(self) -> None:
        pass
