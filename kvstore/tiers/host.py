"""Tier `host`: frames in shared memory of the node, kept by a process that outlives the ranks.

A rank asks for slots, writes frames into them and says so; only then are they visible. A rank that
dies before leaves nothing (`host_server`). Reading leases the pages, so that nobody deletes them
meanwhile, and copies straight out of the mapped slabs. Frames go in by `pwritev`, not through the
map: into memory that nobody has touched yet it is several times faster, since no page is cleared
first and none faults.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np

from ringspan.errors import CorruptPage, StoreError
from ringspan.kvstore.frame import ALIGN, aligned, decode_head, encode_head
from ringspan.kvstore.tiers import host_wire as wire
from ringspan.kvstore.tiers.base import PageId, PageMissing, TierStat, page_id
from ringspan.kvstore.tiers.pinned import PATIENCE, mapped_file, unmap_gone

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.page import Page, PageHeader

R = TypeVar("R", bound=wire.Wire)

HOST = "host"
PUT_BYTES = 256 << 20
"""Of frames that are reserved at once: what a full store refuses in one piece."""
TIMEOUT_S = 30.0
"""For one reply."""
WRITERS = min(4, os.cpu_count() or 1)
"""Threads that copy frames; one does about 5 GB/s."""
PINNERS = min(8, os.cpu_count() or 1)
"""Threads that map slabs and pin them."""
_ZEROS = bytes(ALIGN)
_MADV_POPULATE_READ = 22
"""Linux 5.14: maps the pages of a range at once, where reading them would fault for each."""


class HostTier:
    """The host store that serves `folder`. Safe for threads; connects when first used.

    Raises `StoreError` when no store answers there, or when it is full.
    """

    name = HOST

    def __init__(self, folder: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._folder, self._timeout_s = folder, timeout_s
        self._connection: socket.socket | None = None
        self._slabs: dict[str, _Slab] = {}
        self._lock = threading.Lock()

    def put(self, pages: Iterable[Page]) -> None:
        batch: list[Page] = []
        size = 0
        for page in pages:
            batch.append(page)
            size += page.payload.nbytes
            if size >= PUT_BYTES:
                self._put(batch)
                batch, size = [], 0
        if batch:
            self._put(batch)

    def _put(self, pages: Sequence[Page]) -> None:
        heads = [encode_head(page.header) for page in pages]
        reply = self._places(
            wire.Reserve(
                pages=tuple(page_id(page.header) for page in pages),
                frame_bytes=tuple(
                    len(head) + aligned(page.payload.nbytes)
                    for head, page in zip(heads, pages, strict=True)
                ),
            )
        )
        jobs = [
            (place, head, page)
            for place, head, page in zip(reply.places, heads, pages, strict=True)
            if place is not None
        ]
        with ThreadPoolExecutor(WRITERS, "host-put") as pool:
            for written in [pool.submit(self._write, *job) for job in jobs]:
                written.result()
        if jobs:
            self._ask(wire.Publish(places=tuple(place for place, _, _ in jobs)), wire.Done)

    def _write(self, place: wire.Place, head: bytes, page: Page) -> None:
        slab = self._slab(place)
        zeros = memoryview(_ZEROS)[: aligned(page.payload.nbytes) - page.payload.nbytes]
        parts = [memoryview(head), page.payload.cast("B"), zeros]
        offset, end = place.offset, place.offset + place.frame_bytes
        try:
            while offset < end:
                done = os.pwritev(slab.fd, parts, offset)
                offset += done
                while parts and done >= parts[0].nbytes:
                    done -= parts.pop(0).nbytes
                if done:
                    parts[0] = parts[0][done:]
        except OSError as error:
            raise StoreError(
                f"host store {self._folder}: cannot write to slab {place.slab} "
                f"({os.strerror(error.errno or 0)})"
            ) from None

    def reading(self, form: str, records: Sequence[PageRecord]) -> HostReader:
        wanted = tuple(PageId(record.key, form) for record in records)
        reply = self._places(wire.Lookup(pages=wanted))
        places = {
            record.key: place
            for record, place in zip(records, reply.places, strict=True)
            if place is not None
        }
        return HostReader(self, places, reply.lease)

    def holds(self, pages: Iterable[PageId]) -> list[bool]:
        return list(self._ask(wire.Holds(pages=tuple(pages)), wire.Answers).held)

    def delete(self, pages: Iterable[PageId]) -> None:
        self._ask(wire.Delete(pages=tuple(pages)), wire.Done)

    def stat(self) -> TierStat:
        found = self._ask(wire.Stat(), wire.Stated)
        return TierStat(found.pages, found.used_bytes, found.capacity_bytes)

    def close(self) -> None:
        with self._lock:
            self._disconnect()
            for slab in list(self._slabs):
                self._unmap(slab)

    # used by HostReader

    def release(self, lease: int) -> None:
        """A store that is gone has no leases."""
        with contextlib.suppress(StoreError):
            self._ask(wire.Release(lease=lease), wire.Done)

    def frame_bytes(self, place: wire.Place) -> np.ndarray:
        return self._frame(place)

    def mapped_slab(self, place: wire.Place, pinned: bool, patience: int) -> torch.Tensor | None:
        """uint8 of a whole slab; None where it is gone or not pinned."""
        try:
            return mapped_file(self._slab(place).fd, pinned, patience)
        except (OSError, StoreError):
            return None

    def _frame(self, place: wire.Place) -> np.ndarray:
        """uint8 [frame bytes], the slot itself. Raises `PageMissing` where the slab is gone."""
        slab = self._slab(place)
        slab.populate(place)
        return np.frombuffer(slab.map, np.uint8, place.frame_bytes, place.offset)

    def _slab(self, place: wire.Place) -> _Slab:
        with self._lock:
            if place.slab not in self._slabs:
                self._slabs[place.slab] = self._open(place.slab)
            slab = self._slabs[place.slab]
        if place.offset + place.frame_bytes > len(slab.map):
            raise CorruptPage(f"host store {self._folder}: {place} lies outside its slab")
        return slab

    def _open(self, name: str) -> _Slab:
        if "/" in name or not name.startswith("slab-"):
            raise StoreError(f"host store {self._folder}: {name!r} is no slab")
        try:
            return _Slab(self._folder / name)
        except OSError as error:
            raise PageMissing(
                f"host store {self._folder}: slab {name} cannot be mapped "
                f"({os.strerror(error.errno or 0)})"
            ) from None

    def _unmap(self, name: str) -> None:
        slab = self._slabs.pop(name, None)
        if slab is not None:
            slab.close()

    # the connection

    def _places(self, request: wire.Request) -> wire.Places:
        reply = self._ask(request, wire.Places)
        with self._lock:
            for slab in reply.gone:
                self._unmap(slab)
        return reply

    def _ask(self, request: wire.Request, wanted: type[R]) -> R:
        with self._lock:
            reply = self._exchange(request)
        if isinstance(reply, wire.Refused):
            raise StoreError(reply.why)
        if not isinstance(reply, wanted):
            raise StoreError(
                f"host store {self._folder}: answered {type(reply).__name__} to "
                f"{type(request).__name__}"
            )
        return reply

    def _exchange(self, request: wire.Request) -> wire.Reply:
        """Once more over a new connection where the store was started again since the last time."""
        fresh = self._connection is None
        try:
            return self._exchange_once(request)
        except (OSError, EOFError) as error:
            self._disconnect()
            if not fresh and not isinstance(error, TimeoutError):
                try:
                    return self._exchange_once(request)
                except (OSError, EOFError) as again:
                    self._disconnect()
                    error = again
            raise StoreError(
                f"host store {self._folder}: no answer ({error}); is it running? "
                f"`ringspan contexts move --to host` starts it"
            ) from None

    def _exchange_once(self, request: wire.Request) -> wire.Reply:
        if self._connection is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(self._timeout_s)
            try:
                connection.connect(str(self._folder / wire.SOCKET))
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        self._connection.sendall(wire.framed(request))
        return wire.decode_reply(wire.receive(self._connection))

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Slab:
    """A slab file, open and mapped. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.map = mmap.mmap(self.fd, 0)
        self._populated: set[int] = set()
        """Offsets of slots that this process has mapped already."""

    def populate(self, place: wire.Place) -> None:
        if place.offset in self._populated:
            return
        self._populated.add(place.offset)
        size = aligned(place.frame_bytes)
        if place.offset % ALIGN == 0 and place.offset + size <= len(self.map):
            with contextlib.suppress(OSError):  # an older kernel: it faults page by page
                self.map.madvise(_MADV_POPULATE_READ, place.offset, size)

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a reader still has it: goes with the reader
            self.map.close()

    def __del__(self) -> None:
        if self.fd >= 0:  # not before: a thread that writes must not meet another file
            os.close(self.fd)


