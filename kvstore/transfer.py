"""A shard to a segment file, and pages of a stored context into a shard.

Saving: sums on the device, then batch after batch device -> pinned host -> file, the next batch
copied while the last is hashed and written.

Opening: reader threads fill buffers from the files and verify each frame (header, record, origin,
form, xxh3); the buffers go to rows of the shard that nobody can read yet; when all have arrived,
the plane sums are computed from these very rows and compared with the headers'. Only then do the
rows become readable. So the copies to the device are verified too, and nothing is used before.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ringspan.errors import BadInput, CorruptPage
from ringspan.kvstore.batches import Batch, Buffer, batches, buffer_bytes
from ringspan.kvstore.frame import decode_head, is_zero
from ringspan.kvstore.page import (
    Origin,
    PageForm,
    PageHeader,
    differences,
    seal,
    verify_payload,
    verify_sums,
)
from ringspan.kvstore.segment import (
    SegmentWriter,
    check_record,
    read_into,
    store_error,
    where_is,
)
from ringspan.kvstore.tokens import TOKENS, read_tokens
from ringspan.types import Span, coalesce

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.shard import ContextShard

BUFFERS = 3
"""Batches on their way at a time."""
DIRECT_BYTES = 4 << 30
"""Segments of this size are written past the page cache."""
READERS = 4
"""Threads that read and hash; one does 1 to 5 GB/s."""


def save_shard(
    shard: ContextShard, origin: Origin, keys: Sequence[str], path: Path
) -> tuple[PageRecord, ...]:
    """Write all pages of a shard to a new segment, durable when this returns.

    keys: of all pages of the context, in position order. Raises `StoreError` (no room, no rights);
    the segment is then removed.
    """
    spans = [span for span, _ in shard.pages()]
    if not spans:
        return ()
    sums = shard.all_plane_sums()
    load = batches([span.tokens for span in spans], shard.token_bytes, 0)
    size = buffer_bytes(load, shard.token_bytes)
    buffers = [Buffer(shard.device, size) for _ in range(min(BUFFERS, len(load)))]
    records: list[PageRecord] = []
    pending: deque[Future[list[PageRecord]]] = deque()
    direct = shard.kv_bytes >= DIRECT_BYTES
    with SegmentWriter(path, direct) as writer, ThreadPoolExecutor(1, "save") as worker:
        for index, batch in enumerate(load):
            if len(pending) == len(buffers):
                records += pending.popleft().result()
            buffer = buffers[index % len(buffers)]
            buffer.take(shard, batch)
            pages = slice(batch.first, batch.first + batch.pages)
            pending.append(
                worker.submit(
                    _append, writer, buffer, shard.form, origin, spans[pages], keys, sums[pages]
                )
            )
        for future in pending:
            records += future.result()
    return tuple(records)


def _append(
    writer: SegmentWriter,
    buffer: Buffer,
    form: PageForm,
    origin: Origin,
    spans: Sequence[Span],
    keys: Sequence[str],
    sums: Sequence[Sequence[int]],
) -> list[PageRecord]:
    """The pages of one buffer, sealed and written."""
    buffer.wait()
    records: list[PageRecord] = []
    for index, (span, plane_sums) in enumerate(zip(spans, sums, strict=True)):
        page_bytes = span.tokens * form.token_bytes
        padded = buffer.page(index, page_bytes)
        page = seal(form, origin, span, keys, plane_sums, padded[:page_bytes])
        records.append(writer.append(page, padded))
    return records


def load_shard(
    root: Path | str,
    manifest: Manifest,
    records: Sequence[PageRecord],
    shard: ContextShard,
    readers: int = READERS,
) -> None:
    """Read pages of a stored context, verified, behind what the shard holds.

    root: of the store. records: of the manifest, in position order. Raises `CorruptPage` naming
    the page and what differs, `StoreError` when a file cannot be read, `BadInput` when the shard
    is of another form; the shard is then as before.
    """
    if manifest.form != shard.form:
        raise BadInput(
            f"context {manifest.context_id} does not fit the shard: "
            f"{differences(shard.form, manifest.form)}"
        )
    folder = Path(root).expanduser().absolute() / "contexts" / manifest.context_id
    read_tokens(folder / TOKENS, manifest)
    shard.reserve(coalesce(record.span for record in records))
    try:
        headers = _read_all(folder, manifest, records, shard, readers)
        for header, sums in zip(headers, shard.reserved_plane_sums(), strict=True):
            verify_sums(header, sums)
    except BaseException:
        shard.cancel()
        raise
    shard.mark_filled()


def _read_all(
    folder: Path,
    manifest: Manifest,
    records: Sequence[PageRecord],
    shard: ContextShard,
    readers: int,
) -> list[PageHeader]:
    """Frames verified on the host, payloads in the shard's reserved rows."""
    first_row = shard.num_tokens - sum(record.span.tokens for record in records)
    load = batches([record.span.tokens for record in records], shard.token_bytes, first_row)
    size = buffer_bytes(load, shard.token_bytes)
    buffers = [Buffer(shard.device, size) for _ in range(min(BUFFERS, len(load)))]
    headers: list[PageHeader] = []
    files = _Files(folder)
    pool = ThreadPoolExecutor(readers, "open")
    try:
        pending: deque[tuple[Batch, Buffer, list[Future[PageHeader]]]] = deque()
        for index, batch in enumerate(load):
            if len(pending) == len(buffers):
                headers += _deliver(shard, *pending.popleft())
            buffer = buffers[index % len(buffers)]
            buffer.wait()
            part = records[batch.first : batch.first + batch.pages]
            reads = [
                pool.submit(
                    _read_page, files, manifest, record, buffer.page(i, record.payload_bytes)
                )
                for i, record in enumerate(part)
            ]
            pending.append((batch, buffer, reads))
        while pending:
            headers += _deliver(shard, *pending.popleft())
        for buffer in buffers:
            buffer.wait()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        files.close()
    return headers


