"""Triton kernels that move and sum the planes of many pages, all layers in one launch.

The planes of a shard lie in as many tensors as it has layers and codec tensors. A table says where:
one launch then does what was a launch for each of them, of a few microseconds' work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from ringspan.kernels.sum64 import GOLDEN, MASK, mix

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCK = 1024
_BLOCKS_PER_PROGRAM = 8
COLUMNS = 5
"""Of a table's row: address, words a page, word in the payload, first key, layer."""


@triton.jit
def _copy_planes_kernel(
    table,
    payloads,
    page_words,
    first_page,
    TABLE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    page = tl.program_id(0).to(tl.int64)
    part = table + tl.program_id(1) * TABLE_COLUMNS
    num_words = tl.load(part + 1)
    held = tl.load(part).to(tl.pointer_type(tl.int64)) + (first_page + page) * num_words
    payload = payloads + page * page_words + tl.load(part + 2)
    start = tl.program_id(2).to(tl.int64) * (BLOCK * BLOCKS)
    for block in tl.static_range(BLOCKS):
        i = start + block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
        real = i < num_words
        tl.store(held + i, tl.load(payload + i, mask=real, other=0), mask=real)


@triton.jit
def _sum_planes_kernel(
    table,
    sums,
    num_layers,
    first_page,
    TABLE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    page = tl.program_id(0).to(tl.int64)
    part = table + tl.program_id(1) * TABLE_COLUMNS
    num_words = tl.load(part + 1)
    held = tl.load(part).to(tl.pointer_type(tl.int64)) + (first_page + page) * num_words
    first_key = tl.load(part + 3).to(tl.uint64, bitcast=True)
    start = tl.program_id(2).to(tl.int64) * (BLOCK * BLOCKS)
    acc = tl.zeros([BLOCK], tl.uint64)
    for block in tl.static_range(BLOCKS):
        i = start + block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
        real = i < num_words
        word = tl.load(held + i, mask=real, other=0).to(tl.uint64, bitcast=True)
        x = word ^ (first_key + i.to(tl.uint64) * 0x9E3779B97F4A7C15)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)
        acc += tl.where(real, x, 0)
    if start < num_words:
        total = tl.sum(acc.to(tl.int64, bitcast=True), 0)
        tl.atomic_add(sums + page * num_layers + tl.load(part + 4), total, sem="relaxed")


class PlaneTable:
    """Where the planes of consecutive pages lie, on their device.

    held: [layer][tensor] -> the bytes of the pages' units in it, flat, uint8 [pages x width]; all
    of one device. pages: how many.
    """

    def __init__(self, held: Sequence[Sequence[torch.Tensor]], pages: int) -> None:
        self.pages, self.num_layers = pages, len(held)
        device = held[0][0].device
        rows: list[tuple[int, int, int, int, int]] = []
        lengths, at = 0, 0
        self._most = 1
        for layer, tensors in enumerate(held):
            for t, flat in enumerate(tensors):
                words = flat.numel() // pages // 8
                start = mix(t + 1)
                key = (start + GOLDEN) & MASK
                rows.append((flat.data_ptr(), words, at, _signed(key), layer))
                at += words
                self._most = max(self._most, words)
                if layer == 0:
                    lengths += mix(words * 8 ^ start)
        self.page_words = at
        self._length_term = _signed(lengths & MASK)
        self._table = torch.from_numpy(np.array(rows, np.int64)).to(device)
        self._parts = len(rows)

    @staticmethod
    def fits(held: Sequence[Sequence[torch.Tensor]], pages: int) -> bool:
        """Whether every plane is whole words of eight bytes."""
        return all(
            flat.data_ptr() % 8 == 0 and flat.numel() % (8 * pages) == 0
            for tensors in held
            for flat in tensors
        )

    def copy(self, payloads: torch.Tensor, first: int = 0) -> None:
        """payloads [n, payload] uint8, rows of any distance in words -> the planes of pages `first`
        to first + n."""
        words = payloads.view(torch.int64)
        if words.shape[1] != self.page_words or not 0 <= first <= self.pages - len(words):
            raise ValueError(
                f"payloads of {tuple(words.shape)} words for pages {first} on of {self.pages}, of "
                f"{self.page_words} words"
            )
        _copy_planes_kernel[self._grid(len(words))](
            self._table, words, words.stride(0), first,
            TABLE_COLUMNS=COLUMNS, BLOCK=_BLOCK, BLOCKS=_BLOCKS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip

    def sums(self, first: int = 0, pages: int | None = None) -> torch.Tensor:
        """Plane sums of `pages` pages (all) from `first` on, int64 [pages, layers], as
        `kvstore.planes` defines them."""
        count = self.pages - first if pages is None else pages
        if not 0 <= first <= first + count <= self.pages:
            raise ValueError(f"{count} pages from {first} on of {self.pages}")
        shape = (count, self.num_layers)
        sums = torch.full(shape, self._length_term, dtype=torch.int64, device=self._table.device)
        _sum_planes_kernel[self._grid(count)](
            self._table, sums, self.num_layers, first,
            TABLE_COLUMNS=COLUMNS, BLOCK=_BLOCK, BLOCKS=_BLOCKS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
        return sums

    def _grid(self, pages: int) -> tuple[int, int, int]:
        return pages, self._parts, triton.cdiv(self._most, _BLOCK * _BLOCKS_PER_PROGRAM)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
