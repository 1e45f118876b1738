"""The Triton kernels of decode.py: a sweep of the keys in splits, then a merge of the splits.

Keys are the rows of both products and queries their columns, so that four queries fill half of a
tensor core's eight columns (as its rows they would fill a quarter of sixteen), and pages go to the
tensor cores as they lie, K [P, D] and V [D, P], without a transposition:

    prepare   q H / unit -> high and low codes, once a call
    means     int4: q . k_mean of each page (one number a row and page)
    sweep     x = k_codes (q_high | q_low) * k_scale;  p = exp2(x - peak)
              acc += v_codes (w_high | w_low),  w = p * v_scale / (largest of the tile)
    join      merges the splits and takes out back through H

Codes are never converted to floats: K's and V's go as int8 or e4m3, int4's nibbles as
16 * (code - 8), which one shift and one logical operation make of four at a time; the zeros (moved
by those 8 steps) are sums over p, kept per thread until the end. A query is one number in two
codes, 256 * high + low for int8 (15 bits), high + low / 16 for e4m3 (8 bits), and so is a weight w,
in units of the largest of its own tile: against the largest of all keys a million small weights
beside one sink would all round to 0.

One term each is not enough (error against exact K and V, over that of decoding the pages and
attending in fp32; 1,101 keys, channels of unequal size, flat | peaked | one sink whose value is
near 0):

    terms of q, w   int8                  int4
    2, 2            1.00 | 1.00 | 1.16    1.00 | 1.00 | 1.00
    1, 2            1.21 | 1.00 | 3.40    1.00 | 1.00 | 1.19
    2, 1            2.05 | 1.26 | 21.9    1.02 | 1.00 | 1.96
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ringspan.kernels.decode import ROTATED, page_tokens_of
from ringspan.kernels.rotate_triton import signs_of
from ringspan.types import Part

LEVELS = tl.constexpr(32512.0)
"""127 * 256: the largest number of two int8 codes."""
FP8_LEVELS = tl.constexpr(448.0)
LOG2_E = 1.4426950408889634
_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a float it leaves the nearest whole number in the low bits."""
_SMALL = tl.constexpr(1e-30)

MAX_BLOCK_R = 64
"""Rows (tokens times q heads of a kv head) that share one sweep."""

MAX_SPLITS = 256

UNSPECIALIZED = (
    "first", "num_pages", "num_rows", "num_sequences", "num_tokens", "splits", "stop", "table_b"
)  # fmt: skip
"""Arguments that change from call to call: no variant is compiled for multiples of 16 and for 1."""

_PREPARE_ROWS = 16
_MEANS_PAGES = 64
_PLAIN_KEYS = 64


class Config(NamedTuple):
    """How a sweep is built and cut."""

    num_warps: int
    num_stages: int
    programs: int
    """Of one multiprocessor that the number of splits aims at."""
    q_terms: int = 2
    p_terms: int = 2
    """Codes that make up a query and a weight; fewer than 2 are for measuring what they cost."""
    least_r: int = 8
    """Columns of the smallest tile: from 16 on Hopper's warp-group products are taken."""
    most_r: int = MAX_BLOCK_R
    """Columns of the largest; more rows are more tiles, each of which sweeps the keys."""
    steps: int = 1
    """In which a page of int4 is taken."""
    paired: bool = True
    """Both codes of a weight share one product, where rows fill at most half of the columns."""


DEFAULTS: dict[str, tuple[Config, Config]] = {
    "int8": (Config(4, 3, 2), Config(8, 3, 1)),
    "fp8": (Config(4, 3, 2, least_r=16), Config(8, 3, 1)),
    "int4": (Config(4, 3, 2), Config(8, 3, 1, steps=2)),
    "plain": (Config(4, 2, 2), Config(4, 2, 1)),
}
"""For up to 16 rows of a kv head, and for more."""

TUNED: dict[tuple[tuple[int, int], str], tuple[Config, Config]] = {
    ((9, 0), "int8"): (Config(4, 3, 2), Config(8, 3, 4)),
    ((9, 0), "fp8"): (Config(4, 3, 2), Config(8, 3, 4)),
    ((9, 0), "int4"): (Config(2, 3, 4), Config(8, 3, 6, steps=2)),
}
"""As DEFAULTS, by compute capability and kind; on an H200, 2^20 keys of 8 heads of 128."""