def _deliver(
    shard: ContextShard, batch: Batch, buffer: Buffer, reads: Sequence[Future[PageHeader]]
) -> list[PageHeader]:
    headers = [read.result() for read in reads]
    buffer.give(shard, batch)
    return headers


class _Files:
    """Segments of one context, opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fds: dict[str, int] = {}

    def fd(self, segment: str) -> int:
        if segment not in self._fds:
            path = self.folder / segment
            try:
                opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise store_error(error, "cannot open segment", path) from None
            if self._fds.setdefault(segment, opened) != opened:
                os.close(opened)  # another thread was first
        return self._fds[segment]

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _read_page(
    files: _Files, manifest: Manifest, record: PageRecord, room: memoryview
) -> PageHeader:
    """One frame: its payload to `room`, all verified but the plane sums."""
    path = files.folder / record.segment
    where = where_is(path, record)
    head = memoryview(bytearray(record.frame_bytes - room.nbytes))
    try:
        read_into(files.fd(record.segment), [head, room], record.offset, where)
    except OSError as error:
        raise store_error(error, "cannot read", path) from None
    header, head_bytes = decode_head(head, where)
    if head_bytes != head.nbytes:
        raise CorruptPage(f"{where}: the payload begins at {head_bytes}, not at {head.nbytes}")
    check_record(header, record, where)
    check_context(header, manifest, where)
    verify_payload(header, room[: header.payload_bytes])
    if not is_zero(room[header.payload_bytes :]):
        raise CorruptPage(f"{where}: bytes behind the payload are not zero")
    return header


def check_context(header: PageHeader, manifest: Manifest, where: str) -> None:
    """The page is this context's: origin, form and the page before it. Raises `CorruptPage`."""
    other = differences(manifest.origin, header.origin) or differences(manifest.form, header.form)
    if other:
        raise CorruptPage(f"{where}: is a page of another context: {other}")
    index = header.span.start // manifest.page_tokens
    parent = manifest.pages[index - 1].key if index else header.parent_key
    if header.parent_key != parent:
        raise CorruptPage(f"{where}: its parent is {header.parent_key[:16]}, not {parent[:16]}")
