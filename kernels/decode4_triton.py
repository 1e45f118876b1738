"""The sweep over int4 pages; see decode_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit
def _low_nibbles(codes, ASM: tl.constexpr):
    """uint8 -> int8: 16 * (low nibble - 8)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; }",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return ((codes << 4) ^ 128).to(tl.int8, bitcast=True)


@triton.jit
def _high_nibbles(codes, ASM: tl.constexpr):
    """uint8 -> int8: 16 * (high nibble - 8)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return ((codes & 240) ^ 128).to(tl.int8, bitcast=True)


@triton.jit
def _page_at(table, page, last_page, head, num_heads, HAS_TABLE: tl.constexpr):
    """Where a head's page begins, in pages of one head; for the page behind the last, the last."""
    unit = tl.maximum(tl.minimum(page, last_page - 1), 0)
    if HAS_TABLE:
        unit = tl.load(table + unit)
    return unit.to(tl.int64) * num_heads + head


@triton.jit
def _sides(k_scale, k_zero, v_scale, v_zero, at, HALF_P: tl.constexpr, HALF_N: tl.constexpr):
    """Scales and zeros of one group of dimensions, for tokens of both halves of a page; fp16."""
    a = at + tl.arange(0, HALF_N)
    b = a + HALF_P
    return (
        tl.load(k_scale + a), tl.load(k_scale + b), tl.load(k_zero + a), tl.load(k_zero + b),
        tl.load(v_scale + a), tl.load(v_scale + b), tl.load(v_zero + a), tl.load(v_zero + b),
    )  # fmt: skip


@triton.jit
def _floats(side, seen_a, seen_b):
    """As `_sides`, in fp32; zeros moved to code 8; V's are 0 where the token is not seen."""
    ksa, ksb = side[0].to(tl.float32), side[1].to(tl.float32)
    kza, kzb = side[2].to(tl.float32) + 8.0 * ksa, side[3].to(tl.float32) + 8.0 * ksb
    vsa = tl.where(seen_a, side[4].to(tl.float32), 0.0)
    vsb = tl.where(seen_b, side[5].to(tl.float32), 0.0)
    vza = tl.where(seen_a, side[6].to(tl.float32), 0.0) + 8.0 * vsa
    vzb = tl.where(seen_b, side[7].to(tl.float32), 0.0) + 8.0 * vsb
    return ksa, ksb, kza, kzb, vsa, vsb, vza, vzb


@triton.jit
def _above(peak, tile_peak, MAY_BE_EMPTY: tl.constexpr):
    """The higher peak; 0 where no key was seen yet, so that exponents are -inf, not nan."""
    higher = tl.maximum(peak, tile_peak)
    if MAY_BE_EMPTY:
        higher = tl.where(higher == -float("inf"), 0.0, higher)
    return higher


