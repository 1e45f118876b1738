"""What stands before a sweep (the queries as codes, int4's means) and behind it (the merge of the
splits); see decode_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ringspan.kernels.decode_parts_triton import (
    FP8_LEVELS,
    LEVELS,
    MAGIC,
    SMALL,
    UNSPECIALIZED,
    place,
    three_bits,
)
from ringspan.kernels.rotate_triton import signs_of


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
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
    CODES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows of q behind the rotation, in units of their largest: in two CODES (int8 or fp8), or,
    for "wide" sweeps, as one fp16."""
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
    levels = LEVELS if CODES == "int8" else FP8_LEVELS if CODES == "fp8" else 1.0
    # a row of zeros keeps a scale above 0: -inf times it hides a key
    unit = tl.maximum(tl.max(tl.abs(x), 1), SMALL) / levels
    # nan if the row is not finite: visible. Not by x - x, which a GPU that fuses the product by
    # `norm` into the difference makes its rounding error.
    odd = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
    unit = tl.where(odd == 1, float("nan"), unit)
    y = x / unit[:, None]
    code_tile = row[:, None] * D + dim[None, :]
    if CODES == "wide":
        tl.store(high + code_tile, y.to(tl.float16), mask=real[:, None])
    elif CODES == "int8":
        whole = (y + MAGIC).to(tl.int32, bitcast=True)
        tl.store(high + code_tile, ((whole + 128) >> 8).to(tl.int8), mask=real[:, None])
        tl.store(low + code_tile, whole.to(tl.int8), mask=real[:, None])
    else:
        rough = three_bits(y)
        rest = ((y - rough) * 16.0).to(tl.float8e4nv)
        tl.store(high + code_tile, rough.to(tl.float8e4nv), mask=real[:, None])
        tl.store(low + code_tile, rest, mask=real[:, None])
    tl.store(row_scale + row, unit * factor, mask=real)
    if GROUPS > 0:
        group = tl.arange(0, GROUPS)
        group_sums = tl.sum(tl.reshape(y, (BLOCK_R, GROUPS, D // GROUPS)), 2)
        tl.store(sums + row[:, None] * GROUPS + group[None, :], group_sums, mask=real[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def means_kernel(
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
    sequence, token, count, r0 = place(
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
def join_kernel(
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
