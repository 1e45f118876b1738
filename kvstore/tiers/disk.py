"""Tier `disk`: frames in segment files.

Contexts lie in their own folders (`kvstore.folder`); `SegmentReader` reads these. Pages put by key
alone lie in ROOT/pages/<nonce>.seg, whose frames are the index: a new `DiskTier` reads their
headers. A segment is written under ROOT/staging and appears by one rename; which of its pages were
deleted stands in <nonce>.gone, and it goes when all were.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ringspan.errors import CorruptPage
from ringspan.kvstore import staging
from ringspan.kvstore.direct import DirectFile
from ringspan.kvstore.frame import aligned, decode_head
from ringspan.kvstore.segment import SegmentWriter, store_error
from ringspan.kvstore.segment_reader import scan_heads
from ringspan.kvstore.tiers.base import PageId, PageMissing, TierStat, page_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.page import Page, PageHeader

DISK = "disk"


class Segments:
    """Segment files of one folder, opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, DirectFile] = {}
        self._lock = threading.Lock()

    def file(self, segment: str) -> DirectFile:
        with self._lock:
            if segment not in self._files:
                path = self.folder / segment
                try:
                    self._files[segment] = DirectFile(path)
                except OSError as error:
                    raise store_error(error, "cannot open segment", path) from None
            return self._files[segment]

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()


class SegmentReader:
    """Frames in the segments of one folder, found by their records."""

    road = DISK

    def __init__(self, folder: Path) -> None:
        self._segments = Segments(folder)

    def where(self, record: PageRecord) -> str:
        return f"{self._segments.folder.name}/{record.segment} at byte {record.offset}"

    def place(self, record: PageRecord) -> str:
        try:
            found = (self._segments.folder / record.segment).stat()
        except OSError:
            return f"{record.segment} {record.offset}"
        return f"{found.st_dev}:{found.st_ino}:{found.st_mtime_ns} {record.offset}"

    def head(self, record: PageRecord) -> PageHeader:
        where = self.where(record)
        room = memoryview(bytearray(record.frame_bytes - aligned(record.payload_bytes)))
        self._read(record, room, 0)
        header, head_bytes = decode_head(room, where)
        if head_bytes != room.nbytes:
            raise CorruptPage(f"{where}: the payload begins at {head_bytes}, not at {room.nbytes}")
        return header

    def payload(self, record: PageRecord, room: memoryview, first: int = 0) -> None:
        self._read(record, room, record.frame_bytes - aligned(record.payload_bytes) + first)

    def _read(self, record: PageRecord, room: memoryview, first: int) -> None:
        file = self._segments.file(record.segment)
        try:
            file.read(room, record.offset + first, self.where(record))
        except OSError as error:
            path = self._segments.folder / record.segment
            raise store_error(error, "cannot read", path) from None

    def close(self) -> None:
        self._segments.close()


class _Place(NamedTuple):
    """Where a loose page lies."""

    segment: str
    offset: int
    frame_bytes: int


class DiskTier:
    """Pages by key in ROOT/pages; see the module. Safe for threads of one process."""

    name = DISK

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "pages"
        self._index: dict[PageId, _Place] = {}
        self._lock = threading.Lock()
        for path in sorted(self._folder.glob("*.seg")):
            self._adopt(path)

    def put(self, pages: Iterable[Page]) -> None:
        places: dict[PageId, _Place] = {}
        folder: Path | None = None
        try:
            folder = staging.new_folder(self._root / "staging", "pages")
            target = self._folder / f"{folder.name}.seg"
            with SegmentWriter(folder / target.name) as writer:
                for page in pages:
                    name = page_id(page.header)
                    if name in self._index or name in places:
                        continue
                    record = writer.append(page)
                    places[name] = _Place(target.name, record.offset, record.frame_bytes)
            if places:
                self._folder.mkdir(exist_ok=True)
                os.rename(writer.path, target)
                staging.sync_folder(self._folder)
        except OSError as error:
            raise store_error(error, "cannot put pages in", self._root) from None
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            self._index.update(places)

    def reading(self, form: str, records: Sequence[PageRecord]) -> LooseReader:
        return LooseReader(self._folder, self._found(form, records))

    def _found(self, form: str, records: Sequence[PageRecord]) -> dict[str, _Place]:
        with self._lock:
            ids = ((r.key, PageId(r.key, form)) for r in records)
            return {key: self._index[name] for key, name in ids if name in self._index}

    def holds(self, pages: Iterable[PageId]) -> list[bool]:
        with self._lock:
            return [name in self._index for name in pages]

    def delete(self, pages: Iterable[PageId]) -> None:
        with self._lock:
            gone: dict[str, list[int]] = {}
            for name in pages:
                place = self._index.pop(name, None)
                if place is not None:
                    gone.setdefault(place.segment, []).append(place.offset)
            kept = {place.segment for place in self._index.values()}
        try:
            for segment, offsets in gone.items():
                self._forget(self._folder / segment, offsets, segment in kept)
        except OSError as error:
            raise store_error(error, "cannot delete pages in", self._folder) from None

    def _forget(self, path: Path, offsets: list[int], keeps: bool) -> None:
        list_path = path.with_suffix(".gone")
        if not keeps:
            path.unlink(missing_ok=True)
            list_path.unlink(missing_ok=True)
            return
        part = path.with_suffix(".part")
        part.write_text(json.dumps(sorted({*_gone(list_path), *offsets})))
        os.replace(part, list_path)

    def stat(self) -> TierStat:
        with self._lock:
            used = sum(place.frame_bytes for place in self._index.values())
            return TierStat(len(self._index), used, None)

    def close(self) -> None:
        pass

    def _adopt(self, path: Path) -> None:
        gone = _gone(path.with_suffix(".gone"))
        for header, offset, frame_bytes in scan_heads(path):
            if offset not in gone:
                self._index[page_id(header)] = _Place(path.name, offset, frame_bytes)


def _gone(path: Path) -> set[int]:
    try:
        return set(json.loads(path.read_text()))
    except (OSError, ValueError):
        return set()


class LooseReader(SegmentReader):
    """Frames found by key: a record's own segment and offset say nothing here."""

    def __init__(self, folder: Path, places: dict[str, _Place]) -> None:
        super().__init__(folder)
        self._places = places

    def where(self, record: PageRecord) -> str:
        return super().where(self._here(record))

    def place(self, record: PageRecord) -> str:
        return super().place(self._here(record))

    def _read(self, record: PageRecord, room: memoryview, first: int) -> None:
        super()._read(self._here(record), room, first)

    def _here(self, record: PageRecord) -> PageRecord:
        place = self._places.get(record.key)
        if place is None:
            raise PageMissing(f"tier {self.road}: no page {record.key[:16]}")
        return relocated(record, place.segment, place.offset)


def relocated(record: PageRecord, segment: str, offset: int) -> PageRecord:
    """The same page in another place."""
    return msgspec.structs.replace(record, segment=segment, offset=offset)
