"""The Triton kernel of rope.py: BLOCK_R rows (token, head) of q or of k a program, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_ELEMENTS = 4096
_NUM_WARPS = 4
_MAX_ROWS = (1 << 31) - (1 << 16)
"""Rows of one launch: their numbers stay int32, whose division is cheap."""


@triton.jit
def _rotate_rows(
    x,
    cos,
    sin,
    out,
    x_t,
    x_h,
    cos_t,
    sin_t,
    out_t,
    out_h,
    block,
    num_tokens,
    num_heads,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)  # (token, head): heads of a token share its angle
    dim = tl.arange(0, BLOCK_D)
    token, head = (row // num_heads).to(tl.int64), row % num_heads
    inside = (row < num_tokens * num_heads)[:, None] & (dim < HALF)[None, :]
    dtype = x.dtype.element_ty

    x_tile = x + (token * x_t + head * x_h)[:, None] + dim[None, :]  # [BLOCK_R, BLOCK_D]
    cos_tile = cos + (token * cos_t)[:, None] + dim[None, :]
    sin_tile = sin + (token * sin_t)[:, None] + dim[None, :]
    low = tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_tile + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_low = tl.load(cos_tile, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_tile + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_tile, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_tile + HALF, mask=inside, other=0.0).to(tl.float32)

    # each product is rounded to the dtype before the sum, as plain torch does
    out_low = (low * cos_low).to(dtype).to(tl.float32) - (high * sin_low).to(dtype).to(tl.float32)
    out_high = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(
        tl.float32
    )
    out_tile = out + (token * out_t + head * out_h)[:, None] + dim[None, :]
    tl.store(out_tile, out_low.to(dtype), mask=inside)
    tl.store(out_tile + HALF, out_high.to(dtype), mask=inside)


@triton.jit
def _rope_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_t,
    q_h,
    k_t,
    k_h,
    cos_t,
    sin_t,
    q_out_t,
    q_out_h,
    k_out_t,
    k_out_h,
    num_tokens,
    num_q_heads,
    num_kv_heads,
    q_blocks,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    if block < q_blocks:
        _rotate_rows(
            q, cos, sin, q_out, q_t, q_h, cos_t, sin_t, q_out_t, q_out_h,
            block, num_tokens, num_q_heads, HALF, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_rows(
            k, cos, sin, k_out, k_t, k_h, cos_t, sin_t, k_out_t, k_out_h,
            block - q_blocks, num_tokens, num_kv_heads, HALF, BLOCK_R, BLOCK_D,
        )  # fmt: skip


def rope_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> None:
    """As rope.apply_rope, whose checks have passed; q_out and k_out are shaped like q and k."""
    batch, num_q_heads, num_tokens, dim = q.shape
    num_kv_heads = k.shape[1]
    half = dim // 2
    block_d = triton.next_power_of_2(half)
    block_r = max(1, _BLOCK_ELEMENTS // (2 * block_d))
    step = _MAX_ROWS // max(1, num_q_heads, num_kv_heads)
    for b in range(batch):
        for start in range(0, num_tokens, step):
            part = slice(start, min(start + step, num_tokens))
            tokens = part.stop - part.start
            parts = [x[b, :, part] for x in (q, k, q_out, k_out)]  # [H, T, D]
            tables = [x[b, part] for x in (cos, sin)]
            q_blocks, k_blocks = (
                triton.cdiv(tokens * heads, block_r) for heads in (num_q_heads, num_kv_heads)
            )
            if not q_blocks + k_blocks:
                continue
            _rope_kernel[(q_blocks + k_blocks,)](
                parts[0], parts[1], *tables, parts[2], parts[3],
                parts[0].stride(1), parts[0].stride(0), parts[1].stride(1), parts[1].stride(0),
                tables[0].stride(0), tables[1].stride(0),
                parts[2].stride(1), parts[2].stride(0), parts[3].stride(1), parts[3].stride(0),
                tokens, num_q_heads, num_kv_heads, q_blocks,
                HALF=half, BLOCK_R=block_r, BLOCK_D=block_d,
                num_warps=_NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
