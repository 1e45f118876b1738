"""The Triton kernels of page_int4.py: a program takes every num_programs-th (page, head).

A tile is loaded as two halves of D, as in page_scaled_triton.py. At D 128 each half is a group and
a nibble of K's bytes, so nothing moves between threads but for sums. V's bytes pair token n with
n + P/2: its tile is also halved along the tokens. At D 256 a half holds two groups; below 128 both
halves are of one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ringspan.kernels.page_int4 import GROUP
from ringspan.kernels.page_scaled_triton import (
    Config,
    load_halves,
    rotate_halves,
    store_halves,
)
from ringspan.kernels.rotate_triton import signs_of

CONFIGS = {
    "int4 encode k": Config(4, 2, 264),
    "int4 encode v": Config(4, 2, 528),
    "int4 decode k": Config(4, 3, 528),
    "int4 decode v": Config(4, 2, 528),
}
"""K's tile is of all tokens of a page, V's of half of them."""


@triton.jit
def _limits(z, GROUPS: tl.constexpr):
    """z [R, HALF] -> the least and the largest of each group, [R, GROUPS]."""
    if GROUPS == 1:
        low = tl.min(z, 1)[:, None]
        high = tl.max(z, 1)[:, None]
    else:
        parts = tl.reshape(z, [z.shape[0], GROUPS, z.shape[1] // GROUPS])
        low = tl.min(parts, 2)
        high = tl.max(parts, 2)
    return low, high


@triton.jit
def _spread(of_group, HALF: tl.constexpr):
    """[R, GROUPS] -> what broadcasts to [R, HALF]."""
    R: tl.constexpr = of_group.shape[0]
    GROUPS: tl.constexpr = of_group.shape[1]
    if GROUPS > 1:
        wide = tl.broadcast_to(of_group[:, :, None], [R, GROUPS, HALF // GROUPS])
        of_group = tl.reshape(wide, [R, HALF])
    return of_group


@triton.jit
def _steps(low, high, norm, real):
    """Limits of groups [R, GROUPS] fp32, before `norm` -> scale and zero to be stored, fp16; nan
    where fp16 cannot hold them, or where the limits are not finite."""
    zero = (low * norm).to(tl.float16)
    scale = ((high - low) * (norm * 0.06666666666666667)).to(tl.float16)
    top: tl.constexpr = 65504.0
    good = (tl.abs(scale.to(tl.float32)) <= top) & (tl.abs(zero.to(tl.float32)) <= top)
    scale = tl.where(good, scale, float("nan"))
    scale = tl.where(real[:, None], scale, 0.0)
    return scale.to(tl.float16), tl.where(good & real[:, None], zero, 0.0).to(tl.float16)


@triton.jit
def _codes(z, scale, zero, norm):
    """z [R, HALF] fp32 before `norm`, scale and zero [R, GROUPS] fp16 -> codes [R, HALF] uint8.

    The nearest whole number is what 1.5 * 2^23 leaves in the low bits; of nan: 0.
    """
    step = scale.to(tl.float32)
    used = step > 0.0  # of nan: not
    inverse = tl.where(used, norm / tl.where(used, step, 1.0), 0.0)
    base = zero.to(tl.float32) * (1.0 / norm)
    magic: tl.constexpr = 12582912.0
    value = (z - _spread(base, z.shape[1])) * _spread(inverse, z.shape[1]) + magic
    value = tl.minimum(tl.maximum(value, magic), magic + 15.0)
    return value.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _half_limits(z0, z1, GROUPS: tl.constexpr, SHARED: tl.constexpr):
    """Of the groups of both halves, each [R, GROUPS]; the same where they share one."""
    low0, high0 = _limits(z0, GROUPS)
    low1, high1 = _limits(z1, GROUPS)
    if SHARED:
        low0 = tl.minimum(low0, low1)
        high0 = tl.maximum(high0, high1)
        low1 = low0
        high1 = high0
    return low0, high0, low1, high1


@triton.jit
def _range(low0, high0, low1, high1):
    """[R]: the largest max - min of a row's groups."""
    return tl.max(tl.maximum(high0 - low0, high1 - low1), 1)


