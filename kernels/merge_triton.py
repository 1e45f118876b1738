"""The Triton kernel of merge.py: one pass, BLOCK_R rows of [T * Hq, D] a program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ringspan.types import Part

MAX_PARTS = 16
"""Parts of one launch: each is one more vector load a thread keeps in flight."""

_BLOCK_ELEMENTS = 2048
_NUM_WARPS = 4
_MAX_ROWS = (1 << 31) - (1 << 16)
"""Rows of one launch: their numbers stay int32, whose division is cheap."""


@triton.jit
def _merge_kernel(
    outs,
    lses,
    strides,
    out,
    lse,
    sinks,
    out_t,
    out_h,
    lse_t,
    lse_h,
    num_rows,
    num_heads,
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # (token, q head)
    real = row < num_rows
    token, head = (row // num_heads).to(tl.int64), row % num_heads
    dim = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (dim < D)[None, :]

    peak = tl.full((BLOCK_R,), -float("inf"), tl.float32)  # [BLOCK_R]
    for i in tl.static_range(len(lses)):
        part_lse = lses[i] + token * strides[4 * i + 2] + head * strides[4 * i + 3]
        peak = tl.maximum(peak, tl.load(part_lse, mask=real, other=0.0))
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=real, other=0.0)
        peak = tl.maximum(peak, sink)
    pivot = tl.where(peak == -float("inf"), 0.0, peak)  # no part saw a key: weights 0, not nan

    total = tl.zeros((BLOCK_R,), tl.float32)
    if HAS_SINKS:
        total += tl.exp(sink - pivot)
    merged = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for i in tl.static_range(len(outs)):
        part_lse = lses[i] + token * strides[4 * i + 2] + head * strides[4 * i + 3]
        part_tile = outs[i] + (token * strides[4 * i] + head * strides[4 * i + 1])[:, None]
        part = tl.load(part_tile + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.exp(tl.load(part_lse, mask=real, other=0.0) - pivot)  # now from the cache
        total += weight
        # what a part left in rows where it saw no key may be anything
        merged += tl.where((weight == 0.0)[:, None], 0.0, part * weight[:, None])

    seen = total != 0.0
    safe = tl.where(seen, total, 1.0)
    merged = merged * (1.0 / safe)[:, None]
    tl.debug_barrier()  # out and lse may be the first part's: all threads have read them
    out_tile = out + (token * out_t + head * out_h)[:, None] + dim[None, :]
    tl.store(out_tile, merged.to(out.dtype.element_ty), mask=inside)
    if HAS_LSE:
        merged_lse = tl.where(seen, pivot + tl.log(safe), -float("inf"))
        tl.store(lse + token * lse_t + head * lse_h, merged_lse, mask=real)


def merge_many_triton(
    parts: Sequence[Part],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    block_elements: int = _BLOCK_ELEMENTS,
    num_warps: int = _NUM_WARPS,
) -> None:
    """As merge.merge_many, whose checks have passed; at most MAX_PARTS parts."""
    num_tokens, num_heads, dim = out.shape
    block_d = triton.next_power_of_2(dim)
    block_r = max(1, block_elements // block_d)
    step = _MAX_ROWS // num_heads
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        outs = tuple(part.out[rows] for part in parts)
        lses = tuple(part.lse[rows] for part in parts)
        strides = tuple(s for o, m in zip(outs, lses, strict=True) for s in _strides(o, m))
        num_rows = outs[0].shape[0] * num_heads
        merged_out, merged_lse = out[rows], lses[0] if lse is None else lse[rows]
        _merge_kernel[(triton.cdiv(num_rows, block_r),)](
            outs, lses, strides, merged_out, merged_lse, lses[0] if sinks is None else sinks,
            *_strides(merged_out, merged_lse), num_rows, num_heads,
            D=dim, HAS_LSE=lse is not None, HAS_SINKS=sinks is not None,
            BLOCK_R=block_r, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip


def _strides(out: torch.Tensor, lse: torch.Tensor) -> tuple[int, int, int, int]:
    """Of the token and the head, in out and in lse."""
    return out.stride(0), out.stride(1), lse.stride(0), lse.stride(1)
