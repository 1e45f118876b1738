"""Pages of a stored context into a shard.

Reader threads fill buffers by the roads of a `Supply`, which verifies each frame (header, record,
origin, form, xxh3); the buffers go to rows of the shard that nobody can read yet; the plane sums
are computed from these very rows and compared with the headers'. When all are right, the rows
become readable. So the copies to the device are verified too, and nothing is used before. What
fails is read once more, then by the next road, then handed to `repair`.

Out of memory that a GPU can fetch from (slabs of the host store) no thread copies: the device takes
payloads from where they lie (`fetching`), and its plane sums, over the rows themselves, are what
they are verified by. On a CPU one thread takes a page all the way, so that its bytes are still in a
cache when they are summed, and others' pages are read meanwhile. Otherwise a GPU takes batches of
pages, and sums all of them at once, faster than it could be told page by page.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore import planes
from ringspan.kvstore.batches import Batch, Buffer, batches, buffer_bytes
from ringspan.kvstore.fetching import fetched_sums
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.host_rows import HostRows
from ringspan.kvstore.page import Page, differences, page_name, verify_page, verify_sums
from ringspan.kvstore.supply import Had, Supply, check_context
from ringspan.kvstore.tiers.counters import REPAIRED, VERIFIED
from ringspan.kvstore.tiers.placement import context_supply, note_use
from ringspan.kvstore.tokens import TOKENS, read_tokens
from ringspan.kvstore.write_behind import save_shard as save_shard
from ringspan.types import coalesce

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.shard import ContextShard

BUFFERS = 3
"""Batches on their way at a time."""
FETCHES = 2
"""Batches that a device fetches at a time, each with a buffer of its own memory."""
FETCH_BYTES = 256 << 20
"""Of payloads in one of them."""
READERS = 8
"""Threads that read and hash; one does 1 to 5 GB/s."""

Repair = Callable[[tuple["PageRecord", ...]], Iterable[Page]]
"""Pages that no tier has any more -> as many of them as can be brought back, in any order. They are
verified like all others; what is not given back is lost."""


class _Lost(NamedTuple):
    """A page that no road gave whole."""

    at: int
    why: CorruptPage | StoreError


def load_shard(
    root: Path | str,
    manifest: Manifest,
    records: Sequence[PageRecord],
    shard: ContextShard,
    readers: int = READERS,
    *,
    supply: Supply | None = None,
    repair: Repair | None = None,
    mapped: bool | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Read pages of a stored context, verified, behind what the shard holds; their plane sums,
    [pages][layers].

    root: of the store. records: of the manifest, in position order. supply: the roads to read by,
    closed here whatever happens; None: the tiers that hold the context. mapped: whether payloads
    are fetched from mapped memory where there is some; None: by a GPU, from what is read often.
    Raises `CorruptPage` naming
    the page and what differs, `StoreError` when a file cannot be read, `BadInput` when the shard is
    of another form; the shard is then as before.
    """
    root = Path(root).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        if supply is not None:
            stack.enter_context(supply)
        if manifest.form != shard.form:
            raise BadInput(
                f"context {manifest.context_id} does not fit the shard: "
                f"{differences(shard.form, manifest.form)}"
            )
        folder = root / "contexts" / manifest.context_id
        aside = stack.enter_context(ThreadPoolExecutor(1, "open-tokens"))
        tokens = aside.submit(read_tokens, folder / TOKENS, manifest)
        if supply is None:
            supply = stack.enter_context(context_supply(root, manifest, records))
        shard.reserve(coalesce(record.span for record in records))
        try:
            sums = _Loading(supply, records, shard).run(readers, repair, mapped)
            tokens.result()  # raises where they are not the manifest's
        except BaseException:
            shard.cancel()
            raise
        shard.mark_filled()
    note_use(folder)
    return sums


