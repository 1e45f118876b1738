"""Append-only files of frames; `kvstore.segment_reader` finds the frames again by reading them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from ringspan.cluster.messages import PageRecord
from ringspan.errors import StoreError
from ringspan.kvstore.frame import ALIGN, aligned, encode_head
from ringspan.kvstore.page import Page, PageHeader

if TYPE_CHECKING:
    from pathlib import Path

    from ringspan.kvstore.encryption import PageCipher

_ZEROS = bytes(ALIGN)


class SegmentWriter:
    """Writes one new segment. `close` makes it durable; leaving by an error removes the file.

    Frames get their places in the order of `reserve`; several threads may then `write` them, in any
    order. direct: past the page cache (O_DIRECT, where the file system has it), which for a segment
    larger than memory saves a copy and the wait at the end; what is opened again at once is better
    left in the cache. cipher: encrypts pages that are not encrypted yet. Raises `StoreError` with
    numbers when the disk is full, the file cannot be made, and so on.
    """

    def __init__(self, path: Path, direct: bool = False, cipher: PageCipher | None = None) -> None:
        self.path = path
        self._cipher = cipher
        self.reserved_bytes = 0
        self.written_bytes = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise store_error(error, "cannot make segment", path) from None
        self._direct = direct and _set_direct(self._fd, True)
        self._lock = threading.Lock()
        self._local = threading.local()

    def append(self, page: Page, padded: memoryview | None = None) -> PageRecord:
        """Write a sealed page behind what was reserved."""
        return self.write(self.reserve(page.header), page, padded)

    def reserve(self, header: PageHeader) -> int:
        """The place of the next frame, which `write` fills; of the header only its sizes must be
        right. One thread calls this."""
        if self._cipher is not None and header.sealed is None:
            header = self._cipher.draft(header)
        offset = self.reserved_bytes
        self.reserved_bytes += len(encode_head(header)) + aligned(header.payload_bytes)
        return offset

    def write(self, offset: int, page: Page, padded: memoryview | None = None) -> PageRecord:
        """A sealed page to its reserved place; its bytes go to the file without another copy.

        padded: the payload with the zeros that follow it in a frame, in one piece of memory, for
        direct writes, which want both ends of it at multiples of 4 KiB.
        """
        if self._cipher is not None and page.header.sealed is None:
            padded = self._room(aligned(page.payload.nbytes))
            page = self._cipher.seal(page, padded)
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

    def _room(self, size: int) -> memoryview:
        """A thread's own, of whole pages of memory, with zeros behind what is less than `size`."""
        room: mmap.mmap | None = getattr(self._local, "room", None)
        if room is None or len(room) < size:
            room = self._local.room = mmap.mmap(-1, size)
        view = memoryview(room)[:size]
        view[-ALIGN:] = _ZEROS
        return view

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