def config_for(kind: str, block_r: int, device: torch.device) -> Config:
    pair = TUNED.get((_capability(device), kind), DEFAULTS[kind])
    return pair[block_r > 16]


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
def _three_bits(x):
    """fp32 rounded to e4m3's three bits of mantissa, half to even: what a second code is left over
    from. Through the bits, since on an H200 (triton 3.6) x.to(float8e4nv).to(float32) was now and
    then one step below the code that the same conversion stored."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _prepare_kernel(
    q,
    high,
    low,
    row_scale,
    sums,
    q_t,
    q_h,
    num_rows,
    num_heads,
    factor,
    norm,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    ROTATE: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, D)
    real = row < num_rows
    q_tile = q + (row // num_heads * q_t + row % num_heads * q_h)[:, None] + dim[None, :]
    x = tl.load(q_tile, mask=real[:, None], other=0.0)
    if ROTATE:
        signs = signs_of(D, x.dtype)
        # the products are exact; "ieee" keeps them so in fp32
        x = tl.dot(x, signs, input_precision="ieee") * norm
    x = x.to(tl.float32)
    levels = LEVELS if INTEGER else FP8_LEVELS
    # a row of zeros keeps a scale above 0: -inf times it hides a key
    unit = tl.maximum(tl.max(tl.abs(x), 1), _SMALL) / levels
    # nan if the row is not finite: visible. Not by x - x, which a GPU that fuses the product by
    # `norm` into the difference makes its rounding error.
    odd = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
    unit = tl.where(odd == 1, float("nan"), unit)
    y = x / unit[:, None]
    code_tile = row[:, None] * D + dim[None, :]
    if INTEGER:
        whole = (y + _MAGIC).to(tl.int32, bitcast=True)
        tl.store(high + code_tile, ((whole + 128) >> 8).to(tl.int8), mask=real[:, None])
        tl.store(low + code_tile, whole.to(tl.int8), mask=real[:, None])
    else:
        rough = _three_bits(y)
        rest = ((y - rough) * 16.0).to(tl.float8e4nv)
        tl.store(high + code_tile, rough.to(tl.float8e4nv), mask=real[:, None])
        tl.store(low + code_tile, rest, mask=real[:, None])
    tl.store(row_scale + row, unit * factor, mask=real)
    if GROUPS > 0:
        group = tl.arange(0, GROUPS)
        group_sums = tl.sum(tl.reshape(y, (BLOCK_R, GROUPS, D // GROUPS)), 2)
        tl.store(sums + row[:, None] * GROUPS + group[None, :], group_sums, mask=real[:, None])


@triton.jit
def _place(
    cu_rows,
    tile,
    num_tokens,
    num_sequences,
    GROUP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """-> the sequence of a tile of rows, its first token, and how many tokens it has from there.

    The number of tiles of each sequence is known on the device alone: spare tiles get no tokens.
    """
    if HAS_ROWS:
        b = tl.arange(0, BLOCK_B)
        start = tl.load(cu_rows + b, mask=b < num_sequences, other=0)
        stop = tl.load(cu_rows + b + 1, mask=b < num_sequences, other=0)
        tiles = tl.cdiv((stop - start) * GROUP, BLOCK_R)
        upto = tl.cumsum(tiles, 0)
        before = (upto <= tile) & (b < num_sequences)
        sequence = tl.sum(before.to(tl.int32), 0)
        local = tile - tl.sum(tl.where(before, tiles, 0), 0)
        here = b == sequence
        token = tl.sum(tl.where(here, start, 0), 0)
        count = tl.sum(tl.where(here, stop - start, 0), 0)
        sequence = tl.minimum(sequence, num_sequences - 1)
    else:
        sequence = 0
        local = tile
        token = 0
        count = num_tokens
    return sequence, token, count, local * BLOCK_R


@triton.jit
def _keys_of(sequence, first, lengths, stop, split, splits, HAS_FIRST: tl.constexpr,
             HAS_LENGTHS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """-> the first and the last key of the sequence, and the blocks of keys of this split."""
    begin = tl.load(first + sequence) if HAS_FIRST else first
    end = stop
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + sequence), stop)
    block = begin // BLOCK_N
    blocks = tl.maximum(tl.cdiv(end, BLOCK_N) - block, 0)
    blocks = tl.where(end > begin, blocks, 0)
    each = blocks // splits
    more = blocks % splits  # the first splits take one more
    low = block + split * each + tl.minimum(split, more)
    return begin, end, low, low + each + (split < more).to(tl.int32)


@triton.jit
def _weigh(x, bias, row_scale, peak, cap, SOFTCAP: tl.constexpr):
    """x [N, R] scores in units of row_scale -> p, the new peak, and how much old and tile shrink.

    A tile always holds a key that is seen, so its peak is finite.
    """
    if SOFTCAP:
        x = cap * (1.0 - 2.0 / (tl.exp2(x * row_scale[None, :]) + 1.0)) + bias[:, None]
        tile_peak = tl.max(x, 0)
        higher = tl.maximum(peak, tile_peak)
        p = tl.exp2(x - higher[None, :])
    else:
        tile_peak = tl.max(x, 0) * row_scale
        higher = tl.maximum(peak, tile_peak)
        p = tl.exp2(x * row_scale[None, :] - higher[None, :])
    return p, higher, tl.exp2(peak - higher), tl.exp2(tile_peak - higher)


@triton.jit
def _store_split(part_out, part_lse, out, peak, total, split, num_rows, row, dim, real,
                 D: tl.constexpr):  # fmt: skip
    """out [dims, R] divided by total, and its lse in base 2; 0 and -inf without keys."""
    at = split.to(tl.int64) * num_rows + row
    safe = tl.where(total == 0.0, 1.0, total)
    tile = part_out + at[None, :] * D + dim[:, None]
    tl.store(tile, out / safe[None, :], mask=real[None, :])
    tl.store(part_lse + at, tl.where(total == 0.0, -float("inf"), peak + tl.log2(safe)), mask=real)


@triton.jit
def _fold(acc, ROWS: tl.constexpr):
    """[N, 2 * ROWS]: both halves of the columns become their sum."""
    N: tl.constexpr = acc.shape[0]
    both = tl.reshape(acc, (N, 2, ROWS))
    both = tl.broadcast_to(tl.sum(both, 1)[:, None, :], (N, 2, ROWS))
    return tl.reshape(both, (N, 2 * ROWS))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sweep8_kernel(
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
    sequence, token, count, r0 = _place(
        cu_rows, tl.program_id(0) // num_heads, num_tokens, num_sequences,
        GROUP, HAS_ROWS, ROWS, BLOCK_B,
    )  # fmt: skip
    begin, end, page, last_page = _keys_of(
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
        p, peak, shrink, tile_share = _weigh(x, bias, unit_scale, peak, cap, SOFTCAP)
        totals = totals * shrink[None, :] + p
        largest = tl.maximum(tile_share * tl.max(vs, 0), _SMALL)
        if INTEGER:
            w = p * vs[:, None] * (1.0 / largest * LEVELS)[None, :]
            whole_w = (w + _MAGIC).to(tl.int32, bitcast=True)
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
            w_high = _three_bits(w)
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
        acc = _fold(acc, ROWS)
    total = tl.sum(totals, 0)
    _store_split(
        part_out, part_lse, acc, peak, total, split, num_tokens * num_heads * GROUP, row, dim,
        real & (column < ROWS), D,
    )  # fmt: skip


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
def _sweep4_kernel(
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
    sequence, token, count, r0 = _place(
        cu_rows, tile, num_tokens, num_sequences, GROUP, HAS_ROWS, ROWS, BLOCK_B
    )
    begin, end, page, last_page = _keys_of(
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
        acc0 = _fold(acc0, ROWS)
        acc1 = _fold(acc1, ROWS)
    real = real & (column < ROWS)
    acc0 += tl.sum(zeros0, 0)[None, :]
    _store_split(part_out, part_lse, acc0, peak, total, split, num_rows, row, group_dim, real, D)
    if GROUPS == 2:
        acc1 += tl.sum(zeros1, 0)[None, :]
        _store_split(
            part_out, part_lse, acc1, peak, total, split, num_rows, row, group_dim + DIMS, real, D
        )


@triton.jit
def _values4(acc, v, pa, pb, vsa, vsb, shrink, tile_share, is_low, P_TERMS: tl.constexpr,
             PAIRED: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """One group of dimensions: acc [dims, R] goes on over tokens of both halves, v packed."""
    largest = tl.maximum(tile_share * tl.max(tl.maximum(vsa, vsb), 0), _SMALL)
    inverse = (1.0 / largest * LEVELS)[None, :]
    wa = (pa * vsa[:, None] * inverse + _MAGIC).to(tl.int32, bitcast=True)
    wb = (pb * vsb[:, None] * inverse + _MAGIC).to(tl.int32, bitcast=True)
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _means_kernel(
    high,
    low,
    k_mean,
    means,
    page_table,
    cu_rows,
    num_tokens,
    num_sequences,
    num_heads,
    table_b,
    num_pages,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """q . k_mean of each page, [tile, head, page, row], in the units of the codes of q."""
    ROWS: tl.constexpr = BLOCK_R // 2 if PAIRED else BLOCK_R
    tile = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    sequence, token, count, r0 = _place(
        cu_rows, tile, num_tokens, num_sequences, GROUP, HAS_ROWS, ROWS, BLOCK_B
    )
    r = r0 + tl.arange(0, BLOCK_R) % ROWS
    real = r < count * GROUP
    row = ((token + r // GROUP) * num_heads + head).to(tl.int64) * GROUP + r % GROUP
    dim = tl.arange(0, D)
    codes_tile = row[None, :] * D + dim[:, None]
    q_high = tl.load(high + codes_tile, mask=real[None, :], other=0).to(tl.float16)
    q_low = tl.load(low + codes_tile, mask=real[None, :], other=0).to(tl.float16)
    page = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = page < num_pages
    unit = page
    if HAS_TABLE:
        unit = tl.load(page_table + sequence * table_b + page, mask=inside, other=0)
    at = (unit.to(tl.int64) * num_heads + head) * D
    mean = tl.load(k_mean + at[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
    # codes are exact in fp16: only the sum rounds
    product = tl.dot(mean, q_high) * 256.0 + tl.dot(mean, q_low)
    base = means + (tile * num_heads + head).to(tl.int64) * num_pages * BLOCK_R
    at_means = base + page[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    tl.store(at_means, product, mask=inside[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _sweep_plain_kernel(
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
    sequence, token, count, r0 = _place(
        cu_rows, tl.program_id(0) // num_heads, num_tokens, num_sequences,
        GROUP, HAS_ROWS, BLOCK_R, BLOCK_B,
    )  # fmt: skip
    begin, end, block, last_block = _keys_of(
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
        p, peak, shrink, _ = _weigh(x, bias, factors, peak, cap, SOFTCAP)
        totals = totals * shrink[None, :] + p
        acc = acc * shrink[None, :] + tl.dot(
            tl.trans(v_block), p.to(v.dtype.element_ty), input_precision="ieee"
        )
    total = tl.sum(totals, 0)
    _store_split(
        part_out, part_lse, acc, peak, total, split, num_tokens * num_heads * GROUP,
        of_token * num_heads * GROUP + of_head, dim, real, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _join_kernel(
    part_out,
    part_lse,
    out,
    lse,
    num_rows,
    splits,
    norm,
    D: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE_S: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Splits [S, rows, D] -> one row of out, back through the rotation, and its lse."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    lses = tl.load(part_lse + split * num_rows + row, mask=split < splits, other=-float("inf"))
    peak = tl.max(lses, 0)
    pivot = tl.where(peak == -float("inf"), 0.0, peak)
    total = tl.sum(tl.exp2(lses - pivot), 0)
    dim = tl.arange(0, D)
    merged = tl.zeros([D], tl.float32)
    for start in range(0, splits, TILE_S):
        s = start + tl.arange(0, TILE_S)
        inside = s < splits
        weight = tl.exp2(
            tl.load(part_lse + s * num_rows + row, mask=inside, other=-float("inf")) - pivot
        )
        tile = part_out + (s * num_rows + row)[:, None] * D + dim[None, :]
        merged += tl.sum(tl.load(tile, mask=inside[:, None], other=0.0) * weight[:, None], 0)
    safe = tl.where(total == 0.0, 1.0, total)
    merged = merged / safe
    if ROTATE:
        for start in tl.static_range(0, D, DIMS):
            some = start + tl.arange(0, DIMS)
            both = some[:, None] & dim[None, :]
            both ^= both >> 4
            both ^= both >> 2
            both ^= both >> 1
            signed = tl.where((both & 1) == 1, -merged[None, :], merged[None, :])
            value = tl.sum(signed, 1) * norm
            tl.store(out + row * D + some, value.to(out.dtype.element_ty))
    else:
        tl.store(out + row * D + dim, merged.to(out.dtype.element_ty))
    natural = tl.where(total == 0.0, -float("inf"), (pivot + tl.log2(safe)) * 0.6931471805599453)
    tl.store(lse + row, natural)


def serves(kind: str, q: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether the kernels take these shapes on q's device."""
    dim, tokens = q.shape[2], page_tokens_of(kind, tensors)
    if kind == "plain":
        return dim in (16, 32, 64, 128, 256)
    if kind == "int8" and dim == 256 and q.dtype == torch.float32:
        return False  # the matrix of signs in fp32 is larger than a multiprocessor's shared memory
    if kind == "int4":
        return dim in (64, 128) and tokens in (64, 128)
    if kind == "fp8" and _capability(q.device) < (8, 9):
        return False
    return dim in (64, 128, 256) and tokens in (32, 64, 128)


