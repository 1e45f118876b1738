"""Host buffers that pages pass through between a shard and a file, several pages at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ringspan.attention.kv import specs_bytes
from ringspan.kvstore.frame import ALIGN, aligned
from ringspan.kvstore.planes import gather, page_views, scatter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ringspan.attention.kv import TensorSpec
    from ringspan.kvstore.planes import Layers

    BytesOf = Callable[[int], int]
    """Encoded bytes of a page of so many tokens: `ContextShard.bytes_of`, `PageForm.bytes_of`."""

BATCH_BYTES = 64 << 20
"""Of payload that one buffer holds; a page that is larger goes alone."""


class Batch(NamedTuple):
    """Consecutive pages of equal length."""

    first: int
    """Index of its first page among the pages moved."""
    pages: int
    tokens: int
    """Of each page."""
    row: int
    """Of the shard, where its first page lies."""


def batches(
    lengths: Sequence[int], bytes_of: BytesOf, row: int, most_bytes: int | None = None
) -> list[Batch]:
    """Pages of `lengths` tokens, which follow each other from `row` on, in loads of `most_bytes`
    (BATCH_BYTES)."""
    found: list[Batch] = []
    at = 0
    while at < len(lengths):
        tokens = lengths[at]
        most = max(1, (most_bytes or BATCH_BYTES) // bytes_of(tokens))
        stop = at
        while stop < len(lengths) and stop - at < most and lengths[stop] == tokens:
            stop += 1
        found.append(Batch(at, stop - at, tokens, row))
        row += (stop - at) * tokens
        at = stop
    return found


class Buffer:
    """Room for one batch: pinned beside a GPU, where copies run while the host goes on.

    Each page begins at a multiple of 4 KiB and what lies between two is zero, as on disk.
    """

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        gpu = device.type == "cuda"
        room = torch.empty(size_bytes + ALIGN, dtype=torch.uint8, pin_memory=gpu)
        skip = -room.data_ptr() % ALIGN  # as O_DIRECT wants it
        self._host = room[skip : skip + size_bytes]
        self._device = torch.empty(size_bytes, dtype=torch.uint8, device=device) if gpu else None
        self._copied = torch.cuda.Event() if gpu else None
        self._bytes = memoryview(self._host.numpy())

    def page(self, index: int, page_bytes: int) -> memoryview:
        """Page `index` of the batch, with the zeros behind it: a multiple of 4 KiB."""
        stride = aligned(page_bytes)
        return self._bytes[index * stride : (index + 1) * stride]

    def take(self, layers: Layers, specs: Sequence[TensorSpec], batch: Batch) -> None:
        """Start copying the batch out of a shard's tensors; `wait` before its bytes are read.

        layers: may be some of the shard's, or some rows; the batch's row counts from their first.
        """
        page_bytes = len(layers) * specs_bytes(specs, batch.tokens)
        stage = self._host if self._device is None else self._device
        rows = _rows(stage, batch.pages, page_bytes)
        gather(layers, specs, batch.row, batch.tokens, rows[:, :page_bytes])
        rows[:, page_bytes:].zero_()
        if self._device is not None and self._copied is not None:
            size = rows.numel()
            self._host[:size].copy_(self._device[:size], non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._device.device))

    def give(self, layers: Layers, specs: Sequence[TensorSpec], batch: Batch) -> None:
        """Start copying the batch into a shard's tensors; `wait` before the buffer is used again.

        layers: may be some of the shard's: then the buffer holds these planes of each page alone.
        """
        page_bytes = len(layers) * specs_bytes(specs, batch.tokens)
        rows = _rows(self._host, batch.pages, page_bytes)
        if self._device is not None and self._copied is not None:
            size = rows.numel()
            self._device[:size].copy_(self._host[:size], non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._device.device))
            rows = _rows(self._device, batch.pages, page_bytes)
            scatter(layers, specs, batch.row, batch.tokens, rows[:, :page_bytes])
            return
        payloads = rows[:, :page_bytes]
        for held, payload in page_views(layers, specs, batch.row, batch.tokens, payloads):
            # not by torch, whose copies would start threads of their own from each reader's
            np.copyto(held.numpy(), payload.numpy())

    def wait(self) -> None:
        """Until the copy between host and device is done."""
        if self._copied is not None:
            self._copied.synchronize()


def buffer_bytes(load: Sequence[Batch], bytes_of: BytesOf) -> int:
    """Size of a buffer that takes any of these batches."""
    return max((batch.pages * aligned(bytes_of(batch.tokens)) for batch in load), default=0)


def _rows(data: torch.Tensor, pages: int, page_bytes: int) -> torch.Tensor:
    """[pages, aligned(page_bytes)] of a buffer's beginning."""
    stride = aligned(page_bytes)
    return data[: pages * stride].view(pages, stride)
