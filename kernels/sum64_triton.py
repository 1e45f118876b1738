"""The Triton kernel of sum64.py: one pass over the words, one atomic addition a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ringspan.kernels.sum64 import GOLDEN, MASK

_BLOCK = 1024
_BLOCKS_PER_PROGRAM = 8


@triton.jit
def _sum64_kernel(
    words,
    sums,
    row_stride,
    num_words,
    first_key,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * (BLOCK * BLOCKS)
    words += row * row_stride
    acc = tl.zeros([BLOCK], tl.uint64)
    for block in tl.static_range(BLOCKS):
        i = start + block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
        real = i < num_words
        word = tl.load(words + i, mask=real, other=0).to(tl.uint64, bitcast=True)
        key = first_key.to(tl.uint64, bitcast=True) + i.to(tl.uint64) * 0x9E3779B97F4A7C15
        x = word ^ key
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)
        acc += tl.where(real, x, 0)
    total = tl.sum(acc.to(tl.int64, bitcast=True), 0)
    tl.atomic_add(sums + row, total, sem="relaxed")


def sum64_rows_triton(rows: torch.Tensor, start: int, length_term: int) -> torch.Tensor:
    """rows [N, row_bytes] uint8, each row contiguous -> [N] int64; see sum64.sum64_rows.

    Rows that do not lie on words of eight bytes are copied once into rows that do.
    """
    count, row_bytes = rows.shape
    num_words = -(-row_bytes // 8)
    sums = torch.full((count,), length_term, dtype=torch.int64, device=rows.device)
    aligned = rows.data_ptr() % 8 == 0 and (count == 1 or rows.stride(0) % 8 == 0)
    if row_bytes % 8 or not aligned:
        padded = rows.new_zeros(count, num_words * 8)
        padded[:, :row_bytes] = rows
        rows = padded
    words = rows.as_strided(
        (count, num_words * 8), (rows.stride(0) if count > 1 else num_words * 8, 1)
    )
    words = words.view(torch.int64)
    key = (start + GOLDEN) & MASK
    grid = (count, triton.cdiv(num_words, _BLOCK * _BLOCKS_PER_PROGRAM))
    _sum64_kernel[grid](
        words, sums, words.stride(0), num_words, key - (1 << 64) if key >> 63 else key,
        BLOCK=_BLOCK, BLOCKS=_BLOCKS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return sums
