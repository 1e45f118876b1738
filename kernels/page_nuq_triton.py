"""The Triton kernels of page_nuq.py: a program takes every num_programs-th (page, head).

A tile is loaded as two halves of D, as in page_scaled_triton.py: rotary positions pair dimension d
with d + D/2, so that turning a page moves nothing between threads, and nibbles pair them too.
Encoding goes through the table of angles once a base; the tables of all bases are half a megabyte
and stay in the cache.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ringspan.kernels.page_nuq import KEPT_BYTES, ROUNDS, UNIT, WIDENED, Levels, row_bytes
from ringspan.kernels.page_scaled_triton import (
    Config,
    load_halves,
    rotate_halves,
    row_peak,
    store_halves,
)
from ringspan.kernels.page_turn import BASES, tables
from ringspan.kernels.rotate_triton import signs_of

CONFIGS = {
    "nuq encode k": Config(8, 2, 264),
    "nuq encode v": Config(8, 2, 528),
    "nuq decode": Config(8, 2, 528),
}


@triton.jit
def _turned(a, b, cos, sin):
    """Pairs a, b [P, HALF] turned by angles [P, HALF]."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _angles(cos, sin, base, slot, dim, HALF: tl.constexpr, P: tl.constexpr):
    """cos and sin [P, HALF] of a base's table."""
    at = base * (P * HALF) + slot[:, None] * HALF + dim[None, :]
    return tl.load(cos + at), tl.load(sin + at)


@triton.jit
def _row_sum(a, b):
    """Sum over both halves of each row, [P]."""
    return tl.sum(a, 1) + tl.sum(b, 1)


@triton.jit
def _mean(u, counted, count):
    """Of the rows that count, as it is stored, fp16; 0 where fp16 cannot hold it."""
    total = tl.sum(tl.where(counted[:, None], u, 0.0), 0)
    mean = tl.div_rn(total, count + tl.zeros_like(total)).to(tl.float16)
    return tl.where(tl.abs(mean.to(tl.float32)) <= 65504.0, mean, 0.0).to(tl.float16)


@triton.jit
def _inverse(step):
    """1 / step; 0 of what is not above 0, or nan."""
    used = step > 0.0
    return tl.where(used, tl.div_rn(1.0, tl.where(used, step, 1.0)), 0.0)


@triton.jit
def _magnitude(size, BITS: tl.constexpr):
    """Sizes in steps -> which magnitude is the nearest, by page_nuq's edges."""
    if BITS == 4:
        found = (size > 12.0).to(tl.uint8) + (size > 24.5).to(tl.uint8)
        found += (size > 37.5).to(tl.uint8) + (size > 51.0).to(tl.uint8)
        found += (size > 66.5).to(tl.uint8) + (size > 85.5).to(tl.uint8)
        found += (size > 111.5).to(tl.uint8)
    else:
        found = (size > 29.5).to(tl.uint8) + (size > 62.0).to(tl.uint8)
        found += (size > 103.0).to(tl.uint8)
    return found


@triton.jit
def _level(magnitude, BITS: tl.constexpr):
    """Which magnitude -> page_nuq's whole number, fp32."""
    if BITS == 4:
        low = tl.where(magnitude > 0, tl.where(magnitude > 1, 31.0, 18.0), 6.0)
        low = tl.where(magnitude > 2, 44.0, low)
        high = tl.where(magnitude > 4, tl.where(magnitude > 5, 96.0, 75.0), 58.0)
        high = tl.where(magnitude > 6, 127.0, high)
        level = tl.where(magnitude > 3, high, low)
    else:
        low = tl.where(magnitude > 0, 45.0, 14.0)
        level = tl.where(magnitude > 1, tl.where(magnitude > 2, 127.0, 79.0), low)
    return level


