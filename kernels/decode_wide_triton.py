"""Sweeps over encoded pages for many rows: sixteen questions of one context, say.

With few rows a sweep is bound by reading the keys, and decode8_triton.py and decode4_triton.py give
their codes to the tensor cores as they lie. From 32 rows on it is bound by what is done to scores
and weights, two codes each there, and by maxima along columns. Here rows are rows: one warp group
holds 64 of them, whose maxima and sums stay within four threads. K and V become fp16 on their way
to the tensor cores, once for all rows, and queries and weights are one fp16 each:

    int8   x = (q codes) k_scale     w = p v_scale / (largest v_scale of the tile)
    int4   x = q k', k' = code k_scale + k_zero + k_mean     w = p,  v' = code v_scale + v_zero
    acc = acc * shrink + (w codes) * share

q in units of its row's largest (exact to 2^-11), p in units of its tile's largest, so that weights
of fp16 lose nothing beside a sink that lies in another tile. Codes of 8 bits are exact in fp16; k'
and v' are rounded to 2^-11 of themselves. On an H200, 64 rows over 2^20 keys of 8 heads of 128:
int8 1.06 ms, where the two codes took 1.6 and keys as rows of fp16 products 2.5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.decode_parts_triton import (
    SMALL,
    UNSPECIALIZED,
    keys_of,
    place,
)


@triton.jit
def _halves(codes, ASM: tl.constexpr):
    """int8 -> fp16, exactly: 1024 + (code + 128) by moving bytes, less 1152."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u;
            xor.b32 t, $2, 0x80808080;
            mov.b32 u, 0x64806480;
            prmt.b32 $0, t, 0x64646464, 0x5150;
            prmt.b32 $1, t, 0x64646464, 0x5352;
            sub.f16x2 $0, $0, u;
            sub.f16x2 $1, $1, u;
            }""",
            "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return codes.to(tl.float16)


@triton.jit
def _low(codes, scale, zero, ASM: tl.constexpr):
    """uint8 -> fp16: low nibble * scale + zero; the nibble as 1024 + nibble, less 1024."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u;
            and.b32 t, $2, 0x0f0f0f0f;
            mov.b32 u, 0x64006400;
            prmt.b32 $0, t, 0x64646464, 0x5150;
            prmt.b32 $1, t, 0x64646464, 0x5352;
            sub.f16x2 $0, $0, u;
            sub.f16x2 $1, $1, u;
            fma.rn.f16x2 $0, $0, $3, $5;
            fma.rn.f16x2 $1, $1, $4, $6;
            }""",
            "=&r,=&r,r,r,r,r,r", [codes, scale, zero], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (codes & 15).to(tl.float16) * scale + zero


@triton.jit
def _high(codes, scale, zero, ASM: tl.constexpr):
    """uint8 -> fp16: high nibble * scale + zero."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, v;
            and.b32 t, $2, 0xf0f0f0f0;
            mov.b32 u, 0xd400d400;
            mov.b32 v, 0x2c002c00;
            prmt.b32 $0, t, 0x64646464, 0x5150;
            prmt.b32 $1, t, 0x64646464, 0x5352;
            fma.rn.f16x2 $0, $0, v, u;
            fma.rn.f16x2 $1, $1, v, u;
            fma.rn.f16x2 $0, $0, $3, $5;
            fma.rn.f16x2 $1, $1, $4, $6;
            }""",
            "=&r,=&r,r,r,r,r,r", [codes, scale, zero], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (codes >> 4).to(tl.float16) * scale + zero


@triton.jit
def _page_at(table, page, last_page, head, num_heads, HAS_TABLE: tl.constexpr):
    """Where a head's page begins, in pages of one head; for the page behind the last, the last."""
    unit = tl.maximum(tl.minimum(page, last_page - 1), 0)
    if HAS_TABLE:
        unit = tl.load(table + unit)
    return unit.to(tl.int64) * num_heads + head


@triton.jit
def _capped(x, unit_scale, cap):
    return cap * (1.0 - 2.0 / (tl.exp2(x * unit_scale[:, None]) + 1.0))