@triton.jit
def _encode_halves(
    z0,
    z1,
    low0,
    high0,
    low1,
    high1,
    norm,
    real,
    side,
    scale,
    zero,
    P,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Halves of rows [R, HALF] -> their codes; stores scale and zero, at `side` [R, 1] tokens."""
    group = tl.arange(0, GROUPS)[None, :] * P
    scale0, zero0 = _steps(low0, high0, norm, real)
    tl.store(scale + side + group, scale0)
    tl.store(zero + side + group, zero0)
    if SHARED:
        scale1 = scale0
        zero1 = zero0
    else:
        scale1, zero1 = _steps(low1, high1, norm, real)
        tl.store(scale + side + group + GROUPS * P, scale1)
        tl.store(zero + side + group + GROUPS * P, zero1)
    return _codes(z0, scale0, zero0, norm), _codes(z1, scale1, zero1, norm)


@triton.jit
def _rotated(x_tile, dim, real, signs, HALF: tl.constexpr):
    """Halves of x S [R, HALF] fp32. A row with an element that is not finite has none that is."""
    a, b = load_halves(x_tile, dim, real, HALF)
    return rotate_halves(a, b, signs)


@triton.jit
def _column_mean(y, counted, share, norm):
    """Mean [HALF] over the counted rows of y norm, each `share` of it, as it is stored, nan if fp16
    cannot hold it, and as it is subtracted from y, then 0."""
    total = tl.sum(tl.where(counted[:, None], y, 0.0), 0)
    mean = (total * (norm * share)).to(tl.float16)
    holds = tl.abs(mean.to(tl.float32)) <= 65504.0
    stored = tl.where(holds, mean, float("nan")).to(tl.float16)
    return stored, tl.where(holds, mean.to(tl.float32), 0.0) * (1.0 / norm)


@triton.jit
def _encode_k_kernel(
    x,
    codes,
    scale,
    zero,
    mean,
    x_t,
    x_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    HALF: tl.constexpr,
    P: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = 1 if SHARED else 2 * GROUPS
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, x.dtype.element_ty)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        token = tile // num_heads * P + slot
        real = token < num_tokens
        x_tile = x + (token * x_t + tile % num_heads * x_h)[:, None]
        y0, y1 = _rotated(x_tile, dim, real, signs, HALF)  # [P, HALF]
        low0, high0, low1, high1 = _half_limits(y0, y1, GROUPS, SHARED)
        y_range = _range(low0, high0, low1, high1)
        counted = real & (y_range < float("inf"))  # of nan: not
        share = 1.0 / tl.maximum(tl.sum(counted.to(tl.int32), 0), 1).to(tl.float32)
        stored0, mean0 = _column_mean(y0, counted, share, norm)
        stored1, mean1 = _column_mean(y1, counted, share, norm)
        # y less its mean is taken twice: kept, it would take the registers of a second program
        z_low0, z_high0, z_low1, z_high1 = _half_limits(
            y0 - mean0[None, :], y1 - mean1[None, :], GROUPS, SHARED
        )
        z_range = _range(z_low0, z_high0, z_low1, z_high1)
        widens = tl.max(((z_range > 2.0 * y_range) & counted).to(tl.int32), 0) > 0
        tl.store(mean + tile * (2 * HALF) + dim, tl.where(widens, 0.0, stored0))
        tl.store(mean + tile * (2 * HALF) + HALF + dim, tl.where(widens, 0.0, stored1))
        z0 = y0 - tl.where(widens, 0.0, mean0)[None, :]
        z1 = y1 - tl.where(widens, 0.0, mean1)[None, :]
        low0 = tl.where(widens, low0, z_low0)
        high0 = tl.where(widens, high0, z_high0)
        low1 = tl.where(widens, low1, z_low1)
        high1 = tl.where(widens, high1, z_high1)
        side = tile * (NUM_GROUPS * P) + slot[:, None]
        code0, code1 = _encode_halves(
            z0, z1, low0, high0, low1, high1, norm, real, side, scale, zero, P, GROUPS, SHARED
        )
        code_tile = codes + tile * (HALF * P) + slot[:, None] * HALF + dim[None, :]
        tl.store(code_tile, code0 | (code1 << 4))


@triton.jit
def _encode_v_kernel(
    x,
    codes,
    scale,
    zero,
    x_t,
    x_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    HALF: tl.constexpr,
    P: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = 1 if SHARED else 2 * GROUPS
    R: tl.constexpr = P // 2
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, R)
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, x.dtype.element_ty)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        token = tile // num_heads * P + slot
        x_tile = x + (token * x_t + tile % num_heads * x_h)[:, None]
        side = tile * (NUM_GROUPS * P) + slot[:, None]
        real = token < num_tokens
        y0, y1 = _rotated(x_tile, dim, real, signs, HALF)  # [R, HALF]
        low0, high0, low1, high1 = _half_limits(y0, y1, GROUPS, SHARED)
        first0, first1 = _encode_halves(
            y0, y1, low0, high0, low1, high1, norm, real, side, scale, zero, P, GROUPS, SHARED
        )
        real = token + R < num_tokens
        side += R
        x_tile += one * R * x_t
        y0, y1 = _rotated(x_tile, dim, real, signs, HALF)
        low0, high0, low1, high1 = _half_limits(y0, y1, GROUPS, SHARED)
        second0, second1 = _encode_halves(
            y0, y1, low0, high0, low1, high1, norm, real, side, scale, zero, P, GROUPS, SHARED
        )
        code_tile = codes + tile * (2 * HALF * R) + dim[:, None] * R + slot[None, :]  # [HALF, R]
        tl.store(code_tile, tl.trans(first0 | (second0 << 4)))
        tl.store(code_tile + HALF * R, tl.trans(first1 | (second1 << 4)))


@triton.jit
def _decode_halves(
    code0, code1, side, scale, zero, dim, signs, norm, P, GROUPS: tl.constexpr, SHARED: tl.constexpr
):
    """Halves of codes [R, HALF] -> of x' but for the mean, fp32."""
    HALF: tl.constexpr = code0.shape[1]
    group = tl.arange(0, GROUPS)[None, :] * P
    step0 = tl.load(scale + side + group).to(tl.float32)  # [R, GROUPS]
    # a constant group rotates into its first dimension alone
    base0 = tl.load(zero + side + group).to(tl.float32)
    # codes are exact in fp16, their sums are whole numbers: exact in any order
    y0 = tl.dot(code0.to(tl.float16), signs)
    y1 = tl.dot(code1.to(tl.float16), signs)
    if SHARED:
        sums = y0 + y1
        y1 = (y0 - y1) * step0
        y0 = sums * step0
        y0 = tl.where((dim == 0)[None, :], y0 + base0 * (2.0 * HALF), y0)
    else:
        LENGTH: tl.constexpr = HALF // GROUPS
        step1 = tl.load(scale + side + group + GROUPS * P).to(tl.float32)
        base1 = tl.load(zero + side + group + GROUPS * P).to(tl.float32)
        first = (dim % LENGTH == 0)[None, :]
        y0 = y0 * _spread(step0, HALF)
        y0 = tl.where(first, y0 + _spread(base0, HALF) * (1.0 * LENGTH), y0)
        y1 = y1 * _spread(step1, HALF)
        y1 = tl.where(first, y1 + _spread(base1, HALF) * (1.0 * LENGTH), y1)
        if GROUPS == 2:
            y0 = _butterfly(y0)
            y1 = _butterfly(y1)
        sums = y0 + y1
        y1 = y0 - y1
        y0 = sums
    return y0 * norm, y1 * norm


@triton.jit
def _butterfly(y):
    """y [R, HALF]: the last round of butterflies within its rows."""
    R: tl.constexpr = y.shape[0]
    HALF: tl.constexpr = y.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(y, [R, 2, HALF // 2]), [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [R, HALF])


@triton.jit
def _group_signs(HALF: tl.constexpr, GROUPS: tl.constexpr):
    """The signs within one or two groups: [HALF, HALF], 0 between the two."""
    signs = signs_of(HALF, tl.float16)
    if GROUPS == 2:
        group = tl.arange(0, HALF) // (HALF // 2)
        # the second group's own indices lack the bit that makes its signs those of HALF
        own = tl.where(group[:, None] == 1, -signs, signs)
        signs = tl.where(group[:, None] == group[None, :], own, 0.0).to(tl.float16)
    return signs


@triton.jit
def _rotated_mean(mean, dim, norm, HALF: tl.constexpr):
    """mean [2 HALF] fp16 -> halves of its rotation, fp32; sums are exact in fp64 in any order."""
    signs = signs_of(HALF, tl.int8)
    m0 = tl.load(mean + dim).to(tl.float64)
    m1 = tl.load(mean + HALF + dim).to(tl.float64)
    # down the columns: along the rows every addition would cross threads
    r0 = tl.sum(tl.where(signs > 0, m0[:, None], -m0[:, None]), 0)
    r1 = tl.sum(tl.where(signs > 0, m1[:, None], -m1[:, None]), 0)
    return (r0 + r1).to(tl.float32) * norm, (r0 - r1).to(tl.float32) * norm


@triton.jit
def _decode_k_kernel(
    codes,
    scale,
    zero,
    mean,
    out,
    out_t,
    out_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    HALF: tl.constexpr,
    P: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = 1 if SHARED else 2 * GROUPS
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    one = tl.full([], 1, tl.int64)
    signs = _group_signs(HALF, GROUPS)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        both = tl.load(codes + tile * (HALF * P) + slot[:, None] * HALF + dim[None, :])
        side = tile * (NUM_GROUPS * P) + slot[:, None]
        y0, y1 = _decode_halves(
            both & 15, both >> 4, side, scale, zero, dim, signs, norm, P, GROUPS, SHARED
        )
        m0, m1 = _rotated_mean(mean + tile * (2 * HALF), dim, norm, HALF)
        token = tile // num_heads * P + slot
        out_tile = out + (token * out_t + tile % num_heads * out_h)[:, None]
        y0 += m0[None, :]
        y1 += m1[None, :]
        store_halves(out_tile, dim, token < num_tokens, y0, y1, HALF)


@triton.jit
def _decode_v_kernel(
    codes,
    scale,
    zero,
    out,
    out_t,
    out_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    HALF: tl.constexpr,
    P: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = 1 if SHARED else 2 * GROUPS
    R: tl.constexpr = P // 2
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, R)
    one = tl.full([], 1, tl.int64)
    signs = _group_signs(HALF, GROUPS)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        code_tile = codes + tile * (2 * HALF * R) + dim[:, None] * R + slot[None, :]  # [HALF, R]
        both0 = tl.trans(tl.load(code_tile))
        both1 = tl.trans(tl.load(code_tile + HALF * R))
        side = tile * (NUM_GROUPS * P) + slot[:, None]
        token = tile // num_heads * P + slot
        out_tile = out + (token * out_t + tile % num_heads * out_h)[:, None]
        y0, y1 = _decode_halves(
            both0 & 15, both1 & 15, side, scale, zero, dim, signs, norm, P, GROUPS, SHARED
        )
        store_halves(out_tile, dim, token < num_tokens, y0, y1, HALF)
        y0, y1 = _decode_halves(
            both0 >> 4, both1 >> 4, side + R, scale, zero, dim, signs, norm, P, GROUPS, SHARED
        )
        store_halves(out_tile + one * R * out_t, dim, token + R < num_tokens, y0, y1, HALF)


def encode(k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As page_int4.encode, for CUDA tensors; D 32 to 256, a power of two."""
    encode_k(k, into[:4])
    _launch(_encode_v_kernel, "int4 encode v", (v, *into[4:]), v, into[5])


def encode_k(k: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As page_int4.encode_k."""
    _launch(_encode_k_kernel, "int4 encode k", (k, *into), k, into[1])


def decode(tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
    """As page_int4.decode, for CUDA tensors; D 32 to 256, a power of two."""
    decode_k(tensors[:4], k)
    _launch(_decode_v_kernel, "int4 decode v", (*tensors[4:], v), v, tensors[5])


def decode_k(tensors: tuple[torch.Tensor, ...], k: torch.Tensor) -> None:
    """As page_int4.decode_k."""
    _launch(_decode_k_kernel, "int4 decode k", (*tensors, k), k, tensors[1])


def shape(dim: int, page_tokens: int) -> dict[str, int | bool]:
    half = dim // 2
    return {
        "HALF": half,
        "P": page_tokens,
        "GROUPS": max(1, half // GROUP),
        "SHARED": half < GROUP,
    }


def _launch(
    kernel: triton.JITFunction,
    name: str,
    tensors: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """x [T, H, D] is coded or decoded; scale [U, H, G, P] says how many pages there are."""
    tokens, heads, dim = x.shape
    tiles = scale.shape[0] * scale.shape[1]
    config = CONFIGS[name]
    kernel[(min(tiles, config.programs),)](
        *tensors, x.stride(0), x.stride(1), tokens, heads, tiles, 1 / math.sqrt(dim),
        **shape(dim, scale.shape[3]), **config.options(dim),
    )  # fmt: skip