class _Parts(Sequence["torch.Tensor"]):
    """Parts of slabs, cut when they are asked for: while others are on their way."""

    def __init__(self, parts: list[tuple[torch.Tensor, int, int]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, at: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, at: slice) -> _Parts: ...

    def __getitem__(self, at: int | slice) -> torch.Tensor | _Parts:
        if isinstance(at, slice):
            return _Parts(self._parts[at])
        slab, first, stop = self._parts[at]
        return slab[first:stop]


class HostReader:
    """Leased pages of a host store."""

    road = HOST

    def __init__(self, tier: HostTier, places: dict[str, wire.Place], lease: int) -> None:
        self._tier, self._places, self._lease = tier, places, lease
        self.owns_tier = False
        """Whether closing the reader closes the tier's connection too."""

    def where(self, record: PageRecord) -> str:
        place = self._places.get(record.key)
        return f"host {place.slab} at byte {place.offset}" if place else "host"

    def place(self, record: PageRecord) -> str:
        place = self._places.get(record.key)
        return f"{place.slab} {place.offset} {place.generation}" if place else "none"

    def head(self, record: PageRecord) -> PageHeader:
        frame = self._frame(record)
        head = memoryview(bytearray(frame[: record.frame_bytes - aligned(record.payload_bytes)]))
        header, head_bytes = decode_head(head, self.where(record))
        if head_bytes != head.nbytes or frame.size != record.frame_bytes:
            raise CorruptPage(
                f"{self.where(record)}: a frame of {frame.size} bytes, wanted {record.frame_bytes}"
            )
        return header

    def payload(self, record: PageRecord, room: memoryview, first: int = 0) -> None:
        begin = record.frame_bytes - aligned(record.payload_bytes) + first
        part = self._frame(record)[begin : begin + room.nbytes]
        np.copyto(np.frombuffer(room, np.uint8), part)

    def mapped(
        self, records: Sequence[PageRecord], pinned: bool, at_once: bool
    ) -> Sequence[torch.Tensor] | None:
        """See `MapsFrames`; several slabs are pinned at a time."""
        wanted: dict[str, wire.Place] = {}
        for record in records:
            place = self._places.get(record.key)
            if place is None or place.frame_bytes != record.frame_bytes:
                return None
            wanted.setdefault(place.slab, place)
        unmap_gone()
        patience = 0 if at_once else PATIENCE
        with ThreadPoolExecutor(PINNERS, "host-pin") as pool:
            slabs = pool.map(
                lambda place: self._tier.mapped_slab(place, pinned, patience), wanted.values()
            )
            views = dict(zip(wanted, slabs, strict=True))
        parts: list[tuple[torch.Tensor, int, int]] = []
        for record in records:
            place = self._places[record.key]
            slab = views[place.slab]
            end = place.offset + place.frame_bytes
            first = end - aligned(record.payload_bytes)
            if slab is None or end > slab.numel() or first < place.offset:
                return None
            parts.append((slab, first, first + record.payload_bytes))
        return _Parts(parts)

    def _frame(self, record: PageRecord) -> np.ndarray:
        place = self._places.get(record.key)
        if place is None:
            raise PageMissing(f"tier {self.road}: no page {record.key[:16]}")
        return self._tier.frame_bytes(place)

    def close(self) -> None:
        lease, self._lease = self._lease, 0
        if lease:
            self._tier.release(lease)
            if self.owns_tier:
                self._tier.close()
