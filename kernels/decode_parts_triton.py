"""What the sweeps over encoded and plain keys share; see decode_triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

LEVELS = tl.constexpr(32512.0)
"""127 * 256: the largest number of two int8 codes."""
FP8_LEVELS = tl.constexpr(448.0)
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a float it leaves the nearest whole number in the low bits."""
SMALL = tl.constexpr(1e-30)

UNSPECIALIZED = (
    "first", "num_pages", "num_rows", "num_sequences", "num_tokens", "splits", "stop", "table_b"
)  # fmt: skip
"""Arguments that change from call to call: no variant is compiled for multiples of 16 and for 1."""


@triton.jit
def three_bits(x):
    """fp32 rounded to e4m3's three bits of mantissa, half to even: what a second code is left over
    from. Through the bits, since on an H200 (triton 3.6) x.to(float8e4nv).to(float32) was now and
    then one step below the code that the same conversion stored."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def place(
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
def keys_of(sequence, first, lengths, stop, split, splits, HAS_FIRST: tl.constexpr,
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
def weigh(x, bias, row_scale, peak, cap, SOFTCAP: tl.constexpr):
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
def store_split(part_out, part_lse, out, peak, total, split, num_rows, row, dim, real,
                 D: tl.constexpr):  # fmt: skip
    """out [dims, R] divided by total, and its lse in base 2; 0 and -inf without keys."""
    at = split.to(tl.int64) * num_rows + row
    safe = tl.where(total == 0.0, 1.0, total)
    tile = part_out + at[None, :] * D + dim[:, None]
    tl.store(tile, out / safe[None, :], mask=real[None, :])
    tl.store(part_lse + at, tl.where(total == 0.0, -float("inf"), peak + tl.log2(safe)), mask=real)


@triton.jit
def fold(acc, ROWS: tl.constexpr):
    """[N, 2 * ROWS]: both halves of the columns become their sum."""
    N: tl.constexpr = acc.shape[0]
    both = tl.reshape(acc, (N, 2, ROWS))
    both = tl.broadcast_to(tl.sum(both, 1)[:, None, :], (N, 2, ROWS))
    return tl.reshape(both, (N, 2 * ROWS))
