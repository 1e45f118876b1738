"""The bytes of pages: from a shard's tensors to payloads, back, and their sums.

A payload is a page's planes in layer order; a plane is its tensors' bytes in the codec's order:

    payload = for layer in 0..L-1: for t in tensors: bytes of layers[layer][t]'s units of the page
    plane_sum(layer) = sum over t of sum64(bytes of tensor t, seed t + 1)   mod 2^64

The units of a page: `tokens` of them where a unit is a token, one where a unit is a page, which a
short page takes whole. Pages that follow each other in a shard lie at equal distances, so that one
copy per (layer, tensor) moves many pages.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from ringspan.attention.kv import specs_bytes
from ringspan.kernels.sum64 import sum64_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ringspan.attention.kv import TensorSpec
    from ringspan.kernels.planes_triton import PlaneTable

Layers = tuple[tuple[torch.Tensor, ...], ...]
"""[layer][tensor], each [units, *spec.shape]."""

GROUP_BYTES = 32 << 20
"""What a sum takes of one tensor at a time: bounds its scratch memory."""
SUMMERS = min(8, os.cpu_count() or 1)
"""Threads that sum layers on a CPU; one does 1 to 2 GB/s."""


def page_views(
    layers: Layers, specs: Sequence[TensorSpec], row: int, tokens: int, payloads: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tensor part, payload part) of each (layer, tensor), both [pages, bytes / width].

    As 8-byte words where everything is a multiple of 8, which copies faster, else as bytes.
    """
    pages = payloads.shape[0]
    widths = [spec.bytes_of(tokens) for spec in specs]
    if payloads.shape[1] != sum(widths) * len(layers):
        raise ValueError(
            f"payloads of {payloads.shape[1]} bytes for pages of {sum(widths) * len(layers)}"
        )
    places = (payloads.data_ptr(), payloads.stride(0), *widths)
    places += tuple(spec.bytes_of(row) for spec in specs)
    words = all(place % 8 == 0 for place in places)
    kind, size = (torch.int64, 8) if words else (torch.uint8, 1)
    payloads = payloads.view(kind)
    at = 0
    for layer in layers:
        for tensor, spec, width in zip(layer, specs, widths, strict=True):
            units = _units(tensor, spec, row, tokens, pages)
            yield (
                units.view(kind).view(pages, width // size),
                payloads[:, at // size : (at + width) // size],
            )
            at += width


def gather(
    layers: Layers, specs: Sequence[TensorSpec], row: int, tokens: int, out: torch.Tensor
) -> None:
    """Pages of `tokens` tokens from `row` on -> out [pages, payload] uint8, same device or not."""
    for held, payload in page_views(layers, specs, row, tokens, out):
        payload.copy_(held)


def scatter(
    layers: Layers, specs: Sequence[TensorSpec], row: int, tokens: int, payloads: torch.Tensor
) -> None:
    """payloads [pages, payload] uint8 -> the rows from `row` on."""
    for held, payload in page_views(layers, specs, row, tokens, payloads):
        held.copy_(payload)


class Pages:
    """Consecutive pages of `tokens` tokens each in a shard's tensors, from `row` on, that payloads
    go to some at a time; on a GPU in one launch for all layers, and without waiting for it."""

    def __init__(
        self, layers: Layers, specs: Sequence[TensorSpec], row: int, tokens: int, pages: int
    ) -> None:
        self._layers, self._specs, self._row, self._tokens = layers, specs, row, tokens
        self._table = _table(layers, specs, row, tokens, pages)

    def fill(self, first: int, payloads: torch.Tensor) -> torch.Tensor:
        """payloads [n, payload] uint8 on the same device -> pages first to first + n; plane sums of
        these rows as they are then, int64 [n, layers] there."""
        row = self._row + first * self._tokens
        pages = len(payloads)
        if self._table is None or payloads.data_ptr() % 8 or payloads.stride(0) % 8:
            scatter(self._layers, self._specs, row, self._tokens, payloads)
            return _page_sums(self._layers, self._specs, row, self._tokens, pages)
        self._table.copy(payloads, first)
        return self._table.sums(first, pages)


def page_sums(
    layers: Layers, specs: Sequence[TensorSpec], row: int, tokens: int, pages: int
) -> np.ndarray:
    """Plane sums of consecutive pages: uint64 [pages, layers]."""
    found: np.ndarray = _page_sums(layers, specs, row, tokens, pages).cpu().numpy().view(np.uint64)
    return found


def _page_sums(
    layers: Layers, specs: Sequence[TensorSpec], row: int, tokens: int, pages: int
) -> torch.Tensor:
    """int64 [pages, layers] on their device."""
    table = _table(layers, specs, row, tokens, pages)
    if table is not None:
        return table.sums()
    device = layers[0][0].device
    sums = torch.zeros((len(layers), pages), dtype=torch.int64, device=device)

    def sum_layer(layer: int) -> None:
        for t, (tensor, spec) in enumerate(zip(layers[layer], specs, strict=True)):
            width = spec.bytes_of(tokens)
            flat = _units(tensor, spec, row, tokens, pages)
            group = max(1, GROUP_BYTES // max(1, width))
            for first in range(0, pages, group):
                last = min(first + group, pages)
                part = flat[first * width : last * width].view(last - first, width)
                sums[layer, first:last] += sum64_rows(part, t + 1)  # wraps around, as meant

    if device.type == "cpu" and pages * len(layers) * specs_bytes(specs, tokens) > GROUP_BYTES:
        with ThreadPoolExecutor(SUMMERS, "plane-sums") as pool:
            deque(pool.map(sum_layer, range(len(layers))), maxlen=0)
    else:
        for layer in range(len(layers)):
            sum_layer(layer)
    return sums.T.contiguous()


def _table(
    layers: Layers, specs: Sequence[TensorSpec], row: int, tokens: int, pages: int
) -> PlaneTable | None:
    """For one launch over all layers; None on a CPU, or where planes are no whole words."""
    if layers[0][0].device.type != "cuda" or not pages:
        return None
    from ringspan.kernels.planes_triton import PlaneTable  # which imports triton

    held = [
        [
            _units(tensor, spec, row, tokens, pages)
            for tensor, spec in zip(layer, specs, strict=True)
        ]
        for layer in layers
    ]
    return PlaneTable(held, pages) if PlaneTable.fits(held, pages) else None


def all_page_sums(
    layers: Layers,
    specs: Sequence[TensorSpec],
    lengths: Sequence[int],
    page_tokens: int,
    row: int = 0,
) -> list[list[int]]:
    """Plane sums of pages that follow each other from `row` on; only the last may be short."""
    full = sum(tokens == page_tokens for tokens in lengths)
    found: list[list[int]] = []
    if full:
        found += page_sums(layers, specs, row, page_tokens, full).tolist()
    if full < len(lengths):
        found += page_sums(layers, specs, row + full * page_tokens, lengths[-1], 1).tolist()
    return found


def payload_sums(
    payload: memoryview, specs: Sequence[TensorSpec], num_layers: int, tokens: int
) -> list[int]:
    """Plane sums of one page from its payload alone, on the CPU."""
    data = bytes_tensor(payload).view(num_layers, -1)
    sums = torch.zeros(num_layers, dtype=torch.int64)
    at = 0
    for t, spec in enumerate(specs):
        width = spec.bytes_of(tokens)
        sums += sum64_rows(data[:, at : at + width], t + 1)
        at += width
    return [int(value) for value in sums.numpy().view(np.uint64)]


def _units(
    tensor: torch.Tensor, spec: TensorSpec, row: int, tokens: int, pages: int
) -> torch.Tensor:
    """Bytes of the units of `pages` pages of `tokens` tokens from `row` on, flat."""
    if row % spec.tokens or (pages > 1 and tokens % spec.tokens):
        raise ValueError(
            f"{pages} pages of {tokens} tokens at row {row} do not begin with units of "
            f"{spec.tokens} tokens"
        )
    first = row // spec.tokens
    return tensor[first : first + pages * spec.units(tokens)].reshape(-1).view(torch.uint8)


def bytes_tensor(data: memoryview) -> torch.Tensor:
    """uint8 [bytes] over the same memory; a copy where it is read-only, which torch refuses."""
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
