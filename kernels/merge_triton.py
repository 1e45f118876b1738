"""The Triton kernel of merge.py: one pass, a program takes BLOCK_T tokens of BLOCK_H heads.

FlashAttention gives lse as a view whose tokens lie side by side, other kernels with heads side by
side: a program's rows go along whichever it is, so that lse is read in whole sectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ringspan.types import Part

MAX_PARTS = 16
"""Parts of one launch: each is one more vector load a thread keeps in flight."""

_BLOCK_ELEMENTS = 1024
_NUM_WARPS = 4


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
    num_tokens,
    num_heads,
    D: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    BLOCK_R: tl.constexpr = BLOCK_T * BLOCK_H
    row = tl.arange(0, BLOCK_R)
    token = (tl.program_id(0) * BLOCK_T + row // BLOCK_H).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + row % BLOCK_H
    real = (token < num_tokens) & (head < num_heads)
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
    along_tokens = parts[0].lse.stride(0) < parts[0].lse.stride(1)
    block_t, block_h = (block_r, 1) if along_tokens else (1, block_r)
    _merge_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(num_heads, block_h))](
        tuple(part.out for part in parts), tuple(part.lse for part in parts),
        tuple(stride for part in parts for stride in _strides(part.out, part.lse)),
        out, parts[0].lse if lse is None else lse, parts[0].lse if sinks is None else sinks,
        *_strides(out, out[..., 0] if lse is None else lse), num_tokens, num_heads,
        D=dim, HAS_LSE=lse is not None, HAS_SINKS=sinks is not None,
        BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip


def _strides(out: torch.Tensor, lse: torch.Tensor) -> tuple[int, int, int, int]:
    """Of the token and the head, in out and in lse."""
    return out.stride(0), out.stride(1), lse.stride(0), lse.stride(1)
