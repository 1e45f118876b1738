"""A stored context layer by layer: the first layer computes while the last one is on its way.

A page's planes lie in layer order in its payload. So all pages' planes of a few layers are read,
copied to their rows, and summed there; where every sum is the header's, these layers may be read,
and the next ones follow. The payload's xxh3 is made up along the way and compared at the end.

A plane that fails is read again with its whole page, then by the next road, as in
`kvstore.transfer`. Where no road has it, everything ends: who waits for a layer gets the error.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import xxhash

from ringspan.errors import BadInput, CorruptPage, PeerTimeout
from ringspan.kvstore import planes
from ringspan.kvstore.batches import Batch, Buffer, batches, buffer_bytes
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.page import differences, page_name
from ringspan.kvstore.tiers.counters import VERIFIED
from ringspan.kvstore.transfer import BUFFERS, READERS, reserved_layers
from ringspan.types import coalesce

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.codecs.registry import PageCodec
    from ringspan.kvstore.shard import ContextShard
    from ringspan.kvstore.supply import Had, Supply
    from ringspan.types import Span

READ_BYTES = 1 << 19
"""Of a page that one read takes at least, if its planes are smaller: layers are read together."""


class LayerGate:
    """Which layers may be read; any thread may wait."""

    def __init__(self, num_layers: int) -> None:
        self._ready = [False] * num_layers
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def open(self, layers: range) -> None:
        with self._changed:
            for layer in layers:
                self._ready[layer] = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    @property
    def ready(self) -> int:
        """Layers that may be read."""
        with self._changed:
            return sum(self._ready)

    def wait(self, layer: int, timeout_s: float) -> None:
        """Until the layer may be read. Raises what the loading failed by, or PeerTimeout."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._ready[layer] or self._failure is not None, timeout_s
            )
            if self._failure is not None:
                raise self._failure
            if not done:
                raise PeerTimeout(f"layer {layer} of a context was not read in {timeout_s} s")


class LoadingShard:
    """A `KVShard` that is still being read: whoever asks for a layer waits for it."""

    def __init__(self, shard: ContextShard, gate: LayerGate, timeout_s: float) -> None:
        self._shard, self._gate, self._timeout_s = shard, gate, timeout_s

    @property
    def codec(self) -> PageCodec:
        return self._shard.codec

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._shard.spans

    @property
    def num_tokens(self) -> int:
        return self._shard.num_tokens

    def reserve(self, spans: Sequence[Span]) -> None:
        raise BadInput("a context that is still being read cannot grow: wait until it is open")

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        raise BadInput("a context that is still being read cannot grow: wait until it is open")

    def tensors(
        self, layer: int, num_tokens: int | None = None, first: int = 0
    ) -> tuple[torch.Tensor, ...]:
        self._gate.wait(layer, self._timeout_s)
        return self._shard.tensors(layer, num_tokens, first)


def load_layers(
    supply: Supply,
    records: Sequence[PageRecord],
    shard: ContextShard,
    gate: LayerGate,
    readers: int = READERS,
) -> None:
    """Read these pages into an empty shard, opening the gate layer by layer; on the caller's
    thread. Raises as `transfer.load_shard` does, after the gate has the error; closes the supply.
    """
    with supply:
        try:
            if supply.manifest.form != shard.form:
                raise BadInput(
                    f"context {supply.manifest.context_id} does not fit the shard: "
                    f"{differences(shard.form, supply.manifest.form)}"
                )
            shard.reserve(coalesce(record.span for record in records))
            try:
                _Layers(supply, records, shard, gate).run(readers)
            except BaseException:
                shard.cancel()
                raise
        except BaseException as error:
            gate.fail(error)
            raise


