"""The sweep over int8 and fp8 pages; see decode_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.decode_parts_triton import (
    FP8_LEVELS,
    LEVELS,
    MAGIC,
    SMALL,
    UNSPECIALIZED,
    fold,
    keys_of,
    place,
    store_split,
    three_bits,
    weigh,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sweep8_kernel(
    high,
    low,
    row_scale,
    k_codes,
    k_scale,
    v_codes,
    v_scale,
    page_table,
    cu_rows,
    first,
    lengths,
    part_out,
    part_lse,
    num_tokens,
    num_sequences,
    num_heads,
    table_b,
    stop,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    INTEGER: tl.constexpr,
    Q_TERMS: tl.constexpr,
    P_TERMS: tl.constexpr,
    PAIRED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_R // 2 if PAIRED else BLOCK_R
    head = tl.program_id(0) % num_heads
    split = tl.program_id(1)
    sequence, token, count, r0 = place(
        cu_rows, tl.program_id(0) // num_heads, num_tokens, num_sequences,
        GROUP, HAS_ROWS, ROWS, BLOCK_B,
    )  # fmt: skip
    begin, end, page, last_page = keys_of(
        sequence, first, lengths, stop, split, tl.num_programs(1), False, HAS_LENGTHS, P
    )
    column = tl.arange(0, BLOCK_R)
    r = r0 + column % ROWS
    is_low = column >= ROWS  # of a pair: both columns of a row are equal up to their weights
    real = r < count * GROUP
    row = ((token + r // GROUP) * num_heads + head).to(tl.int64) * GROUP + r % GROUP
    dim = tl.arange(0, D)
    key = tl.arange(0, P)
    codes_tile = row[None, :] * D + dim[:, None]
    q_high = tl.load(high + codes_tile, mask=real[None, :], other=0.0)  # [D, R]
    if Q_TERMS == 2:
        q_low = tl.load(low + codes_tile, mask=real[None, :], other=0.0)
    unit_scale = tl.load(row_scale + row, mask=real, other=1.0)
    if INTEGER and Q_TERMS == 1:
        unit_scale *= 256.0

    peak = tl.full([BLOCK_R], -float("inf"), tl.float32)
    totals = tl.zeros([P, BLOCK_R], tl.float32)  # summed over keys behind the loop
    acc = tl.zeros([D, BLOCK_R], tl.float32)
    k_tile = key[:, None] * D + dim[None, :]
    v_tile = dim[:, None] * P + key[None, :]
    for i in tl.range(page, last_page):
        unit = i
        if HAS_TABLE:
            unit = tl.load(page_table + sequence * table_b + i)
        at = unit.to(tl.int64) * num_heads + head
        k = tl.load(k_codes + at * (P * D) + k_tile)
        ks = tl.load(k_scale + at * P + key)
        vs = tl.load(v_scale + at * P + key)
        v = tl.load(v_codes + at * (P * D) + v_tile)
        position = i * P + key
        seen = (position >= begin) & (position < end)
        vs = tl.where(seen, vs, 0.0)
        bias = tl.where(seen, vs - vs, -float("inf"))  # nan where V is: visible
        if INTEGER:
            whole = tl.dot(k, q_high)
            if Q_TERMS == 2:
                whole = whole * 256 + tl.dot(k, q_low)
            x = whole.to(tl.float32)
        else:
            x = tl.dot(k, q_high)
            if Q_TERMS == 2:
                x += tl.dot(k, q_low) * 0.0625
        x = x * ks[:, None] + bias[:, None]
        p, peak, shrink, tile_share = weigh(x, bias, unit_scale, peak, cap, SOFTCAP)
        totals = totals * shrink[None, :] + p
        largest = tl.maximum(tile_share * tl.max(vs, 0), SMALL)
        if INTEGER:
            w = p * vs[:, None] * (1.0 / largest * LEVELS)[None, :]
            whole_w = (w + MAGIC).to(tl.int32, bitcast=True)
            if PAIRED:
                one = tl.where(is_low[None, :], whole_w, (whole_w + 128) >> 8)
                o = tl.dot(v, one.to(tl.int8)).to(tl.float32)
                unit_w = largest * tl.where(is_low, 1.0 / LEVELS, 256.0 / LEVELS)
            else:
                whole = tl.dot(v, ((whole_w + 128) >> 8).to(tl.int8)) * 256
                if P_TERMS == 2:
                    whole += tl.dot(v, whole_w.to(tl.int8))
                o = whole.to(tl.float32)
                unit_w = largest * (1.0 / LEVELS)
        else:
            w = p * vs[:, None] * (1.0 / largest * FP8_LEVELS)[None, :]
            w_high = three_bits(w)
            w_rest = (w - w_high) * 16.0
            unit_w = largest * (1.0 / FP8_LEVELS)
            if PAIRED:
                o = tl.dot(v, tl.where(is_low[None, :], w_rest, w_high).to(tl.float8e4nv))
                unit_w *= tl.where(is_low, 0.0625, 1.0)
            else:
                o = tl.dot(v, w_high.to(tl.float8e4nv))
                if P_TERMS == 2:
                    o += tl.dot(v, w_rest.to(tl.float8e4nv)) * 0.0625
        acc = acc * shrink[None, :] + o * unit_w[None, :]
    if PAIRED:
        acc = fold(acc, ROWS)
    total = tl.sum(totals, 0)
    store_split(
        part_out, part_lse, acc, peak, total, split, num_tokens * num_heads * GROUP, row, dim,
        real & (column < ROWS), D,
    )  # fmt: skip
