"""Frames read back out of segments, which need no index: their frames are found by reading them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ringspan.errors import CorruptPage
from ringspan.kvstore.frame import ALIGN, aligned, decode_frame, decode_head
from ringspan.kvstore.page import verify_sums
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.segment import record_of, store_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.page import Page, PageHeader

HEAD_GUESS_BYTES = 4 * ALIGN
"""What `scan` reads to see a header; more is read where a header says it is longer."""


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