@triton.jit
def _fold(x, SHIFT: tl.constexpr):
    """x [P, N] uint8 -> [P, N/2]: the second half of each row above the first."""
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    low, high = tl.split(tl.permute(tl.reshape(x, [R, 2, N // 2]), [0, 2, 1]))
    return low | (high << SHIFT)


@triton.jit
def _unfold(x, SHIFT: tl.constexpr):
    """[P, N] -> [P, 2 N]: what `_fold` made, the bits above not masked."""
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.join(x, x >> SHIFT), [0, 2, 1]), [R, 2 * N])


@triton.jit
def _times_signs(z, signs):
    """z [P, HALF] fp32 times signs, to about 22 bits of z."""
    high = (z.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    product = tl.dot(z - high, signs, input_precision="tf32")
    return tl.dot(high, signs, acc=product, input_precision="tf32")


@triton.jit
def _encode_rows(
    z0, z1, finite, real, signs, page, scale, slot, dim, norm, deviation,
    HALF: tl.constexpr, BITS: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Halves of rows z [P, HALF] fp32 -> codes at `page`, scales at `scale`."""
    # Signs are exact in tf32, z is two of its numbers. Of one, 11 bits of z, a value close to an
    # edge took the next level in one row of sixty, and the fit moved its scale by up to 3 %.
    ra = _times_signs(z0, signs)
    rb = _times_signs(z1, signs)
    y0 = (ra + rb) * norm
    y1 = (ra - rb) * norm
    size0 = tl.abs(y0)
    size1 = tl.abs(y1)
    energy = _row_sum(size0 * size0, size1 * size1)
    step = tl.sqrt_rn(energy * (1.0 / (2 * HALF))) * deviation
    for _ in tl.static_range(ROUNDS):
        inverse = _inverse(step)[:, None]
        level0 = _level(_magnitude(size0 * inverse, BITS), BITS)
        level1 = _level(_magnitude(size1 * inverse, BITS), BITS)
        matched = _row_sum(size0 * level0, size1 * level1)
        step = tl.div_rn(matched, _row_sum(level0 * level0, level1 * level1))
    stored = (step * UNIT).to(tl.float16)
    good = finite & (tl.abs(stored.to(tl.float32)) <= 65504.0)
    stored = tl.where(real, tl.where(good, stored, float("nan")), 0.0).to(tl.float16)
    tl.store(scale + slot, stored)
    inverse = _inverse(stored.to(tl.float32) * (1.0 / UNIT))[:, None]
    used = inverse > 0.0
    m0 = tl.where(used, _magnitude(size0 * inverse, BITS), 0).to(tl.uint8)
    m1 = tl.where(used, _magnitude(size1 * inverse, BITS), 0).to(tl.uint8)
    s0 = ((y0 < 0.0) & used).to(tl.uint8)
    s1 = ((y1 < 0.0) & used).to(tl.uint8)
    if BITS == 4:
        both = m0 | (s0 << 3) | (m1 << 4) | (s1 << 7)
        tl.store(page + slot[:, None] * HALF + dim[None, :], both)
    else:
        width: tl.constexpr = 3 * HALF // 4
        quarter = tl.arange(0, HALF // 2)
        eighth = tl.arange(0, HALF // 4)
        line = page + slot[:, None] * width
        tl.store(line + quarter[None, :], _fold(m0 | (m1 << 4), 2))
        tl.store(line + HALF // 2 + eighth[None, :], _fold(_fold(s0 | (s1 << 4), 2), 1))


@triton.jit
def _keep_row(x, token, x_t, x_h, head, row, dim, HALF: tl.constexpr):
    """Row `token` of x to `row`, in its dtype."""
    line = x + token * x_t + head * x_h
    tl.store(row + dim, tl.load(line + dim).to(row.dtype.element_ty))
    tl.store(row + HALF + dim, tl.load(line + HALF + dim).to(row.dtype.element_ty))


@triton.jit
def _encode_k_kernel(
    x, codes, scale, mean, kept, row, cos, sin,
    x_t, x_h, num_tokens, num_heads, num_tiles, norm, deviation,
    HALF: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    NUM_BASES: tl.constexpr, WIDENED: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr,
    KEPT_BYTES: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, tl.float32)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        head = tile % num_heads
        first = tile // num_heads * P
        real = first + slot < num_tokens
        x_tile = x + ((first + slot) * x_t + head * x_h)[:, None]
        a, b = load_halves(x_tile, dim, real, HALF)  # [P, HALF]
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        finite = row_peak(a, b) < float("inf")
        counted = finite & real
        a = tl.where(counted[:, None], a, 0.0)
        b = tl.where(counted[:, None], b, 0.0)
        base = tl.full([], 0, tl.int32)
        most = tl.full([], -1.0, tl.float32)
        for candidate in range(NUM_BASES):
            c, s = _angles(cos, sin, candidate, slot, dim, HALF, P)
            u0, u1 = _turned(a, b, c, -s)
            mean0 = tl.sum(u0, 0)
            mean1 = tl.sum(u1, 0)
            energy = tl.sum(mean0 * mean0 + mean1 * mean1, 0)
            base = tl.where(energy > most, candidate, base)
            most = tl.where(energy > most, energy, most)
        c, s = _angles(cos, sin, base, slot, dim, HALF, P)
        u0, u1 = _turned(a, b, c, -s)
        size = _row_sum(u0 * u0, u1 * u1)
        count = tl.maximum(tl.sum(counted.to(tl.int32), 0), 1).to(tl.float32)
        away0 = u0 - _mean(u0, counted, count).to(tl.float32)[None, :]
        away1 = u1 - _mean(u1, counted, count).to(tl.float32)[None, :]
        away = _row_sum(away0 * away0, away1 * away1)
        strange = tl.where(away > 0.0, float("inf"), 0.0)
        strange = tl.where(size > 0.0, tl.div_rn(away, tl.where(size > 0.0, size, 1.0)), strange)
        strange = tl.where(strange >= 0.0, strange, float("inf"))
        strange = tl.where(counted, strange, -1.0)
        at = tl.min(tl.where(strange == tl.max(strange, 0), slot, P), 0)
        lane = tl.arange(0, KEPT_BYTES)
        told = tl.where(lane == 0, at, tl.where(lane == 1, base, 0))
        tl.store(kept + tile * KEPT_BYTES + lane, told.to(tl.uint8))
        _keep_row(x, first + at, x_t, x_h, head, row + tile * (2 * HALF), dim, HALF)
        counted = counted & (slot != at)
        count = tl.maximum(tl.sum(counted.to(tl.int32), 0), 1).to(tl.float32)
        m0 = _mean(u0, counted, count)
        m1 = _mean(u1, counted, count)
        z0 = u0 - m0.to(tl.float32)[None, :]
        z1 = u1 - m1.to(tl.float32)[None, :]
        widens = (_row_sum(z0 * z0, z1 * z1) > WIDENED * size) & counted
        leave = tl.max(widens.to(tl.int32), 0) > 0
        tl.store(mean + tile * (2 * HALF) + dim, tl.where(leave, 0.0, m0).to(tl.float16))
        tl.store(mean + tile * (2 * HALF) + HALF + dim, tl.where(leave, 0.0, m1).to(tl.float16))
        z0 = tl.where(leave, u0, z0)
        z1 = tl.where(leave, u1, z1)
        _encode_rows(
            z0, z1, finite, real, signs, codes + tile * (P * WIDTH), scale + tile * P,
            slot, dim, norm, deviation, HALF, BITS, ROUNDS, UNIT,
        )  # fmt: skip


@triton.jit
def _encode_v_kernel(
    x, codes, scale, kept, row,
    x_t, x_h, num_tokens, num_heads, num_tiles, norm, deviation,
    HALF: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr, UNIT: tl.constexpr, KEPT_BYTES: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, tl.float32)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        head = tile % num_heads
        first = tile // num_heads * P
        real = first + slot < num_tokens
        x_tile = x + ((first + slot) * x_t + head * x_h)[:, None]
        a, b = load_halves(x_tile, dim, real, HALF)  # [P, HALF]
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        finite = row_peak(a, b) < float("inf")
        a = tl.where(finite[:, None], a, 0.0)
        b = tl.where(finite[:, None], b, 0.0)
        at = tl.load(kept + tile * KEPT_BYTES).to(tl.int32)
        _keep_row(x, first + at, x_t, x_h, head, row + tile * (2 * HALF), dim, HALF)
        _encode_rows(
            a, b, finite, real, signs, codes + tile * (P * WIDTH), scale + tile * P,
            slot, dim, norm, deviation, HALF, BITS, ROUNDS, UNIT,
        )  # fmt: skip


@triton.jit
def _decode_kernel(
    codes, scale, mean, kept, row, cos, sin, out,
    out_t, out_h, num_tokens, num_heads, num_tiles, norm,
    HALF: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    TURN: tl.constexpr, UNIT: tl.constexpr, KEPT_BYTES: tl.constexpr,
):  # fmt: skip
    """TURN: of K, with its mean and positions; of V mean, cos and sin are not read."""
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, tl.float16)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        line = codes + tile * (P * WIDTH) + slot[:, None] * WIDTH
        if BITS == 4:
            both = tl.load(line + dim[None, :])
            m0 = both & 7
            m1 = (both >> 4) & 7
            s0 = (both >> 3) & 1
            s1 = both >> 7
        else:
            both = _unfold(tl.load(line + tl.arange(0, HALF // 2)[None, :]), 2)
            m0 = both & 3
            m1 = (both >> 4) & 3
            both = tl.load(line + HALF // 2 + tl.arange(0, HALF // 4)[None, :])
            both = _unfold(_unfold(both, 1), 2)
            s0 = both & 1
            s1 = (both >> 4) & 1
        level0 = _level(m0, BITS)
        level1 = _level(m1, BITS)
        level0 = tl.where(s0 > 0, -level0, level0).to(tl.float16)
        level1 = tl.where(s1 > 0, -level1, level1).to(tl.float16)
        # whole numbers, exact in fp16; their sums are below 2^24: exact in any order
        z0, z1 = rotate_halves(level0, level1, signs)
        step = tl.load(scale + tile * P + slot).to(tl.float32) * (1.0 / UNIT)
        z0 *= (step * norm)[:, None]
        z1 *= (step * norm)[:, None]
        if TURN:
            z0 += tl.load(mean + tile * (2 * HALF) + dim).to(tl.float32)[None, :]
            z1 += tl.load(mean + tile * (2 * HALF) + HALF + dim).to(tl.float32)[None, :]
            base = tl.load(kept + tile * KEPT_BYTES + 1).to(tl.int32)
            c, s = _angles(cos, sin, base, slot, dim, HALF, P)
            z0, z1 = _turned(z0, z1, c, s)
        here = (slot == tl.load(kept + tile * KEPT_BYTES).to(tl.int32))[:, None]
        row0 = tl.load(row + tile * (2 * HALF) + dim).to(tl.float32)
        row1 = tl.load(row + tile * (2 * HALF) + HALF + dim).to(tl.float32)
        z0 = tl.where(here, row0[None, :], z0)
        z1 = tl.where(here, row1[None, :], z1)
        token = tile // num_heads * P + slot
        out_tile = out + (token * out_t + tile % num_heads * out_h)[:, None]
        store_halves(out_tile, dim, token < num_tokens, z0, z1, HALF)


def encode(
    levels: Levels, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]
) -> None:
    """As page_nuq.encode, for CUDA tensors; D 32 to 256, a power of two."""
    k_codes, k_scale, k_mean, k_kept, k_row, v_codes, v_scale, v_row = into
    made = shape(levels, k.shape[2], k_codes.shape[2])
    _launch(
        _encode_k_kernel, "nuq encode k",
        (k, k_codes, k_scale, k_mean, k_kept, k_row, *_turning(k, k_codes)),
        k, k_codes, (1 / levels.deviation,),
        made | {"ROUNDS": ROUNDS, "NUM_BASES": len(BASES), "WIDENED": WIDENED},
    )  # fmt: skip
    _launch(
        _encode_v_kernel, "nuq encode v", (v, v_codes, v_scale, k_kept, v_row),
        v, v_codes, (1 / levels.deviation,), made | {"ROUNDS": ROUNDS},
    )  # fmt: skip


def decode(
    levels: Levels, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor
) -> None:
    """As page_nuq.decode, for CUDA tensors; D 32 to 256, a power of two."""
    k_codes, k_scale, k_mean, k_kept, k_row, v_codes, v_scale, v_row = tensors
    made = shape(levels, k.shape[2], k_codes.shape[2])
    turning = _turning(k, k_codes)
    for x, sides, turns in (
        (k, (k_codes, k_scale, k_mean, k_kept, k_row), True),
        (v, (v_codes, v_scale, k_mean, k_kept, v_row), False),
    ):
        _launch(
            _decode_kernel, "nuq decode", (*sides, *turning, x), x, k_codes, (),
            made | {"TURN": turns},
        )  # fmt: skip


def shape(levels: Levels, dim: int, page_tokens: int) -> dict[str, int | float]:
    """Constants that all the kernels have."""
    return {
        "HALF": dim // 2,
        "P": page_tokens,
        "BITS": levels.bits,
        "WIDTH": row_bytes(levels, dim),
        "UNIT": UNIT,
        "KEPT_BYTES": KEPT_BYTES,
    }


def _turning(k: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _row_tables(k.shape[2], codes.shape[2], k.device)


@lru_cache(maxsize=16)
def _row_tables(
    dim: int, page_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """page_turn.tables with a token's angles side by side: [bases, P, D/2]."""
    cos, sin = tables(dim, page_tokens, device)
    return cos.transpose(1, 2).contiguous(), sin.transpose(1, 2).contiguous()


def _launch(
    kernel: triton.JITFunction,
    name: str,
    tensors: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    codes: torch.Tensor,
    floats: tuple[float, ...],
    constants: dict[str, int | float | bool],
) -> None:
    """x [T, H, D] is coded or decoded; codes [U, H, P, B] says how many pages there are."""
    tokens, heads, dim = x.shape
    tiles = codes.shape[0] * heads
    config = CONFIGS[name]
    kernel[(min(tiles, config.programs),)](
        *tensors, x.stride(0), x.stride(1), tokens, heads, tiles, 1 / math.sqrt(dim), *floats,
        **constants, **config.options(dim),
    )  # fmt: skip
