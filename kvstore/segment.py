"""Append-only files of frames. A segment needs no index: its frames can be found by reading it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from ringspan.cluster.messages import PageRecord
from ringspan.errors import CorruptPage, StoreError
from ringspan.kvstore.frame import ALIGN, aligned, decode_frame, decode_head, encode_head
from ringspan.kvstore.page import Page, PageHeader, verify_sums
from ringspan.kvstore.planes import payload_sums

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ZEROS = bytes(ALIGN)
HEAD_GUESS_BYTES = 4 * ALIGN
"""What `scan` reads to see a header; more is read where a header says it is longer."""


class SegmentWriter:
    """Writes one new segment. `close` makes it durable; leaving by an error removes the file.

    Frames get their places in the order of `reserve`; several threads may then `write` them, in any
    order. direct: past the page cache (O_DIRECT, where the file system has it), which for a segment
    larger than memory saves a copy and the wait at the end; what is opened again at once is better
    left in the cache. Raises `StoreError` with numbers when the disk is full, the file cannot be
    made, and so on.
    """

    def __init__(self, path: Path, direct: bool = False) -> None:
        self.path = path
        self.reserved_bytes = 0
        self.written_bytes = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise store_error(error, "cannot make segment", path) from None
        self._direct = direct and _set_direct(self._fd, True)
        self._lock = threading.Lock()

    def append(self, page: Page, padded: memoryview | None = None) -> PageRecord:
        """Write a sealed page behind what was reserved."""
        header, payload = page
        offset = self.reserve(len(encode_head(header)) + aligned(payload.nbytes))
        return self.write(offset, page, padded)

    def reserve(self, frame_bytes: int) -> int:
        """The place of the next frame, which `write` fills. One thread calls this."""
        offset = self.reserved_bytes
        self.reserved_bytes += frame_bytes
        return offset

    def write(self, offset: int, page: Page, padded: memoryview | None = None) -> PageRecord:
        """A sealed page to its reserved place; its bytes go to the file without another copy.

        padded: the payload with the zeros that follow it in a frame, in one piece of memory, for
        direct writes, which want both ends of it at multiples of 4 KiB.
        """
        header, payload = page
        head = encode_head(header)
        frame_bytes = len(head) + aligned(payload.nbytes)
        if self._direct and padded is not None and _address(padded) % ALIGN == 0:
            room = mmap.mmap(-1, len(head))  # at a page's beginning, as O_DIRECT wants it
            room[:] = head
            self._write([memoryview(room), padded], offset)
        else:
            self._buffered()
            zeros = memoryview(_ZEROS)[: aligned(payload.nbytes) - payload.nbytes]
            self._write([memoryview(head), payload.cast("B"), zeros], offset)
        return record_of(header, self.path.name, offset, frame_bytes)

    def _write(self, parts: list[memoryview], offset: int) -> None:
        try:
            while parts:
                try:
                    done = os.pwritev(self._fd, parts, offset)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._buffered()  # this file system wants other alignments
                    continue
                offset += done
                with self._lock:
                    self.written_bytes += done
                while parts and done >= parts[0].nbytes:
                    done -= parts.pop(0).nbytes
                if done:
                    parts[0] = parts[0][done:]
        except OSError as error:
            raise store_error(error, "cannot write to", self.path, self.written_bytes) from None

    def _buffered(self) -> None:
        with self._lock:
            if self._direct:
                self._direct = False
                _set_direct(self._fd, False)

    def close(self) -> None:
        """Flush to the disk and close. Raises `StoreError`."""
        if self._fd < 0:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise store_error(error, "cannot fsync", self.path, self.written_bytes) from None
        finally:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Close and remove the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def _set_direct(fd: int, on: bool) -> bool:
    """Whether the file system took it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return True


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)


