"""A shard's pages to segment files while the shard still grows.

    add()     after a chunk: its pages are handed over; the caller goes on at once
    feeder    one thread: plane sums of these pages on a stream of their own, then batch after batch
              device -> pinned buffer. It waits for a free buffer, never for the compute stream's
              later work; so memory beside the shard is bounded by the buffers
    writers   threads: xxh3 and the write of one page at a time, each page in the place that the
              feeder reserved for it, so that the same pages always make the same files
    finish()  what is left, then fsync: the records of all pages

Pages lie in the shard before they are written and stay there, so nothing is ever waited for but at
the end. A failure (a full disk) is raised by the next `add` or `finish`; then, and by `abort`, all
files are removed. Nothing is visible to others before the store publishes its folder.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from ringspan.kvstore import planes
from ringspan.kvstore.batches import Batch, Buffer, batches, buffer_bytes
from ringspan.kvstore.page import Origin, Page, payload_digest, seal
from ringspan.kvstore.segment import SegmentWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.encryption import PageCipher
    from ringspan.kvstore.page import PageHeader
    from ringspan.kvstore.shard import ContextShard
    from ringspan.types import Span

BUFFERS = 4
"""Batches between the device and the writers at a time."""
WRITERS = min(8, os.cpu_count() or 1)
"""Threads that hash and write; one writes 0.4 to 2.5 GB/s into a page cache."""
SEGMENT_BYTES = 1 << 30
"""A shard of more gets a segment for each writer: writes to one file wait for each other."""
DIRECT_BYTES = 4 << 30
"""Shards of this size are written past the page cache."""


class _Work(NamedTuple):
    """Pages that one `add` handed over."""

    layers: planes.Layers
    """Every row up to the last of these pages."""
    spans: tuple[Span, ...]
    first: int
    """Index of the first among the shard's pages."""
    row: int
    ready: torch.cuda.Event | None
    """The compute stream has written them."""


