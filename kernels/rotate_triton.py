"""The Triton kernels of rotate.py: one pass each over tiles [BLOCK_R, D] of the rows [A * B, D].

A program makes the matrix of signs once and takes every num_programs-th tile. The tile's shape does
not depend on the number of rows, so neither do the bits of a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ringspan.kernels.quantize import INT8_MAX, TINY
from ringspan.kernels.quantize_triton import as_3d, rows_to_codes

_BLOCK_R = 64
"""The rows of one warp-group product of Hopper."""

_PROGRAMS = 528
"""Four on each of the 132 multiprocessors of an H100 or H200."""


@triton.jit
def _signs(D: tl.constexpr, dtype: tl.constexpr):
    i = tl.arange(0, D)
    both = i[:, None] & i[None, :]  # [D, D], below 2^8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(dtype)


@triton.jit
def _rotate_quantize_kernel(
    x,
    codes,
    scale,
    x_a,
    x_b,
    num_rows,
    num_b,
    norm,
    largest,
    tiny,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    signs = _signs(D, x.dtype.element_ty)
    dim = tl.arange(0, D)
    one = tl.full([], 1, tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        row = one * tile * BLOCK_R + tl.arange(0, BLOCK_R)
        real = row < num_rows
        x_tile = x + (row // num_b * x_a + row % num_b * x_b)[:, None] + dim[None, :]
        x_block = tl.load(x_tile, mask=real[:, None], other=0.0)
        # the products are exact; "ieee" keeps them so in fp32
        y = tl.dot(x_block, signs, input_precision="ieee") * norm  # [BLOCK_R, D]
        rounded, row_scale = rows_to_codes(y, largest, tiny, True)
        code_tile = codes + row[:, None] * D + dim[None, :]
        tl.store(code_tile, rounded.to(codes.dtype.element_ty), mask=real[:, None])
        tl.store(scale + row, row_scale, mask=real)


@triton.jit
def _dequantize_rotate_kernel(
    codes,
    scale,
    out,
    out_a,
    out_b,
    num_rows,
    num_b,
    norm,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    signs = _signs(D, tl.float16)
    dim = tl.arange(0, D)
    one = tl.full([], 1, tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        row = one * tile * BLOCK_R + tl.arange(0, BLOCK_R)
        real = row < num_rows
        code = tl.load(codes + row[:, None] * D + dim[None, :], mask=real[:, None], other=0)
        factor = tl.load(scale + row, mask=real, other=0.0) * norm
        # codes are exact in fp16, their sums are whole numbers below 2^24: exact in any order
        value = tl.dot(code.to(tl.float16), signs) * factor[:, None]
        out_tile = out + (row // num_b * out_a + row % num_b * out_b)[:, None] + dim[None, :]
        tl.store(out_tile, value.to(out.dtype.element_ty), mask=real[:, None])


def rotate_quantize_triton(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """As rotate.rotate_quantize_int8, whose checks have passed; D one of rotate.KERNEL_DIMS."""
    x = as_3d(x)
    rows, num_b, dim = x.shape[0] * x.shape[1], x.shape[1], x.shape[2]
    _rotate_quantize_kernel[_grid(rows)](
        x, codes, scale, x.stride(0), x.stride(1), rows, num_b, 1 / math.sqrt(dim), INT8_MAX, TINY,
        D=dim, BLOCK_R=_BLOCK_R, **options(dim),
    )  # fmt: skip


def dequantize_rotate_triton(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """As rotate.dequantize_rotate_int8, whose checks have passed; D one of rotate.KERNEL_DIMS."""
    out = as_3d(out)
    rows, num_b, dim = out.shape[0] * out.shape[1], out.shape[1], out.shape[2]
    _dequantize_rotate_kernel[_grid(rows)](
        codes, scale, out, out.stride(0), out.stride(1), rows, num_b, 1 / math.sqrt(dim),
        D=dim, BLOCK_R=_BLOCK_R, **options(dim),
    )  # fmt: skip


def options(dim: int) -> dict[str, int | bool]:
    """How the kernels are built: as in quantize_triton, sums must not be fused with products."""
    # the matrix of signs [256, 256] does not fit the registers of four warps
    return {"num_warps": 4 if dim < 256 else 8, "num_stages": 2, "enable_fp_fusion": False}


def _grid(num_rows: int) -> tuple[int]:
    return (min(triton.cdiv(num_rows, _BLOCK_R), _PROGRAMS),)