def record_of(header: PageHeader, segment: str, offset: int, frame_bytes: int) -> PageRecord:
    return PageRecord(
        key=header.key,
        span=header.span,
        segment=segment,
        offset=offset,
        frame_bytes=frame_bytes,
        payload_bytes=header.payload_bytes,
        xxh3=header.xxh3,
    )


def where_is(path: Path, record: PageRecord) -> str:
    """How messages name a frame on disk."""
    return f"{path.parent.name}/{record.segment} at byte {record.offset}"


def check_record(header: PageHeader, record: PageRecord, where: str) -> None:
    """The frame found is the one that the record names. Raises `CorruptPage`."""
    found = record_of(header, record.segment, record.offset, record.frame_bytes)
    if found != record:
        raise CorruptPage(
            f"{where}: holds page {header.key[:16]} [{header.span.start}, {header.span.stop}), "
            f"wanted {record.key[:16]} [{record.span.start}, {record.span.stop})"
        )


def read_frame(path: Path, record: PageRecord) -> Page:
    """One page, verified in full (header, record, xxh3, plane sums). Raises `CorruptPage`."""
    where = where_is(path, record)
    data = memoryview(bytearray(record.frame_bytes))
    try:
        with open(path, "rb", buffering=0) as file:
            read_into(file.fileno(), [data], record.offset, where)
    except OSError as error:
        raise store_error(error, "cannot read", path) from None
    page = decode_frame(data, where)
    check_record(page.header, record, where)
    form = page.header.form
    tokens = page.header.span.tokens
    verify_sums(page.header, payload_sums(page.payload, form.specs, form.num_layers, tokens))
    return page


def read_into(fd: int, parts: list[memoryview], offset: int, where: str) -> None:
    """Fill `parts` from the file. Raises `CorruptPage` where it ends too early, or OSError."""
    parts = list(parts)
    while parts:
        done = os.preadv(fd, parts, offset)
        if not done:
            raise CorruptPage(f"{where}: the segment ends in the middle of the frame")
        offset += done
        while parts and done >= parts[0].nbytes:
            done -= parts.pop(0).nbytes
        if done:
            parts[0] = parts[0][done:]


def scan(path: Path) -> Iterator[PageRecord]:
    """Records rebuilt from the frames alone, in file order; stops at a torn or damaged tail.

    Headers are verified, payloads are not read: that is `read_frame`'s work.
    """
    for header, offset, frame_bytes in scan_heads(path):
        yield record_of(header, path.name, offset, frame_bytes)


def scan_heads(path: Path) -> Iterator[tuple[PageHeader, int, int]]:
    """(header, offset, frame bytes) of each frame; see `scan`."""
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        offset = 0
        while offset < size:
            try:
                header, head_bytes = _read_head(fd, offset, size)
            except CorruptPage:
                return
            frame_bytes = head_bytes + aligned(header.payload_bytes)
            if offset + frame_bytes > size:
                return
            yield header, offset, frame_bytes
            offset += frame_bytes


def _read_head(fd: int, offset: int, size: int) -> tuple[PageHeader, int]:
    guess = HEAD_GUESS_BYTES
    while True:
        data = memoryview(os.pread(fd, guess, offset))
        try:
            return decode_head(data)
        except CorruptPage:
            if guess >= 1 << 20 or offset + guess >= size:
                raise
            guess *= 8  # a header of very many layers


def store_error(
    error: OSError, what: str, path: Path, written_bytes: int | None = None
) -> StoreError:
    """An OSError in one line, with what was written and what room there is."""
    text = f"{what} {path}: {os.strerror(error.errno) if error.errno else error}"
    if written_bytes is not None:
        text += f" after {written_bytes / 1e9:.3f} GB"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += (
            f"; {room_bytes(path) / 1e9:.3f} GB are free there: free space or use another --store"
        )
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        text += ": use a folder that may be written, with --store"
    return StoreError(text)


def room_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or its nearest existing parent."""
    for folder in (path, *path.parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return 0