class WriteBehind:
    """Saves one shard; see the module. keys: of all pages of the context, in position order.

    path: of the segment; where there are several, of the first (`rank-0.seg`, `rank-0.1.seg`, ...).
    cipher: of the namespace, if that is encrypted; the writers encrypt.
    Used by one thread; `finish` or `abort` ends it, and one of the two must.
    """

    def __init__(
        self,
        shard: ContextShard,
        origin: Origin,
        keys: Sequence[str],
        path: Path,
        writers: int = WRITERS,
        cipher: PageCipher | None = None,
    ) -> None:
        self._cipher = cipher
        self._shard, self._origin, self._keys = shard, origin, keys
        self._path = path
        many = shard.capacity_bytes > SEGMENT_BYTES
        self._num_segments = writers if many else 1
        self._direct = shard.capacity_bytes >= DIRECT_BYTES
        self._segments: list[SegmentWriter] = []
        self._pages = 0
        """Handed over so far."""
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._feeder = ThreadPoolExecutor(1, "save-feeder")
        self._writers = ThreadPoolExecutor(writers, "save-writer")
        self._fed: list[Future[list[Future[PageRecord]]]] = []
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._buffers: list[Buffer] = []
        self._buffer_bytes = 0
        gpu = shard.device.type == "cuda"
        self._stream = torch.cuda.Stream(shard.device) if gpu else None

    def add(self) -> None:
        """Hand over the pages that the shard has in all layers since the last time.

        The shard must be complete (between chunks). Raises what an earlier page failed by.
        """
        self._raise_failure()
        pages = self._shard.pages()[self._pages :]
        if not pages:
            return
        spans = tuple(span for span, _ in pages)
        layers = tuple(self._shard.tensors(layer) for layer in range(self._shard.num_layers))
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._shard.device))
        work = _Work(layers, spans, self._pages, pages[0][1], ready)
        self._pages += len(pages)
        self._fed.append(self._feeder.submit(self._feed, work))

    def finish(self) -> tuple[PageRecord, ...]:
        """What is left of the shard, durable: the records of all its pages, in position order.

        Raises `StoreError` (no room, no rights); every file is then removed.
        """
        try:
            self.add()
            wait(self._fed)
            written = [job for fed in self._fed if not fed.exception() for job in fed.result()]
            wait(written)
            self._raise_failure()
            records = tuple(job.result() for job in written)
            for closed in [self._writers.submit(segment.close) for segment in self._segments]:
                closed.result()
        except BaseException:
            self.abort()
            raise
        self._segments.clear()
        self._shut_down()
        return records

    def abort(self) -> None:
        """Stop and remove every file. May be repeated; after `finish` it does nothing."""
        self._stop.set()
        self._shut_down()
        for segment in self._segments:
            segment.discard()
        self._segments.clear()

    def _shut_down(self) -> None:
        self._feeder.shutdown(wait=True)
        self._writers.shutdown(wait=True)
        self._buffers.clear()
        self._fed.clear()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self.abort()
            raise self._failure

    @property
    def _given_up(self) -> bool:
        return self._stop.is_set() or self._failure is not None

    # on the feeder's thread

    def _feed(self, work: _Work) -> list[Future[PageRecord]]:
        if self._given_up:
            return []
        try:
            with self._on_stream(work.ready):
                return self._feed_pages(work)
        except BaseException as error:
            self._fail(error)
            raise

    def _feed_pages(self, work: _Work) -> list[Future[PageRecord]]:
        shard, lengths = self._shard, [span.tokens for span in work.spans]
        sums = planes.all_page_sums(work.layers, shard.specs, lengths, shard.page_tokens, work.row)
        written: list[Future[PageRecord]] = []
        load = batches(lengths, shard.bytes_of, work.row)
        self._make_buffers(buffer_bytes(load, shard.bytes_of), len(load))
        for batch in load:
            buffer = self._free.get()  # the credit: one comes back when its pages are written
            if self._given_up:
                self._free.put(buffer)
                break
            buffer.take(work.layers, shard.specs, batch)
            written += self._hand_out(buffer, batch, work, sums)
        return written

    def _hand_out(
        self, buffer: Buffer, batch: Batch, work: _Work, sums: Sequence[Sequence[int]]
    ) -> list[Future[PageRecord]]:
        """The buffer's pages to the writers; the last one done gives the buffer back."""
        left = _Count(batch.pages)
        page_bytes = self._shard.bytes_of(batch.tokens)
        written: list[Future[PageRecord]] = []
        for i in range(batch.pages):
            at = batch.first + i
            header = self._draft(work.spans[at], sums[at], page_bytes)
            segment = self._segment((work.first + at) % self._num_segments)
            offset = segment.reserve(header)
            room = buffer.page(i, page_bytes)
            job = self._writers.submit(self._write, segment, offset, header, buffer, room)
            job.add_done_callback(lambda _: self._free.put(buffer) if left.down() else None)
            written.append(job)
        return written

    def _draft(self, span: Span, sums: Sequence[int], page_bytes: int) -> PageHeader:
        """The page's header but for its digest, which has the length of any other."""
        nothing = seal(self._shard.form, self._origin, span, self._keys, sums, memoryview(b""))
        return msgspec.structs.replace(nothing.header, payload_bytes=page_bytes)

    def _segment(self, index: int) -> SegmentWriter:
        """Neighbouring pages go to different ones."""
        while len(self._segments) <= index:
            number = len(self._segments)
            path = self._path.with_suffix(f".{number}.seg") if number else self._path
            self._segments.append(SegmentWriter(path, self._direct, self._cipher))
        return self._segments[index]

    def _make_buffers(self, size: int, wanted: int) -> None:
        """Pinned memory is made once: for full batches, if this chunk has one."""
        if size > self._buffer_bytes:
            for _ in range(len(self._buffers)):  # wait until the smaller ones are back
                self._free.get()
            self._buffers.clear()
            self._buffer_bytes = size
        while len(self._buffers) < min(BUFFERS, wanted):
            buffer = Buffer(self._shard.device, self._buffer_bytes)
            self._buffers.append(buffer)
            self._free.put(buffer)

    @contextlib.contextmanager
    def _on_stream(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        if self._stream is None or ready is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            yield
            self._stream.synchronize()

    # on a writer's thread

    def _write(
        self, segment: SegmentWriter, offset: int, header: PageHeader, buffer: Buffer,
        padded: memoryview,
    ) -> PageRecord:  # fmt: skip
        try:
            buffer.wait()
            if self._given_up:
                raise _Stopped
            payload = padded[: header.payload_bytes]
            header = msgspec.structs.replace(header, xxh3=payload_digest(payload))
            return segment.write(offset, Page(header, payload), padded)
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """The first failure is the one to raise."""
        if self._failure is None and not isinstance(error, _Stopped):
            self._failure = error


class _Stopped(Exception):
    """A page that was not written since the whole is given up."""


class _Count:
    """Of what is still to do."""

    def __init__(self, value: int) -> None:
        self._value = value
        self._lock = threading.Lock()

    def down(self) -> bool:
        """Whether that was the last."""
        with self._lock:
            self._value -= 1
            return self._value == 0


def save_shard(
    shard: ContextShard,
    origin: Origin,
    keys: Sequence[str],
    path: Path,
    cipher: PageCipher | None = None,
) -> tuple[PageRecord, ...]:
    """Write all pages of a shard to new segments, durable when this returns.

    keys: of all pages of the context, in position order. Raises `StoreError` (no room, no rights);
    the segments are then removed.
    """
    return WriteBehind(shard, origin, keys, path, cipher=cipher).finish()