class _Loading:
    """Pages on their way into a shard's reserved rows."""

    def __init__(self, supply: Supply, records: Sequence[PageRecord], shard: ContextShard) -> None:
        self._supply, self._records, self._shard = supply, records, shard
        tokens = sum(record.span.tokens for record in records)
        self._first_row = shard.num_tokens - tokens
        self._had: dict[int, Had] = {}
        self._lost: list[_Lost] = []
        self._sums: dict[int, tuple[int, ...]] = {}
        """Of the pages whose rows are what they should be."""
        self._early: dict[int, list[int]] = {}
        """Of the rows of each page that was read, where they are summed at once."""

    def run(
        self, readers: int, repair: Repair | None, mapped: bool | None
    ) -> tuple[tuple[int, ...], ...]:
        gpu = self._shard.device.type == "cuda"
        wanted = gpu if mapped is None else mapped
        at_once = mapped is not None
        payloads = self._supply.mapped(self._records, gpu, at_once) if wanted else None
        if payloads is None:
            self._read(readers)
        else:
            self._fetch(payloads)
        self._repair(repair)
        return tuple(self._sums[index] for index in range(len(self._records)))

    def _fetch(self, payloads: Sequence[torch.Tensor]) -> None:
        """The device takes payloads from where they lie, while headers are checked here."""
        shard, done = self._shard, 0
        lengths = [record.span.tokens for record in self._records]
        load = batches(lengths, shard.bytes_of, self._first_row, FETCH_BYTES)
        for sums in fetched_sums(payloads, load, reserved_layers(shard), shard.specs, FETCHES):
            for index, found in enumerate(sums, done):
                try:
                    had = self._supply.head(self._records[index])
                except (CorruptPage, StoreError) as error:
                    self._lost.append(_Lost(index, error))
                    continue
                if had.road:  # its frame in the mapped memory is not whole
                    self._settle_by(index, had.road)
                else:
                    self._settle(index, had, found)
            done += len(sums)

    def _read(self, readers: int) -> None:
        """Threads read the payloads, and verify them before they go to their rows."""
        pool = ThreadPoolExecutor(readers, "open")
        try:
            if self._shard.device.type == "cpu":
                self._read_pages(pool, min(readers, len(self._records)))
            else:
                self._read_batches(pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        sums = self._early or dict(enumerate(self._shard.reserved_plane_sums()))
        for index, had in sorted(self._had.items()):
            self._settle(index, had, sums[index])

    def _read_pages(self, pool: ThreadPoolExecutor, buffers: int) -> None:
        """Each to its reserved rows, verified on the way, and summed there."""
        shard = self._shard
        size = max((aligned(record.payload_bytes) for record in self._records), default=0)
        free: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(buffers):
            free.put(Buffer(shard.device, size))
        rows = HostRows(reserved_layers(shard), shard.specs)
        cores = threading.Semaphore(planes.SUMMERS)  # more would take each other's caches

        def read(index: int) -> Had:
            record, buffer = self._records[index], free.get()
            tokens, row = record.span.tokens, self._first_row + index * shard.page_tokens
            room = buffer.page(0, record.payload_bytes)
            try:
                had = self._supply.page(record, room)
                with cores:
                    self._early[index] = rows.fill(row, tokens, room[: record.payload_bytes])
            finally:
                free.put(buffer)
            return had

        reads = [pool.submit(read, index) for index in range(len(self._records))]
        for index, done in enumerate(reads):
            self._note(index, done)

    def _read_batches(self, pool: ThreadPoolExecutor) -> None:
        """Frames verified on the host, payloads on their way to the reserved rows."""
        shard = self._shard
        lengths = [record.span.tokens for record in self._records]
        load = batches(lengths, shard.bytes_of, self._first_row)
        size = buffer_bytes(load, shard.bytes_of)
        buffers = [Buffer(shard.device, size) for _ in range(min(BUFFERS, len(load)))]
        layers = reserved_layers(shard)
        pending: deque[tuple[Batch, Buffer, list[Future[Had]]]] = deque()

        def deliver() -> None:
            batch, buffer, reads = pending.popleft()
            for index, read in enumerate(reads, batch.first):
                self._note(index, read)
            buffer.give(layers, shard.specs, batch)

        for index, batch in enumerate(load):
            if len(pending) == len(buffers):
                deliver()
            buffer = buffers[index % len(buffers)]
            buffer.wait()
            part = self._records[batch.first : batch.first + batch.pages]
            reads = [
                pool.submit(self._supply.page, record, buffer.page(i, record.payload_bytes))
                for i, record in enumerate(part)
            ]
            pending.append((batch, buffer, reads))
        while pending:
            deliver()
        for buffer in buffers:
            buffer.wait()

    def _note(self, index: int, read: Future[Had]) -> None:
        try:
            self._had[index] = read.result()
        except (CorruptPage, StoreError) as error:
            self._lost.append(_Lost(index, error))

    def _settle(self, index: int, had: Had, sums: Sequence[int]) -> None:
        """The sums of the rows are those of the header, if need be after reading again."""
        record, road, again = self._records[index], had.road, False
        while True:
            try:
                verify_sums(had.header, sums)
            except CorruptPage as error:
                if again:  # twice the same road: it is not the copy that went wrong
                    self._supply.quarantine(record, road, error)
                    road += 1
                again = not again
                room = memoryview(bytearray(aligned(record.payload_bytes)))
                try:
                    had = self._supply.page(record, room, road)
                except (CorruptPage, StoreError) as missing:
                    why = missing if isinstance(missing, CorruptPage) else error
                    self._lost.append(_Lost(index, why))
                    return
                road = had.road
                sums = self._fill(index, room[: record.payload_bytes])
            else:
                self._sums[index] = had.header.plane_sums
                self._supply.counters.add(VERIFIED, self._supply.road(road))
                return

    def _settle_by(self, index: int, road: int) -> None:
        """Read the page by a road not before `road`, then settle it."""
        record = self._records[index]
        room = memoryview(bytearray(aligned(record.payload_bytes)))
        try:
            had = self._supply.page(record, room, road)
        except (CorruptPage, StoreError) as error:
            self._lost.append(_Lost(index, error))
        else:
            self._settle(index, had, self._fill(index, room[: record.payload_bytes]))

    def _fill(self, index: int, payload: memoryview) -> list[int]:
        """One payload into its rows; the sums of these."""
        shard, tokens = self._shard, self._records[index].span.tokens
        row = self._first_row + index * shard.page_tokens
        shard.fill(row, tokens, planes.bytes_tensor(payload)[None])
        sums = planes.page_sums(reserved_layers(shard), shard.specs, row, tokens, 1)
        return [int(value) for value in sums[0]]

    def _repair(self, repair: Repair | None) -> None:
        """Raises what the first page was lost by, unless all are brought back."""
        if not self._lost:
            return
        lost = {self._records[gone.at].key: gone for gone in sorted(self._lost)}
        if repair is not None:
            for page in repair(tuple(self._records[gone.at] for gone in lost.values())):
                index = lost[page.header.key].at
                self._check_repaired(page, self._records[index])
                verify_sums(page.header, self._fill(index, page.payload))
                self._sums[index] = page.header.plane_sums
                del lost[page.header.key]
                self._supply.counters.add(REPAIRED, "repair")
        for gone in lost.values():
            raise gone.why

    def _check_repaired(self, page: Page, record: PageRecord) -> None:
        """The page that was lost, though its bytes may have been computed anew."""
        verify_page(page)
        check_context(page.header, self._supply.manifest, page_name(page.header))
        if page.header.span != record.span:
            raise CorruptPage(f"{page_name(page.header)}: repaired for {record.span}")


def reserved_layers(shard: ContextShard) -> planes.Layers:
    """The shard's tensors with the rows that nobody may read yet: for loaders, which fill them."""
    return shard._layers