def attend_pages_triton(
    kind: str,
    q: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    *,
    scale: float,
    stop: int,
    first: int | torch.Tensor,
    softcap: float,
    page_table: torch.Tensor | None,
    cu_rows: torch.Tensor | None,
    lengths: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
    splits: int | None = None,
) -> Part:
    """As decode.attend_pages, whose checks have passed, for shapes that `serves` takes.

    Nothing waits for the device, and every launch's shape follows from what the host knows: safe
    within a CUDA graph, whose pool keeps the scratch memory.
    """
    num_tokens, q_heads, dim = q.shape
    num_heads = tensors[0].shape[1]
    group = q_heads // num_heads
    num_rows = num_tokens * q_heads
    sequences = 1 if cu_rows is None else cu_rows.numel() - 1
    block_r = _block_r(num_tokens, sequences, group)
    config = config or config_for(kind, block_r, q.device)
    block_r = min(max(block_r, config.least_r), config.most_r)
    paired = config.paired and config.p_terms == 2 and kind != "plain"
    paired = paired and 2 * triton.cdiv(num_tokens, sequences) * group <= block_r
    tile_rows = block_r // 2 if paired else block_r
    tiles = triton.cdiv(num_tokens * group, tile_rows)
    if cu_rows is not None:
        tiles = num_tokens * group // tile_rows + sequences
    block_n = _PLAIN_KEYS if kind == "plain" else page_tokens_of(kind, tensors)
    lowest = 0 if isinstance(first, torch.Tensor) else first
    if splits is None:
        splits = _splits(config, tiles * num_heads, stop - lowest, block_n, q.device)

    fp32 = {"dtype": torch.float32, "device": q.device}
    part_out = torch.empty((splits, num_rows, dim), **fp32)
    part_lse = torch.empty((splits, num_rows), **fp32)
    out = torch.empty((num_tokens, q_heads, dim), dtype=out_dtype, device=q.device)
    lse = torch.empty((num_tokens, q_heads), **fp32)
    factor = scale * 2 * LOG2_E / softcap if softcap else scale * LOG2_E
    rotate = kind in ROTATED
    grid = (tiles * num_heads, splits)
    index = {
        "GROUP": group, "D": dim, "BLOCK_R": block_r,
        "BLOCK_B": triton.next_power_of_2(sequences), "HAS_ROWS": cu_rows is not None,
    }  # fmt: skip
    rows = q if cu_rows is None else cu_rows
    ends = q if lengths is None else lengths
    launch = {
        "SOFTCAP": softcap != 0.0, "HAS_LENGTHS": lengths is not None,
        "num_warps": config.num_warps,
        # looking up a page is a stage of its own
        "num_stages": config.num_stages + (page_table is not None),
    }  # fmt: skip
    if kind == "plain":
        _sweep_plain_kernel[grid](
            q, *tensors, rows, first, ends, part_out, part_lse, q.stride(0), q.stride(1),
            num_tokens, sequences, num_heads, stop, factor, softcap * LOG2_E,
            BLOCK_N=block_n, HAS_FIRST=isinstance(first, torch.Tensor), **index, **launch,
        )  # fmt: skip
    else:
        table = q if page_table is None else page_table
        width = 0 if page_table is None else page_table.shape[-1]
        paged = {"HAS_TABLE": page_table is not None}
        codes = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        high, low = torch.empty((2, num_rows, dim), dtype=codes, device=q.device)
        groups = max(1, dim // 64) if kind == "int4" else 0
        row_scale = torch.empty(num_rows, **fp32)
        sums = torch.empty((num_rows, groups), **fp32) if groups else row_scale
        _prepare_kernel[(triton.cdiv(num_rows, _PREPARE_ROWS),)](
            q, high, low, row_scale, sums, q.stride(0), q.stride(1), num_rows, q_heads,
            factor, 1 / math.sqrt(dim),
            D=dim, GROUPS=groups, ROTATE=rotate, INTEGER=kind != "fp8", BLOCK_R=_PREPARE_ROWS,
            num_warps=4 if dim < 256 else 8,
        )  # fmt: skip
        sizes = (num_tokens, sequences, num_heads, width)
        terms = {"Q_TERMS": config.q_terms, "P_TERMS": config.p_terms, "PAIRED": paired}
        if kind == "int4":
            k_codes, k_scale, k_zero, k_mean, v_codes, v_scale, v_zero = tensors
            pages = triton.cdiv(stop, block_n)
            means = torch.empty((tiles * num_heads, pages, block_r), **fp32)
            _means_kernel[(tiles * num_heads, triton.cdiv(pages, _MEANS_PAGES))](
                high, low, k_mean, means, table, rows, *sizes, pages,
                BLOCK_P=_MEANS_PAGES, PAIRED=paired, **index, **paged, num_warps=4,
            )  # fmt: skip
            _sweep4_kernel[grid](
                high, low, row_scale, sums, means, k_codes, k_scale, k_zero, v_codes, v_scale,
                v_zero, table, rows, first, ends, part_out, part_lse, *sizes, pages, stop,
                softcap * LOG2_E, P=block_n, ASM=q.is_cuda, STEPS=config.steps, **index, **paged,
                **terms, **launch,
            )  # fmt: skip
        else:
            _sweep8_kernel[grid](
                high, low, row_scale, *tensors, table, rows, first, ends, part_out, part_lse,
                *sizes, stop, softcap * LOG2_E,
                P=block_n, INTEGER=kind == "int8", **index, **paged, **terms, **launch,
            )  # fmt: skip
    _join_kernel[(num_rows,)](
        part_out, part_lse, out, lse, num_rows, splits, 1 / math.sqrt(dim),
        D=dim, ROTATE=rotate, BLOCK_S=triton.next_power_of_2(splits),
        TILE_S=16, DIMS=min(dim, 32), num_warps=4,
    )  # fmt: skip
    return Part(out, lse)


def _block_r(num_tokens: int, sequences: int, group: int) -> int:
    """Columns of a tile: the rows of an average sequence, at least a tensor core's eight."""
    rows = triton.cdiv(num_tokens, sequences) * group
    return max(8, min(MAX_BLOCK_R, triton.next_power_of_2(rows)))


def _splits(config: Config, columns: int, keys: int, block_n: int, device: torch.device) -> int:
    """As many as fill the device, of at least two blocks each."""
    wanted = config.programs * _multiprocessors(device) // columns
    return max(1, min(wanted, MAX_SPLITS, keys // (2 * block_n)))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
