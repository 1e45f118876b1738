"""The sweep over k4v2 pages: decode4_triton.py's for K, V in 2 bits; see decode_triton.py.

A code of V goes to the tensor cores as the int8 64 * code - 96, which one shift and one logical
operation make of four at a time: 32 times the whole number 2 code - 3. Levels are symmetric, so
that V has no zeros to sum; what a page's dimensions are worth multiplies the page's sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.decode4_triton import _above, _page_at, _scores4
from ringspan.kernels.decode_parts_triton import (
    LEVELS,
    MAGIC,
    SMALL,
    UNSPECIALIZED,
    fold,
    keys_of,
    place,
    store_split,
)
from ringspan.kernels.page_k4v2 import UNIT

_V_UNIT = tl.constexpr(UNIT / 32)


@triton.jit
def _crumbs(codes, AT: tl.constexpr, ASM: tl.constexpr):
    """uint8 -> int8: 64 * (the code at bit AT) - 96."""
    if ASM:
        if AT == 0:
            return _shifted(codes, 6)
        elif AT == 2:
            return _shifted(codes, 4)
        elif AT == 4:
            return _shifted(codes, 2)
        else:
            return tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0xC0C0C0C0, 0xA0A0A0A0, 0x6A;",
                "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        return (((codes << (6 - AT)) & 192) ^ 160).to(tl.int8, bitcast=True)


@triton.jit
def _shifted(codes, LEFT: tl.constexpr):
    if LEFT == 6:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 6; lop3.b32 $0, t, 0xC0C0C0C0, 0xA0A0A0A0, 0x6A; }",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    elif LEFT == 4:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xC0C0C0C0, 0xA0A0A0A0, 0x6A; }",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 2; lop3.b32 $0, t, 0xC0C0C0C0, 0xA0A0A0A0, 0x6A; }",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _sides(scale, zero, at, HALF_P: tl.constexpr, HALF_N: tl.constexpr):
    """K's scales and zeros of one group of dimensions, for tokens of both halves of a page."""
    a = at + tl.arange(0, HALF_N)
    b = a + HALF_P
    return tl.load(scale + a), tl.load(scale + b), tl.load(zero + a), tl.load(zero + b)


