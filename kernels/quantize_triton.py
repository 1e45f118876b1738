"""The Triton kernels of quantize.py: one pass each, one program for BLOCK_R rows of [A * B, D]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ringspan.kernels.quantize import TINY

_BLOCK_ELEMENTS = 4096


@triton.jit
def rows_to_codes(value, largest, tiny, INTEGER: tl.constexpr):
    """value [BLOCK_R, BLOCK_D] fp32 -> codes, still in fp32, and scale [BLOCK_R]."""
    # max drops nan, so what is not finite is looked for apart
    finite = tl.abs(value) < float("inf")
    bad = tl.min(finite.to(tl.int32), 1) == 0
    value = tl.where(finite, value, 0.0)
    peak = tl.max(tl.abs(value), 1)  # [BLOCK_R]
    empty = peak < tiny
    inverse = tl.where(empty | bad, 0.0, tl.div_rn(largest, tl.where(empty, 1.0, peak)))
    row_scale = tl.where(empty, 0.0, tl.div_rn(peak, largest + tl.zeros_like(peak)))
    row_scale = tl.where(bad, float("nan"), row_scale)
    scaled = value * inverse[:, None]
    if INTEGER:
        # 1.5 * 2^23 leaves fp32 no bits for a fraction: adding it rounds half to even. Not to be
        # fused with the product, which is rounded first: kernels are built without fp fusion
        scaled = (scaled + 12582912.0) - 12582912.0
    else:
        scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    return scaled, row_scale


@triton.jit
def _quantize_kernel(
    x,
    codes,
    scale,
    x_a,
    x_b,
    num_rows,
    num_b,
    largest,
    tiny,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    real = row < num_rows
    inside = real[:, None] & (dim < D)[None, :]
    x_tile = x + (row // num_b * x_a + row % num_b * x_b)[:, None] + dim[None, :]
    value = tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]

    scaled, row_scale = rows_to_codes(value, largest, tiny, INTEGER)
    code_tile = codes + row[:, None] * D + dim[None, :]
    tl.store(code_tile, scaled.to(codes.dtype.element_ty), mask=inside)
    tl.store(scale + row, row_scale, mask=real)


@triton.jit
def _dequantize_kernel(
    codes,
    scale,
    out,
    out_a,
    out_b,
    num_rows,
    num_b,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)
    real = row < num_rows
    inside = real[:, None] & (dim < D)[None, :]
    code = tl.load(codes + row[:, None] * D + dim[None, :], mask=inside)
    row_scale = tl.load(scale + row, mask=real, other=0.0)
    value = code.to(tl.float32) * row_scale[:, None]
    out_tile = out + (row // num_b * out_a + row % num_b * out_b)[:, None] + dim[None, :]
    tl.store(out_tile, value.to(out.dtype.element_ty), mask=inside)


def quantize_triton(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, largest: float
) -> None:
    """As quantize.quantize_int8 and quantize_fp8, whose checks have passed."""
    x = as_3d(x)
    num_rows, num_b, dim, block_r, block_d = _tiling(x)
    _quantize_kernel[(triton.cdiv(num_rows, block_r),)](
        x, codes, scale, x.stride(0), x.stride(1), num_rows, num_b, largest, TINY,
        D=dim, BLOCK_R=block_r, BLOCK_D=block_d, INTEGER=codes.dtype == torch.int8,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def dequantize_triton(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """As quantize.dequantize_int8 and dequantize_fp8, whose checks have passed."""
    out = as_3d(out)
    num_rows, num_b, dim, block_r, block_d = _tiling(out)
    _dequantize_kernel[(triton.cdiv(num_rows, block_r),)](
        codes, scale, out, out.stride(0), out.stride(1), num_rows, num_b,
        D=dim, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def _tiling(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    block_d = triton.next_power_of_2(x.shape[2])
    return (
        x.shape[0] * x.shape[1],
        x.shape[1],
        x.shape[2],
        max(1, _BLOCK_ELEMENTS // block_d),
        block_d,
    )


def as_3d(x: torch.Tensor) -> torch.Tensor:
    """A view [A, B, D] of x [..., D]; raises if the strides of x allow none."""
    if x.stride(-1) != 1:
        raise ValueError(f"x has strides {x.stride()}, expected a contiguous last axis")
    if x.dim() == 3:
        return x
    return (
        x[None, None]
        if x.dim() == 1
        else x.view(-1, x.shape[-2] if x.dim() > 2 else 1, x.shape[-1])
    )
