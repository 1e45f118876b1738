"""Append-only files of frames. A segment needs no index: its frames can be found by reading it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

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

    Raises `StoreError` with numbers when the disk is full, the file cannot be made, and so on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written_bytes = 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise store_error(error, "cannot make segment", path) from None

    def append(self, page: Page) -> PageRecord:
        """Write a sealed page; its bytes go to the file without another copy."""
        header, payload = page
        head = encode_head(header)
        padding = aligned(payload.nbytes) - payload.nbytes
        offset = self.written_bytes
        self._write([memoryview(head), payload.cast("B"), memoryview(_ZEROS)[:padding]])
        return record_of(header, self.path.name, offset, self.written_bytes - offset)

    def _write(self, parts: list[memoryview]) -> None:
        try:
            while parts:
                done = os.writev(self._fd, parts)
                self.written_bytes += done
                while parts and done >= parts[0].nbytes:
                    done -= parts.pop(0).nbytes
                if done:
                    parts[0] = parts[0][done:]
        except OSError as error:
            raise store_error(error, "cannot write to", self.path, self.written_bytes) from None

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
            yield record_of(header, path.name, offset, frame_bytes)
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
