"""Payloads out of pinned host memory to a shard's rows, by the device itself.

Several batches are on their way: one is copied over the link while another, which went from its
buffer to the rows and was summed there, is looked at by whoever asked.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ringspan.kvstore import planes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ringspan.attention.kv import TensorSpec
    from ringspan.kvstore.batches import Batch


class _Coming(NamedTuple):
    sums: torch.Tensor
    """int64 [pages, layers] in host memory, once `done`."""
    done: torch.cuda.Event | None


def fetched_sums(
    payloads: Sequence[torch.Tensor],
    load: Sequence[Batch],
    layers: planes.Layers,
    specs: Sequence[TensorSpec],
    buffers: int,
) -> Iterator[list[list[int]]]:
    """Payloads to their rows; of each batch in turn the plane sums of these rows, [pages][layers].

    payloads: uint8 [payload bytes] in host memory, of all pages, in the order of the batches; where
    it is not pinned, copies are right and slow. layers, specs: of the shard, its reserved rows
    among them. buffers: batches on their way at a time, each with its room on the device. While the
    caller looks at one batch the others go on.
    """
    device = layers[0][0].device
    most = max((batch.pages * payloads[batch.first].numel() for batch in load), default=0)
    rooms = [
        torch.empty(most, dtype=torch.uint8, device=device) for _ in range(min(buffers, len(load)))
    ]
    link = torch.cuda.Stream(device) if device.type == "cuda" else None
    if link is not None:  # the rooms' memory may still be used by work that was launched before
        link.wait_stream(torch.cuda.current_stream(device))
    pages = _pages(load, layers, specs)  # before anything is launched: it may wait for the device
    coming: deque[_Coming] = deque()
    try:
        for index, batch in enumerate(load):
            if len(coming) == len(rooms):
                yield _arrived(coming.popleft())
            room = rooms[index % len(rooms)]
            part = _of(payloads, batch)
            coming.append(_fetch(part, batch, *pages[batch.tokens], room, link))
        while coming:
            yield _arrived(coming.popleft())
    finally:
        if link is not None:  # neither the rooms nor the payloads may go before
            link.synchronize()


def _of(payloads: Sequence[torch.Tensor], batch: Batch) -> Sequence[torch.Tensor]:
    return [payloads[index] for index in range(batch.first, batch.first + batch.pages)]


def _pages(
    load: Sequence[Batch], layers: planes.Layers, specs: Sequence[TensorSpec]
) -> dict[int, tuple[planes.Pages, int]]:
    """By tokens of a page: where these pages go, and the first one's row."""
    found: dict[int, tuple[planes.Pages, int]] = {}
    for batch in load:
        if batch.tokens not in found:
            count = sum(other.pages for other in load if other.tokens == batch.tokens)
            made = planes.Pages(layers, specs, batch.row, batch.tokens, count)
            found[batch.tokens] = made, batch.row
    return found


def _fetch(
    payloads: Sequence[torch.Tensor],
    batch: Batch,
    pages: planes.Pages,
    first_row: int,
    room: torch.Tensor,
    link: torch.cuda.Stream | None,
) -> _Coming:
    """Launches everything for a batch; `room` is free, since its last batch arrived."""
    first = (batch.row - first_row) // batch.tokens
    width = payloads[0].numel()
    staged = room[: batch.pages * width].view(batch.pages, width)
    if link is None:
        for row, payload in zip(staged, payloads, strict=True):
            row.copy_(payload)
        return _Coming(pages.fill(first, staged), None)
    device = room.device
    with torch.cuda.stream(link):
        for row, payload in zip(staged, payloads, strict=True):
            row.copy_(payload, non_blocking=True)
    compute = torch.cuda.current_stream(device)
    compute.wait_stream(link)
    found = pages.fill(first, staged)
    sums = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    sums.copy_(found, non_blocking=True)
    done = torch.cuda.Event()
    done.record(compute)
    return _Coming(sums, done)


def _arrived(coming: _Coming) -> list[list[int]]:
    if coming.done is not None:
        coming.done.synchronize()
    found: list[list[int]] = coming.sums.numpy().view(np.uint64).tolist()
    return found