@triton.jit
def _store(part_out, part_lse, out, peak, total, split, num_rows, row, dim, real,
           D: tl.constexpr):  # fmt: skip
    """out [R, dims] divided by total, and its lse in base 2; 0 and -inf without keys."""
    at = split.to(tl.int64) * num_rows + row
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(part_out + at[:, None] * D + dim[None, :], out / safe[:, None], mask=real[:, None])
    tl.store(part_lse + at, tl.where(total == 0.0, -float("inf"), peak + tl.log2(safe)), mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sweep8_wide_kernel(
    q,
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
    SOFTCAP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ASM: tl.constexpr,
    STEPS: tl.constexpr,
):
    """int8 pages, a page in STEPS steps."""
    N: tl.constexpr = P // STEPS
    head = tl.program_id(0) % num_heads
    split = tl.program_id(1)
    sequence, token, count, r0 = place(
        cu_rows, tl.program_id(0) // num_heads, num_tokens, num_sequences,
        GROUP, HAS_ROWS, BLOCK_R, BLOCK_B,
    )  # fmt: skip
    begin, end, page, last_page = keys_of(
        sequence, first, lengths, stop, split, tl.num_programs(1), False, HAS_LENGTHS, P
    )
    r = r0 + tl.arange(0, BLOCK_R)
    real = r < count * GROUP
    row = ((token + r // GROUP) * num_heads + head).to(tl.int64) * GROUP + r % GROUP
    dim = tl.arange(0, D)
    key = tl.arange(0, N)
    q_tile = tl.load(q + row[:, None] * D + dim[None, :], mask=real[:, None], other=0.0)
    unit_scale = tl.load(row_scale + row, mask=real, other=1.0)

    peak = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, D], tl.float32)
    k_tile = key[:, None] * D + dim[None, :]
    v_tile = dim[:, None] * P + key[None, :]
    table = page_table + sequence * table_b
    at = _page_at(table, page, last_page, head, num_heads, HAS_TABLE) * P
    next_k, next_v = tl.load(k_scale + at + key), tl.load(v_scale + at + key)
    for i in tl.range(page * STEPS, last_page * STEPS):
        offset = i % STEPS * N
        at = _page_at(table, i // STEPS, last_page, head, num_heads, HAS_TABLE) * P
        k = tl.load(k_codes + at * D + offset * D + k_tile)
        v = tl.load(v_codes + at * D + offset + v_tile)
        ks, vs = next_k, next_v  # a step ahead: such short loads are not made asynchronous
        ahead = _page_at(table, (i + 1) // STEPS, last_page, head, num_heads, HAS_TABLE) * P
        ahead += (i + 1) % STEPS * N
        next_k, next_v = tl.load(k_scale + ahead + key), tl.load(v_scale + ahead + key)
        position = i // STEPS * P + offset + key
        seen = (position >= begin) & (position < end)
        vs = tl.where(seen, vs, 0.0)
        bias = tl.where(seen, vs - vs, -float("inf"))  # nan where V is: visible
        x = tl.dot(q_tile, tl.trans(_halves(k, ASM))) * ks[None, :] + bias[None, :]
        p, peak, total, shrink, share = _weigh(
            x, bias, unit_scale, peak, total, cap, SOFTCAP, STEPS
        )
        largest = tl.maximum(tl.max(vs, 0), SMALL)
        w = (p * (vs / largest)[None, :]).to(tl.float16)
        o = tl.dot(w, tl.trans(_halves(v, ASM)))
        acc = acc * shrink[:, None] + o * (share * largest)[:, None]
    _store(
        part_out, part_lse, acc, peak, total, split, num_tokens * num_heads * GROUP, row, dim,
        real, D,
    )  # fmt: skip


@triton.jit
def _weigh(x, bias, unit_scale, peak, total, cap, SOFTCAP: tl.constexpr, STEPS: tl.constexpr):
    """x [R, N] -> p in units of the tile's largest; the new peak and total, and how much what was
    there and what comes are worth beside it."""
    if SOFTCAP:
        x = _capped(x, unit_scale, cap) + bias[None, :]
        tile_peak = tl.max(x, 1)
    else:
        tile_peak = tl.max(x, 1) * unit_scale
    pivot = tile_peak
    if STEPS > 1:  # a step may be without a key that is seen
        pivot = tl.where(tile_peak == -float("inf"), 0.0, tile_peak)
    if SOFTCAP:
        p = tl.exp2(x - pivot[:, None])
    else:
        p = tl.exp2(x * unit_scale[:, None] - pivot[:, None])
    higher = tl.maximum(peak, tile_peak)
    above = higher
    if STEPS > 1:
        above = tl.where(higher == -float("inf"), 0.0, higher)
    shrink, share = tl.exp2(peak - above), tl.exp2(tile_peak - above)
    return p, higher, total * shrink + tl.sum(p, 1) * share, shrink, share


@triton.jit
def _sides(scale, zero, at, HALF_P: tl.constexpr, HALF_N: tl.constexpr):
    """Scales and zeros of one group of dimensions, for tokens of both halves of a page; fp16."""
    a = at + tl.arange(0, HALF_N)
    b = a + HALF_P
    return tl.load(scale + a), tl.load(zero + a), tl.load(scale + b), tl.load(zero + b)


@triton.jit
def _scores4(codes, q_low, q_high, scale0, zero0, scale1, zero1, mean_low, mean_high,
             ASM: tl.constexpr):  # fmt: skip
    """codes [N, D/2] packed -> [R, N] fp32."""
    N: tl.constexpr = codes.shape[0]
    HALF_D: tl.constexpr = codes.shape[1]
    k_low = _low(codes, tl.broadcast_to(scale0[:, None], (N, HALF_D)),
                 tl.broadcast_to(zero0[:, None], (N, HALF_D)), ASM)  # fmt: skip
    x = tl.dot(q_low, tl.trans(k_low + mean_low[None, :]))
    k_high = _high(codes, tl.broadcast_to(scale1[:, None], (N, HALF_D)),
                   tl.broadcast_to(zero1[:, None], (N, HALF_D)), ASM)  # fmt: skip
    return tl.dot(q_high, tl.trans(k_high + mean_high[None, :]), x)


@triton.jit
def _values4(codes, wa, wb, scale_a, zero_a, scale_b, zero_b, ASM: tl.constexpr):
    """codes [dims, N] packed -> [R, dims] fp32."""
    DIMS: tl.constexpr = codes.shape[0]
    N: tl.constexpr = codes.shape[1]
    v_low = _low(codes, tl.broadcast_to(scale_a[None, :], (DIMS, N)),
                 tl.broadcast_to(zero_a[None, :], (DIMS, N)), ASM)  # fmt: skip
    o = tl.dot(wa, tl.trans(v_low))
    v_high = _high(codes, tl.broadcast_to(scale_b[None, :], (DIMS, N)),
                   tl.broadcast_to(zero_b[None, :], (DIMS, N)), ASM)  # fmt: skip
    return tl.dot(wb, tl.trans(v_high), o)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sweep4_wide_kernel(
    q,
    row_scale,
    k_codes,
    k_scale,
    k_zero,
    k_mean,
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
    stop,
    cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    ASM: tl.constexpr,
    STEPS: tl.constexpr,
):
    """int4 pages in STEPS steps, each of as many tokens of a page's first half (a) as of its
    second (b)."""
    GROUPS: tl.constexpr = 2 if D == 128 else 1
    HALF_D: tl.constexpr = D // 2
    HALF_P: tl.constexpr = P // 2
    HALF_N: tl.constexpr = HALF_P // STEPS
    DIMS: tl.constexpr = D // GROUPS
    head = tl.program_id(0) % num_heads
    split = tl.program_id(1)
    sequence, token, count, r0 = place(
        cu_rows, tl.program_id(0) // num_heads, num_tokens, num_sequences,
        GROUP, HAS_ROWS, BLOCK_R, BLOCK_B,
    )  # fmt: skip
    begin, end, page, last_page = keys_of(
        sequence, first, lengths, stop, split, tl.num_programs(1), False, HAS_LENGTHS, P
    )
    r = r0 + tl.arange(0, BLOCK_R)
    real = r < count * GROUP
    row = ((token + r // GROUP) * num_heads + head).to(tl.int64) * GROUP + r % GROUP
    half_dim = tl.arange(0, HALF_D)
    group_dim = tl.arange(0, DIMS)
    key = tl.arange(0, HALF_N)
    q_tile = row[:, None] * D + half_dim[None, :]
    q_low = tl.load(q + q_tile, mask=real[:, None], other=0.0)  # [R, D/2]
    q_high = tl.load(q + q_tile + HALF_D, mask=real[:, None], other=0.0)
    unit_scale = tl.load(row_scale + row, mask=real, other=1.0)

    peak = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc0 = tl.zeros([BLOCK_R, DIMS], tl.float32)
    acc1 = tl.zeros([BLOCK_R, DIMS], tl.float32)
    k_tile = key[:, None] * HALF_D + half_dim[None, :]
    v_tile = group_dim[:, None] * HALF_P + key[None, :]
    table = page_table + sequence * table_b
    at = _page_at(table, page, last_page, head, num_heads, HAS_TABLE)
    next0 = _sides(k_scale, k_zero, at * (GROUPS * P), HALF_P, HALF_N)
    next1 = next0
    if GROUPS == 2:
        next1 = _sides(k_scale, k_zero, at * (GROUPS * P) + P, HALF_P, HALF_N)
    for i in tl.range(page * STEPS, last_page * STEPS):
        at = _page_at(table, i // STEPS, last_page, head, num_heads, HAS_TABLE)
        offset = i % STEPS * HALF_N
        k_step = k_codes + at * (P * HALF_D) + offset * HALF_D + k_tile
        ka = tl.load(k_step)
        kb = tl.load(k_step + HALF_P * HALF_D)
        v_step = v_codes + at * (D * HALF_P) + offset + v_tile
        v0 = tl.load(v_step)
        mean_low = tl.load(k_mean + at * D + half_dim)
        mean_high = tl.load(k_mean + at * D + HALF_D + half_dim)
        # K's scales and zeros come a step ahead: such short loads are not made asynchronous
        scale0a, zero0a, scale0b, zero0b = next0
        scale1a, zero1a, scale1b, zero1b = next1
        ahead = _page_at(table, (i + 1) // STEPS, last_page, head, num_heads, HAS_TABLE)
        ahead = ahead * (GROUPS * P) + (i + 1) % STEPS * HALF_N
        next0 = _sides(k_scale, k_zero, ahead, HALF_P, HALF_N)
        next1 = next0
        if GROUPS == 2:
            next1 = _sides(k_scale, k_zero, ahead + P, HALF_P, HALF_N)
        xa = _scores4(ka, q_low, q_high, scale0a, zero0a, scale1a, zero1a, mean_low, mean_high, ASM)
        xb = _scores4(kb, q_low, q_high, scale0b, zero0b, scale1b, zero1b, mean_low, mean_high, ASM)
        side = at * (GROUPS * P) + offset
        va_scale, va_zero, vb_scale, vb_zero = _sides(v_scale, v_zero, side, HALF_P, HALF_N)
        if SOFTCAP:
            xa = _capped(xa, unit_scale, cap)
            xb = _capped(xb, unit_scale, cap)
        position = i // STEPS * P + offset + key
        seen_a = (position >= begin) & (position < end)
        seen_b = (position + HALF_P >= begin) & (position + HALF_P < end)
        xa = tl.where(seen_a[None, :], xa, -float("inf"))
        xb = tl.where(seen_b[None, :], xb, -float("inf"))
        tile_peak = tl.maximum(tl.max(xa, 1), tl.max(xb, 1))
        if not SOFTCAP:
            tile_peak *= unit_scale
        pivot = tl.where(tile_peak == -float("inf"), 0.0, tile_peak)
        if SOFTCAP:
            pa = tl.exp2(xa - pivot[:, None])
            pb = tl.exp2(xb - pivot[:, None])
        else:
            pa = tl.exp2(xa * unit_scale[:, None] - pivot[:, None])
            pb = tl.exp2(xb * unit_scale[:, None] - pivot[:, None])
        higher = tl.maximum(peak, tile_peak)
        above = tl.where(higher == -float("inf"), 0.0, higher)
        shrink, share = tl.exp2(peak - above), tl.exp2(tile_peak - above)
        peak = higher
        total = total * shrink + (tl.sum(pa, 1) + tl.sum(pb, 1)) * share
        wa, wb = pa.to(tl.float16), pb.to(tl.float16)
        o0 = _values4(v0, wa, wb, va_scale, va_zero, vb_scale, vb_zero, ASM)
        acc0 = acc0 * shrink[:, None] + o0 * share[:, None]
        if GROUPS == 2:
            v1 = tl.load(v_step + DIMS * HALF_P)
            va_scale, va_zero, vb_scale, vb_zero = _sides(v_scale, v_zero, side + P, HALF_P, HALF_N)
            o1 = _values4(v1, wa, wb, va_scale, va_zero, vb_scale, vb_zero, ASM)
            acc1 = acc1 * shrink[:, None] + o1 * share[:, None]
    num_rows = num_tokens * num_heads * GROUP
    _store(part_out, part_lse, acc0, peak, total, split, num_rows, row, group_dim, real, D)
    if GROUPS == 2:
        _store(
            part_out, part_lse, acc1, peak, total, split, num_rows, row, group_dim + DIMS, real, D
        )