@triton.jit
def _scores4(k, qa_high, qb_high, qa_low, qb_low, Q_TERMS: tl.constexpr, ASM: tl.constexpr):
    """k [N, D/2] packed -> the products of the low and of the high nibbles, [N, R] int32."""
    k_low, k_high = _low_nibbles(k, ASM), _high_nibbles(k, ASM)
    low = tl.dot(k_low, qa_high)
    high = tl.dot(k_high, qb_high)
    if Q_TERMS == 2:
        low = low * 256 + tl.dot(k_low, qa_low)
        high = high * 256 + tl.dot(k_high, qb_low)
    return low, high


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sweep4_kernel(
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
    v_zero,
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
    """A page in STEPS steps, each of as many tokens of its first half as of its second."""
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

    DIMS: tl.constexpr = D // GROUPS
    group_dim = tl.arange(0, DIMS)
    peak = tl.full([BLOCK_R], -float("inf"), tl.float32)
    totals = tl.zeros([HALF_N, BLOCK_R], tl.float32)  # summed over keys behind the loop
    zeros0 = tl.zeros([HALF_N, BLOCK_R], tl.float32)
    zeros1 = tl.zeros([HALF_N, BLOCK_R], tl.float32)
    acc0 = tl.zeros([DIMS, BLOCK_R], tl.float32)
    acc1 = tl.zeros([DIMS, BLOCK_R], tl.float32)
    k_tile = key[:, None] * HALF_D + half_dim[None, :]
    v_tile = group_dim[:, None] * HALF_P + key[None, :]
    means += (tile * num_heads + head).to(tl.int64) * num_pages * BLOCK_R + tl.arange(0, BLOCK_R)
    table = page_table + sequence * table_b
    at = _page_at(table, page, last_page, head, num_heads, HAS_TABLE) * (GROUPS * P)
    next0 = _sides(k_scale, k_zero, v_scale, v_zero, at, HALF_P, HALF_N)
    next1 = next0
    if GROUPS == 2:
        next1 = _sides(k_scale, k_zero, v_scale, v_zero, at + P, HALF_P, HALF_N)
    for i in tl.range(page * STEPS, last_page * STEPS):
        at = _page_at(table, i // STEPS, last_page, head, num_heads, HAS_TABLE)
        offset = i % STEPS * HALF_N
        k_step = k_codes + at * (P * HALF_D) + offset * HALF_D + k_tile
        ka = tl.load(k_step)
        kb = tl.load(k_step + HALF_P * HALF_D)
        mean = tl.load(means + i // STEPS * BLOCK_R)
        # scales and zeros come one page ahead: such short loads are not made asynchronous
        side0, side1 = next0, next1
        ahead = _page_at(table, (i + 1) // STEPS, last_page, head, num_heads, HAS_TABLE)
        ahead = ahead * (GROUPS * P) + (i + 1) % STEPS * HALF_N
        next0 = _sides(k_scale, k_zero, v_scale, v_zero, ahead, HALF_P, HALF_N)
        if GROUPS == 2:
            next1 = _sides(k_scale, k_zero, v_scale, v_zero, ahead + P, HALF_P, HALF_N)
        position = i // STEPS * P + offset + key
        seen_a = (position >= begin) & (position < end)
        seen_b = (position + HALF_P >= begin) & (position + HALF_P < end)
        bias_a = tl.where(seen_a, 0.0, -float("inf"))
        bias_b = tl.where(seen_b, 0.0, -float("inf"))
        ks0a, ks0b, kz0a, kz0b, vs0a, vs0b, vz0a, vz0b = _floats(side0, seen_a, seen_b)
        xa = bias_a[:, None] + mean[None, :] + kz0a[:, None] * sum0[None, :]
        xb = bias_b[:, None] + mean[None, :] + kz0b[:, None] * sum0[None, :]
        sum_a0, sum_a1 = _scores4(ka, qa_high, qb_high, qa_low, qb_low, Q_TERMS, ASM)
        if GROUPS == 2:
            ks1a, ks1b, kz1a, kz1b, vs1a, vs1b, vz1a, vz1b = _floats(side1, seen_a, seen_b)
            xa += kz1a[:, None] * sum1[None, :] + sum_a1.to(tl.float32) * (ks1a * step)[:, None]
        else:
            sum_a0 += sum_a1
        xa += sum_a0.to(tl.float32) * (ks0a * step)[:, None]
        sum_b0, sum_b1 = _scores4(kb, qa_high, qb_high, qa_low, qb_low, Q_TERMS, ASM)
        if GROUPS == 2:
            xb += kz1b[:, None] * sum1[None, :] + sum_b1.to(tl.float32) * (ks1b * step)[:, None]
        else:
            sum_b0 += sum_b1
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

        v0 = tl.load(v_codes + at * (D * HALF_P) + offset + v_tile)
        zeros0 = zeros0 * shrink[None, :] + pa * vz0a[:, None] + pb * vz0b[:, None]
        acc0 = _values4(
            acc0, v0, pa, pb, vs0a, vs0b, shrink, tile_share, is_low, P_TERMS, PAIRED, ASM
        )
        if GROUPS == 2:
            v1 = tl.load(v_codes + at * (D * HALF_P) + DIMS * HALF_P + offset + v_tile)
            zeros1 = zeros1 * shrink[None, :] + pa * vz1a[:, None] + pb * vz1b[:, None]
            acc1 = _values4(
                acc1, v1, pa, pb, vs1a, vs1b, shrink, tile_share, is_low, P_TERMS, PAIRED, ASM
            )
    total = tl.sum(totals, 0)
    num_rows = num_tokens * num_heads * GROUP
    if PAIRED:
        acc0 = fold(acc0, ROWS)
        acc1 = fold(acc1, ROWS)
    real = real & (column < ROWS)
    acc0 += tl.sum(zeros0, 0)[None, :]
    store_split(part_out, part_lse, acc0, peak, total, split, num_rows, row, group_dim, real, D)
    if GROUPS == 2:
        acc1 += tl.sum(zeros1, 0)[None, :]
        store_split(
            part_out, part_lse, acc1, peak, total, split, num_rows, row, group_dim + DIMS, real, D
        )


@triton.jit
def _values4(acc, v, pa, pb, vsa, vsb, shrink, tile_share, is_low, P_TERMS: tl.constexpr,
             PAIRED: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """One group of dimensions: acc [dims, R] goes on over tokens of both halves, v packed."""
    largest = tl.maximum(tile_share * tl.max(tl.maximum(vsa, vsb), 0), SMALL)
    inverse = (1.0 / largest * LEVELS)[None, :]
    wa = (pa * vsa[:, None] * inverse + MAGIC).to(tl.int32, bitcast=True)
    wb = (pb * vsb[:, None] * inverse + MAGIC).to(tl.int32, bitcast=True)
    unit_w = largest * (0.0625 / LEVELS)  # codes are 16 times theirs
    v_low, v_high = _low_nibbles(v, ASM), _high_nibbles(v, ASM)
    if PAIRED:
        one_a = tl.where(is_low[None, :], wa, (wa + 128) >> 8)
        one_b = tl.where(is_low[None, :], wb, (wb + 128) >> 8)
        o = tl.dot(v_low, one_a.to(tl.int8))
        o += tl.dot(v_high, one_b.to(tl.int8))
        unit_w *= tl.where(is_low, 1.0, 256.0)
    else:
        o = tl.dot(v_low, ((wa + 128) >> 8).to(tl.int8))
        o += tl.dot(v_high, ((wb + 128) >> 8).to(tl.int8))
        o *= 256
        if P_TERMS == 2:
            o += tl.dot(v_low, wa.to(tl.int8))
            o += tl.dot(v_high, wb.to(tl.int8))
    return acc * shrink[None, :] + o.to(tl.float32) * unit_w[None, :]