@triton.jit
def _floats(side):
    """As `_sides`, in fp32; zeros moved to code 8."""
    a, b = side[0].to(tl.float32), side[1].to(tl.float32)
    return a, b, side[2].to(tl.float32) + 8.0 * a, side[3].to(tl.float32) + 8.0 * b


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sweep_k4v2_kernel(
    high,
    low,
    row_scale,
    sums,
    means,
    k_codes,
    k_scale,
    k_zero,
    v_codes,
    v_scale,
    v_dims,
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
    num_pages,
    stop,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    Q_TERMS: tl.constexpr,
    P_TERMS: tl.constexpr,
    PAIRED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ASM: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A page in STEPS steps, each of as many tokens of its first half (a) as of its second (b)."""
    GROUPS: tl.constexpr = 2 if D == 128 else 1
    HALF_D: tl.constexpr = D // 2
    HALF_P: tl.constexpr = P // 2
    HALF_N: tl.constexpr = HALF_P // STEPS
    ROWS: tl.constexpr = BLOCK_R // 2 if PAIRED else BLOCK_R
    tile = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    split = tl.program_id(1)
    sequence, token, count, r0 = place(
        cu_rows, tile, num_tokens, num_sequences, GROUP, HAS_ROWS, ROWS, BLOCK_B
    )
    begin, end, page, last_page = keys_of(
        sequence, first, lengths, stop, split, tl.num_programs(1), False, HAS_LENGTHS, P
    )
    column = tl.arange(0, BLOCK_R)
    r = r0 + column % ROWS
    is_low = column >= ROWS  # of a pair: both columns of a row are equal up to their weights
    real = r < count * GROUP
    row = ((token + r // GROUP) * num_heads + head).to(tl.int64) * GROUP + r % GROUP
    half_dim = tl.arange(0, HALF_D)
    key = tl.arange(0, HALF_N)
    codes_tile = row[None, :] * D + half_dim[:, None]
    qa_high = tl.load(high + codes_tile, mask=real[None, :], other=0)  # [D/2, R]
    qb_high = tl.load(high + codes_tile + HALF_D, mask=real[None, :], other=0)
    if Q_TERMS == 2:
        qa_low = tl.load(low + codes_tile, mask=real[None, :], other=0)
        qb_low = tl.load(low + codes_tile + HALF_D, mask=real[None, :], other=0)
    else:
        qa_low = qa_high
        qb_low = qb_high
    unit_scale = tl.load(row_scale + row, mask=real, other=1.0)
    sum0 = tl.load(sums + row * GROUPS, mask=real, other=0.0)
    sum1 = sum0
    if GROUPS == 2:
        sum1 = tl.load(sums + row * GROUPS + 1, mask=real, other=0.0)
    # codes are 16 times theirs; one term of q is its high code, 256 units
    step: tl.constexpr = 0.0625 if Q_TERMS == 2 else 16.0

    peak = tl.full([BLOCK_R], -float("inf"), tl.float32)
    totals = tl.zeros([HALF_N, BLOCK_R], tl.float32)  # summed over keys behind the loop
    acc0 = tl.zeros([HALF_D, BLOCK_R], tl.float32)
    acc1 = tl.zeros([HALF_D, BLOCK_R], tl.float32)
    k_tile = key[:, None] * HALF_D + half_dim[None, :]
    v_tile = half_dim[:, None] * HALF_P + key[None, :]
    means += (tile * num_heads + head).to(tl.int64) * num_pages * BLOCK_R + column
    table = page_table + sequence * table_b
    at = _page_at(table, page, last_page, head, num_heads, HAS_TABLE)
    next0 = _sides(k_scale, k_zero, at * (GROUPS * P), HALF_P, HALF_N)
    next1 = next0
    if GROUPS == 2:
        next1 = _sides(k_scale, k_zero, at * (GROUPS * P) + P, HALF_P, HALF_N)
    next_va = tl.load(v_scale + at * P + key)
    next_vb = tl.load(v_scale + at * P + key + HALF_P)
    for i in tl.range(page * STEPS, last_page * STEPS):
        at = _page_at(table, i // STEPS, last_page, head, num_heads, HAS_TABLE)
        offset = i % STEPS * HALF_N
        k_step = k_codes + at * (P * HALF_D) + offset * HALF_D + k_tile
        ka = tl.load(k_step)
        kb = tl.load(k_step + HALF_P * HALF_D)
        v = tl.load(v_codes + at * (HALF_D * HALF_P) + offset + v_tile)
        dims0 = tl.load(v_dims + at * D + half_dim).to(tl.float32)
        dims1 = tl.load(v_dims + at * D + HALF_D + half_dim).to(tl.float32)
        mean = tl.load(means + i // STEPS * BLOCK_R)
        # scales and zeros come one step ahead: such short loads are not made asynchronous
        side0, side1 = next0, next1
        vsa, vsb = next_va.to(tl.float32), next_vb.to(tl.float32)
        ahead = _page_at(table, (i + 1) // STEPS, last_page, head, num_heads, HAS_TABLE)
        ahead_offset = (i + 1) % STEPS * HALF_N
        at_sides = ahead * (GROUPS * P) + ahead_offset
        next0 = _sides(k_scale, k_zero, at_sides, HALF_P, HALF_N)
        if GROUPS == 2:
            next1 = _sides(k_scale, k_zero, at_sides + P, HALF_P, HALF_N)
        next_va = tl.load(v_scale + ahead * P + ahead_offset + key)
        next_vb = tl.load(v_scale + ahead * P + ahead_offset + key + HALF_P)
        position = i // STEPS * P + offset + key
        seen_a = (position >= begin) & (position < end)
        seen_b = (position + HALF_P >= begin) & (position + HALF_P < end)
        # nan where V is: visible
        bias_a = tl.where(seen_a, vsa - vsa, -float("inf"))
        bias_b = tl.where(seen_b, vsb - vsb, -float("inf"))
        vsa = tl.where(seen_a, vsa, 0.0)
        vsb = tl.where(seen_b, vsb, 0.0)
        ks0a, ks0b, kz0a, kz0b = _floats(side0)
        xa = bias_a[:, None] + mean[None, :] + kz0a[:, None] * sum0[None, :]
        xb = bias_b[:, None] + mean[None, :] + kz0b[:, None] * sum0[None, :]
        sum_a0, sum_a1 = _scores4(ka, qa_high, qb_high, qa_low, qb_low, Q_TERMS, ASM)
        sum_b0, sum_b1 = _scores4(kb, qa_high, qb_high, qa_low, qb_low, Q_TERMS, ASM)
        if GROUPS == 2:
            ks1a, ks1b, kz1a, kz1b = _floats(side1)
            xa += kz1a[:, None] * sum1[None, :] + sum_a1.to(tl.float32) * (ks1a * step)[:, None]
            xb += kz1b[:, None] * sum1[None, :] + sum_b1.to(tl.float32) * (ks1b * step)[:, None]
        else:
            sum_a0 += sum_a1
            sum_b0 += sum_b1
        xa += sum_a0.to(tl.float32) * (ks0a * step)[:, None]
        xb += sum_b0.to(tl.float32) * (ks0b * step)[:, None]
        if SOFTCAP:
            xa = cap * (1.0 - 2.0 / (tl.exp2(xa * unit_scale[None, :]) + 1.0)) + bias_a[:, None]
            xb = cap * (1.0 - 2.0 / (tl.exp2(xb * unit_scale[None, :]) + 1.0)) + bias_b[:, None]
            tile_peak = tl.max(tl.maximum(xa, xb), 0)
            higher = _above(peak, tile_peak, STEPS > 1)
            pa = tl.exp2(xa - higher[None, :])
            pb = tl.exp2(xb - higher[None, :])
        else:
            tile_peak = tl.max(tl.maximum(xa, xb), 0) * unit_scale
            higher = _above(peak, tile_peak, STEPS > 1)
            pa = tl.exp2(xa * unit_scale[None, :] - higher[None, :])
            pb = tl.exp2(xb * unit_scale[None, :] - higher[None, :])
        shrink = tl.exp2(peak - higher)
        tile_share = tl.exp2(tile_peak - higher)
        peak = tl.maximum(peak, tile_peak)
        totals = totals * shrink[None, :] + (pa + pb)

        largest = tl.maximum(tile_share * tl.max(tl.maximum(vsa, vsb), 0), SMALL)
        inverse = (1.0 / largest * LEVELS)[None, :]
        wa = (pa * vsa[:, None] * inverse + MAGIC).to(tl.int32, bitcast=True)
        wb = (pb * vsb[:, None] * inverse + MAGIC).to(tl.int32, bitcast=True)
        unit_w = largest * (_V_UNIT / LEVELS)
        o0 = _values(v, 0, wa, wb, is_low, P_TERMS, PAIRED, ASM)
        o1 = _values(v, 4, wa, wb, is_low, P_TERMS, PAIRED, ASM)
        if PAIRED:
            unit_w *= tl.where(is_low, 1.0, 256.0)
        acc0 = acc0 * shrink[None, :] + o0.to(tl.float32) * dims0[:, None] * unit_w[None, :]
        acc1 = acc1 * shrink[None, :] + o1.to(tl.float32) * dims1[:, None] * unit_w[None, :]
    total = tl.sum(totals, 0)
    num_rows = num_tokens * num_heads * GROUP
    if PAIRED:
        acc0 = fold(acc0, ROWS)
        acc1 = fold(acc1, ROWS)
    real = real & (column < ROWS)
    store_split(part_out, part_lse, acc0, peak, total, split, num_rows, row, half_dim, real, D)
    store_split(
        part_out, part_lse, acc1, peak, total, split, num_rows, row, half_dim + HALF_D, real, D
    )


@triton.jit
def _values(v, AT: tl.constexpr, wa, wb, is_low, P_TERMS: tl.constexpr, PAIRED: tl.constexpr,
            ASM: tl.constexpr):  # fmt: skip
    """One half of the dimensions, whose codes begin at bit AT -> [D/2, R] int32."""
    va, vb = _crumbs(v, AT, ASM), _crumbs(v, AT + 2, ASM)
    if PAIRED:
        one_a = tl.where(is_low[None, :], wa, (wa + 128) >> 8)
        one_b = tl.where(is_low[None, :], wb, (wb + 128) >> 8)
        o = tl.dot(va, one_a.to(tl.int8))
        o += tl.dot(vb, one_b.to(tl.int8))
    else:
        o = tl.dot(va, ((wa + 128) >> 8).to(tl.int8))
        o += tl.dot(vb, ((wb + 128) >> 8).to(tl.int8))
        o *= 256
        if P_TERMS == 2:
            o += tl.dot(va, wa.to(tl.int8))
            o += tl.dot(vb, wb.to(tl.int8))
    return o
