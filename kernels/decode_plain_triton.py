"""The sweep over keys that are not encoded: the growing tail of a session; see decode_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.decode_parts_triton import (
    UNSPECIALIZED,
    keys_of,
    place,
    store_split,
    weigh,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sweep_plain_kernel(
    q,
    k,
    v,
    cu_rows,
    first,
    lengths,
    part_out,
    part_lse,
    q_t,
    q_h,
    num_tokens,
    num_sequences,
    num_heads,
    stop,
    factor,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    head = tl.program_id(0) % num_heads
    split = tl.program_id(1)
    sequence, token, count, r0 = place(
        cu_rows, tl.program_id(0) // num_heads, num_tokens, num_sequences,
        GROUP, HAS_ROWS, BLOCK_R, BLOCK_B,
    )  # fmt: skip
    begin, end, block, last_block = keys_of(
        sequence, first, lengths, stop, split, tl.num_programs(1), HAS_FIRST, HAS_LENGTHS, BLOCK_N
    )
    r = r0 + tl.arange(0, BLOCK_R)
    real = r < count * GROUP
    of_token = (token + r // GROUP).to(tl.int64)
    of_head = head * GROUP + r % GROUP
    dim = tl.arange(0, D)
    q_tile = q + (of_token * q_t + of_head * q_h)[None, :] + dim[:, None]
    queries = tl.load(q_tile, mask=real[None, :], other=0.0).to(k.dtype.element_ty)  # [D, R]
    factors = tl.zeros([BLOCK_R], tl.float32) + factor
    peak = tl.full([BLOCK_R], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    acc = tl.zeros([D, BLOCK_R], tl.float32)
    for i in tl.range(block, last_block):
        key = i * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = (key >= begin) & (key < end)
        at = (key.to(tl.int64) * num_heads + head) * D
        tile = at[:, None] + dim[None, :]
        # what lies behind the end may be anything
        k_block = tl.load(k + tile, mask=seen[:, None], other=0.0)
        v_block = tl.load(v + tile, mask=seen[:, None], other=0.0)
        bias = tl.where(seen, 0.0, -float("inf"))
        x = tl.dot(k_block, queries, input_precision="ieee") + bias[:, None]
        p, peak, shrink, _ = weigh(x, bias, factors, peak, cap, SOFTCAP)
        totals = totals * shrink[None, :] + p
        acc = acc * shrink[None, :] + tl.dot(
            tl.trans(v_block), p.to(v.dtype.element_ty), input_precision="ieee"
        )
    total = tl.sum(totals, 0)
    store_split(
        part_out, part_lse, acc, peak, total, split, num_tokens * num_heads * GROUP,
        of_token * num_heads * GROUP + of_head, dim, real, D,
    )  # fmt: skip
