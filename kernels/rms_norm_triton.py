"""The Triton kernel of rms_norm.py: BLOCK_R rows a program, each held whole in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_ELEMENTS = 4096
_ELEMENTS_PER_WARP = 1024
_MAX_ROWS = (1 << 31) - (1 << 16)
"""Rows of one launch: their numbers stay int32, whose division is cheap."""


@triton.jit
def _rms_norm_kernel(
    x,
    weight,
    out,
    x_a,
    x_b,
    out_a,
    out_b,
    num_rows,
    num_b,
    eps,
    H: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_H)
    a, b = (row // num_b).to(tl.int64), row % num_b
    inside = (row < num_rows)[:, None] & (dim < H)[None, :]
    x_tile = x + (a * x_a + b * x_b)[:, None] + dim[None, :]  # [BLOCK_R, BLOCK_H]
    x_block = tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + dim, mask=dim < H, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(x_block * x_block, 1) / H
    y = x_block * tl.rsqrt(mean + eps)[:, None]
    if not UNIT_OFFSET:  # then the product of two rounded factors
        y = y.to(x.dtype.element_ty).to(tl.float32)
    y = y * (1.0 + gain if UNIT_OFFSET else gain)
    out_tile = out + (a * out_a + b * out_b)[:, None] + dim[None, :]
    tl.store(out_tile, y.to(out.dtype.element_ty), mask=inside)


def rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool, out: torch.Tensor
) -> None:
    """As rms_norm.rms_norm, whose checks have passed; written into out, shaped like x."""
    hidden = x.shape[-1]
    rows = two_axes(x, out)
    if rows is None:  # more than two axes of rows that do not lie behind each other
        packed = torch.empty_like(x, memory_format=torch.contiguous_format)
        rms_norm_triton(x.contiguous(), weight, eps, unit_offset, packed)
        out.copy_(packed)
        return
    block_h = triton.next_power_of_2(hidden)
    block_r = max(1, _BLOCK_ELEMENTS // block_h)
    x_rows, out_rows = rows
    num_b = x_rows.shape[1]
    step = max(1, _MAX_ROWS // num_b)
    for start in range(0, x_rows.shape[0], step):
        x_part, out_part = x_rows[start : start + step], out_rows[start : start + step]
        num_rows = x_part.shape[0] * num_b
        _rms_norm_kernel[(triton.cdiv(num_rows, block_r),)](
            x_part, weight, out_part,
            x_part.stride(0), x_part.stride(1), out_part.stride(0), out_part.stride(1),
            num_rows, num_b, eps,
            H=hidden, UNIT_OFFSET=unit_offset, BLOCK_R=block_r, BLOCK_H=block_h,
            num_warps=num_warps(block_r * block_h), enable_fp_fusion=False,
        )  # fmt: skip


def num_warps(elements: int) -> int:
    """Of a program that holds this many: a thread then has 32 of them, four vectors of bf16."""
    return min(16, max(1, elements // _ELEMENTS_PER_WARP))


def two_axes(x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """x and out [.., H] as views [A, B, H] with the same rows at the same places, or None.

    The axes go in the order of x's strides: heads and tokens that were swapped are walked through
    as they lie in memory.
    """
    leading = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
    x, out = (t.permute(*leading, -1) for t in (x, out))
    axes: list[list[int]] = []  # size, stride in x, stride in out
    for size, x_stride, out_stride in zip(
        x.shape[:-1], x.stride()[:-1], out.stride()[:-1], strict=True
    ):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * x_stride and axes[-1][2] == size * out_stride:
            axes[-1] = [axes[-1][0] * size, x_stride, out_stride]
        else:
            axes.append([size, x_stride, out_stride])
    if len(axes) > 2:
        return None
    while len(axes) < 2:
        axes.insert(0, [1, 0, 0])
    (a, x_a, out_a), (b, x_b, out_b) = axes
    shape = (a, b, x.shape[-1])
    return x.as_strided(shape, (x_a, x_b, 1)), out.as_strided(shape, (out_a, out_b, 1))
