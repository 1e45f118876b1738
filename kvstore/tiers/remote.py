"""Tier `remote`: frames as objects of any file system that fsspec knows (S3, GCS, NFS, a folder).

    URL/packs/<name>.pack     frames one after the other, about 64 MB
    URL/packs/<name>.index    msgpack of `Index` behind its xxh3-128: which page lies where

A pack is visible when its index is there, which is written last and in one piece; the index is the
only thing that is written twice (when pages are deleted). Pages are found by reading all indices,
once; again where a page is asked for that they do not name.
"""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import xxhash

from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.frame import aligned, decode_head, encode_frame
from ringspan.kvstore.tiers.base import PageId, PageMissing, TierStat, page_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.page import Page, PageHeader

REMOTE = "remote"
PACK_BYTES = 64 << 20
"""Of frames in one object, about; one page that is larger goes alone."""
_DIGEST_BYTES = 16


class Line(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One page of a pack."""

    key: str
    form: str
    offset: int
    frame_bytes: int


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one pack holds."""

    version: int = 1
    pack_bytes: int
    lines: tuple[Line, ...]


class Spot(NamedTuple):
    """Where a page lies."""

    pack: str
    offset: int
    frame_bytes: int


_decode_index = msgspec.msgpack.Decoder(Index).decode


class RemoteTier:
    """Packs under one URL; see the module. Safe for threads.

    options: for fsspec (keys, endpoints); what is secret comes from the environment, as each file
    system has it. Raises `BadInput` for a URL that fsspec does not know, `StoreError` when the file
    system cannot be reached.
    """

    name = REMOTE

    def __init__(self, url: str, **options: Any) -> None:
        import fsspec  # type: ignore[import-untyped]

        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise BadInput(
                f"remote {url!r}: {error}; wanted a URL that fsspec knows, such as "
                f"s3://bucket/folder (pip install 'ringspan[remote]') or file:///folder"
            ) from None
        self._packs = f"{self._root.rstrip('/')}/packs"
        self._index: dict[PageId, Spot] | None = None
        self._known: set[str] = set()
        """Indices read."""
        self._lock = threading.Lock()

    def put(self, pages: Iterable[Page]) -> None:
        held = self._pages()
        frames: list[bytes] = []
        lines: list[Line] = []
        size = 0
        for page in pages:
            name = page_id(page.header)
            if name in held:
                continue
            frame = encode_frame(page)
            lines.append(Line(*name, size, len(frame)))
            frames.append(frame)
            size += len(frame)
            if size >= PACK_BYTES:
                self._put_pack(frames, lines)
                frames, lines, size = [], [], 0
        if frames:
            self._put_pack(frames, lines)

    def _put_pack(self, frames: list[bytes], lines: list[Line]) -> None:
        pack = secrets.token_hex(12)
        data = b"".join(frames)
        with self._failing("cannot write to"):
            self._fs.makedirs(self._packs, exist_ok=True)
            self._fs.pipe_file(self._path(pack, "pack"), data)
            if self._fs.size(self._path(pack, "pack")) != len(data):
                raise OSError("the object is shorter than what was written")
        self._put_index(pack, Index(pack_bytes=len(data), lines=tuple(lines)))
        with self._lock:
            assert self._index is not None
            self._known.add(pack)
            for line in lines:
                self._index[PageId(line.key, line.form)] = Spot(pack, line.offset, line.frame_bytes)

    def _put_index(self, pack: str, index: Index) -> None:
        data = msgspec.msgpack.encode(index)
        with self._failing("cannot write to"):
            self._fs.pipe_file(self._path(pack, "index"), xxhash.xxh3_128_digest(data) + data)

    def reading(self, form: str, records: Sequence[PageRecord]) -> RemoteReader:
        pages = self._pages()
        if any(PageId(record.key, form) not in pages for record in records):
            pages = self._pages(again=True)
        spots = {
            record.key: pages[PageId(record.key, form)]
            for record in records
            if PageId(record.key, form) in pages
        }
        return RemoteReader(self, spots)

    def holds(self, pages: Iterable[PageId]) -> list[bool]:
        held = self._pages(again=True)
        return [name in held for name in pages]

    def delete(self, pages: Iterable[PageId]) -> None:
        gone = set(pages)
        held = self._pages(again=True)
        touched = {held[name].pack for name in gone if name in held}
        for pack in touched:
            index = self._read_index(pack)
            left = tuple(line for line in index.lines if PageId(line.key, line.form) not in gone)
            if left:
                self._put_index(pack, msgspec.structs.replace(index, lines=left))
                continue
            with self._failing("cannot delete in"):
                self._fs.rm_file(self._path(pack, "index"))  # first: a pack alone is not visible
                self._fs.rm_file(self._path(pack, "pack"))
        with self._lock:
            for name in gone:
                if self._index is not None:
                    self._index.pop(name, None)

    def stat(self) -> TierStat:
        held = self._pages(again=True)
        return TierStat(len(held), sum(spot.frame_bytes for spot in held.values()), None)

    def close(self) -> None:
        pass

    def read(self, spot: Spot, first: int, size: int) -> bytes:
        """Of a frame."""
        start = spot.offset + first
        with self._failing("cannot read"):
            data: bytes = self._fs.cat_file(
                self._path(spot.pack, "pack"), start=start, end=start + size
            )
        if len(data) != size:
            raise CorruptPage(
                f"{self.url} {spot.pack} at byte {spot.offset}: the pack ends within the frame"
            )
        return data

    def _pages(self, again: bool = False) -> dict[PageId, Spot]:
        with self._lock:
            if self._index is None:
                self._index = {}
            elif not again:
                return self._index
        for pack in self._listed() - self._known:
            try:
                index = self._read_index(pack)
            except CorruptPage:
                continue  # its pages are not served from here
            with self._lock:
                self._known.add(pack)
                for line in index.lines:
                    self._index[PageId(line.key, line.form)] = Spot(
                        pack, line.offset, line.frame_bytes
                    )
        return self._index

    def _listed(self) -> set[str]:
        self._fs.invalidate_cache()
        try:
            with self._failing("cannot list"):
                names = self._fs.ls(self._packs, detail=False)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return set()
            raise
        found = (str(name).rsplit("/", 1)[-1] for name in names)
        return {name.removesuffix(".index") for name in found if name.endswith(".index")}

    def _read_index(self, pack: str) -> Index:
        with self._failing("cannot read"):
            data = self._fs.cat_file(self._path(pack, "index"))
        where = f"{self.url} {pack}.index"
        if xxhash.xxh3_128_digest(data[_DIGEST_BYTES:]) != data[:_DIGEST_BYTES]:
            raise CorruptPage(f"{where}: its checksum differs")
        try:
            return _decode_index(data[_DIGEST_BYTES:])
        except (msgspec.DecodeError, ValueError) as error:
            raise CorruptPage(f"{where}: cannot be read: {error}") from None

    def _path(self, pack: str, kind: str) -> str:
        return f"{self._packs}/{pack}.{kind}"

    def _failing(self, what: str) -> _Failing:
        return _Failing(f"{what} remote {self.url}")


class _Failing:
    """Whatever a file system raises becomes a `StoreError`; there are as many kinds as systems."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (StoreError, CorruptPage)):
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise StoreError(f"{self._what}: {why[0]}") from error


class RemoteReader:
    """Frames in packs."""

    road = REMOTE

    def __init__(self, tier: RemoteTier, spots: dict[str, Spot]) -> None:
        self._tier, self._spots = tier, spots

    def where(self, record: PageRecord) -> str:
        spot = self._spots.get(record.key)
        return f"{self._tier.url} {spot.pack}.pack at byte {spot.offset}" if spot else REMOTE

    def place(self, record: PageRecord) -> str:
        spot = self._spots.get(record.key)
        return f"{self._tier.url} {spot.pack} {spot.offset}" if spot else "none"

    def head(self, record: PageRecord) -> PageHeader:
        spot = self._spot(record)
        size = record.frame_bytes - aligned(record.payload_bytes)
        header, head_bytes = decode_head(
            memoryview(self._tier.read(spot, 0, size)), self.where(record)
        )
        if head_bytes != size or spot.frame_bytes != record.frame_bytes:
            raise CorruptPage(
                f"{self.where(record)}: a frame of {spot.frame_bytes} bytes, wanted "
                f"{record.frame_bytes}"
            )
        return header

    def payload(self, record: PageRecord, room: memoryview, first: int = 0) -> None:
        begin = record.frame_bytes - aligned(record.payload_bytes) + first
        room[:] = self._tier.read(self._spot(record), begin, room.nbytes)

    def _spot(self, record: PageRecord) -> Spot:
        spot = self._spots.get(record.key)
        if spot is None:
            raise PageMissing(f"tier {self.road}: no page {record.key[:16]}")
        return spot

    def close(self) -> None:
        pass