class _Layers:
    def __init__(
        self, supply: Supply, records: Sequence[PageRecord], shard: ContextShard, gate: LayerGate
    ) -> None:
        self._supply, self._records, self._shard, self._gate = supply, records, shard, gate
        self._held = reserved_layers(shard)
        self._hashes = [xxhash.xxh3_128() for _ in records]
        self._read_again: set[int] = set()
        """Pages whose xxh3 was checked when they were read as a whole."""
        self._had: list[Had] = []

    def run(self, readers: int) -> None:
        num_layers = self._shard.num_layers
        plane_bytes = self._shard.page_bytes // num_layers
        step = min(num_layers, max(1, READ_BYTES // plane_bytes))
        with ThreadPoolExecutor(readers, "open") as pool:
            self._had = list(pool.map(self._supply.head, self._records))
            for start in range(0, num_layers, step):
                layers = range(start, min(start + step, num_layers))
                self._read(pool, layers)
                self._check(layers)
                self._open(layers)
        self._check_hashes()

    def _read(self, pool: ThreadPoolExecutor, layers: range) -> None:
        """These planes of every page to their rows."""
        lengths = [record.span.tokens for record in self._records]
        load = batches(lengths, lambda tokens: self._bytes(tokens, layers), 0)
        size = buffer_bytes(load, lambda tokens: self._bytes(tokens, layers))
        buffers = [Buffer(self._shard.device, size) for _ in range(min(BUFFERS, len(load)))]
        pending: deque[tuple[Batch, Buffer, list[Future[None]]]] = deque()

        def deliver() -> None:
            batch, buffer, reads = pending.popleft()
            for read in reads:
                read.result()
            buffer.give(self._held[layers.start : layers.stop], self._shard.specs, batch)

        for at, batch in enumerate(load):
            if len(pending) == len(buffers):
                deliver()
            buffer = buffers[at % len(buffers)]
            buffer.wait()
            reads = [
                pool.submit(self._read_planes, batch.first + i, layers, buffer, i)
                for i in range(batch.pages)
            ]
            pending.append((batch, buffer, reads))
        while pending:
            deliver()
        for buffer in buffers:
            buffer.wait()

    def _bytes(self, tokens: int, layers: range) -> int:
        """Of one page's planes."""
        return self._shard.bytes_of(tokens) // self._shard.num_layers * len(layers)

    def _read_planes(self, index: int, layers: range, buffer: Buffer, at: int) -> None:
        tokens = self._records[index].span.tokens
        size = self._bytes(tokens, layers)
        room = buffer.page(at, size)[:size]
        first = self._bytes(tokens, range(layers.start))
        self._supply.part(self._records[index], self._had[index].road, room, first)
        self._hashes[index].update(room)

    def _check(self, layers: range) -> None:
        shard = self._shard
        lengths = [record.span.tokens for record in self._records]
        held = self._held[layers.start : layers.stop]
        sums = planes.all_page_sums(held, shard.specs, lengths, shard.page_tokens)
        for index, found in enumerate(sums):
            if self._differs(index, layers, found):
                self._settle(index, layers)

    def _differs(self, index: int, layers: range, sums: Sequence[int]) -> bool:
        return tuple(sums) != self._had[index].header.plane_sums[layers.start : layers.stop]

    def _settle(self, index: int, layers: range) -> None:
        """The whole page once more by the same road, then by the next ones."""
        record, shard = self._records[index], self._shard
        tokens, row = record.span.tokens, index * shard.page_tokens
        first, size = self._bytes(tokens, range(layers.start)), self._bytes(tokens, layers)
        held = self._held[layers.start : layers.stop]
        self._read_again.add(index)
        road = self._had[index].road
        while True:
            room = memoryview(bytearray(aligned(record.payload_bytes)))
            self._had[index] = self._supply.page(record, room, road)
            road = self._had[index].road
            payload = planes.bytes_tensor(room[first : first + size])[None]
            planes.scatter(held, shard.specs, row, tokens, payload)
            sums = planes.page_sums(held, shard.specs, row, tokens, 1)[0]
            if not self._differs(index, layers, [int(value) for value in sums]):
                return
            name = page_name(self._had[index].header)
            why = CorruptPage(
                f"{name}: plane sum differs in layers {layers.start} to {layers.stop - 1}"
            )
            self._supply.quarantine(record, road, why)
            road += 1

    def _open(self, layers: range) -> None:
        for layer in layers:
            self._shard._written[layer] = self._shard.num_tokens
        self._gate.open(layers)

    def _check_hashes(self) -> None:
        for index, (record, made) in enumerate(zip(self._records, self._hashes, strict=True)):
            had = self._had[index]
            if index not in self._read_again and made.hexdigest() != had.header.xxh3:
                why = CorruptPage(
                    f"{page_name(had.header)}: the payload's xxh3-128 differs from the header's"
                )
                self._supply.quarantine(record, had.road, why)
                raise why
            self._supply.counters.add(VERIFIED, self._supply.road(had.road))
