"""The Triton kernels of page_int2.py's K; V's are k4v2's. A tile is all tokens of a (page, head),
in two halves of D as page_scaled_triton.py has them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ringspan.kernels import page_k4v2_triton
from ringspan.kernels.page_k4v2 import STEP
from ringspan.kernels.page_k4v2_triton import inverse, launch, length, levels
from ringspan.kernels.page_scaled_triton import load_halves, rotate_halves, store_halves
from ringspan.kernels.quantize import TINY
from ringspan.kernels.rotate_triton import signs_of

_TINY = tl.constexpr(TINY)


@triton.jit
def _width(y0, y1):
    """[R]: max - min of rows in halves; not below inf where anything is not finite."""
    size = tl.maximum(tl.max(tl.abs(y0), 1), tl.max(tl.abs(y1), 1))
    odd0 = tl.max((tl.abs(y0) < float("inf")).to(tl.int32) ^ 1, 1)
    odd1 = tl.max((tl.abs(y1) < float("inf")).to(tl.int32) ^ 1, 1)
    high = tl.maximum(tl.max(y0, 1), tl.max(y1, 1))
    low = tl.minimum(tl.min(y0, 1), tl.min(y1, 1))
    return tl.where((odd0 | odd1) == 1, float("inf"), high - low), size


@triton.jit
def _mean(y, count):
    """[HALF] as it is stored, nan if fp16 cannot hold it, and as it is subtracted, then 0."""
    total = tl.sum(y, 0)
    mean = tl.div_rn(total, count + tl.zeros_like(total)).to(tl.float16)
    holds = tl.abs(mean.to(tl.float32)) <= 65504.0
    stored = tl.where(holds, mean, float("nan")).to(tl.float16)
    return stored, tl.where(holds, mean.to(tl.float32), 0.0)


@triton.jit
def _paired(codes):
    """codes [P, HALF] -> dimension d in two bits, d + HALF / 2 in the next: [P, HALF / 2]."""
    P: tl.constexpr = codes.shape[0]
    QUARTER: tl.constexpr = codes.shape[1] // 2
    pairs = tl.permute(tl.reshape(codes, [P, 2, QUARTER]), [0, 2, 1])
    low, high = tl.split(pairs)
    return low | (high << 2)


@triton.jit
def _encode_k_kernel(
    x,
    codes,
    scale,
    mean,
    x_t,
    x_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    step_norm,
    HALF: tl.constexpr,
    P: tl.constexpr,
):
    QUARTER: tl.constexpr = HALF // 2
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    packed_tile = codes + slot[:, None] * QUARTER + tl.arange(0, QUARTER)[None, :]
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, x.dtype.element_ty)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        token = tile // num_heads * P + slot
        real = token < num_tokens
        x_tile = x + (token * x_t + tile % num_heads * x_h)[:, None]
        a, b = load_halves(x_tile, dim, real, HALF)
        y0, y1 = rotate_halves(a, b, signs)  # [P, HALF]
        y0 *= norm
        y1 *= norm
        width, peak = _width(y0, y1)
        finite = width < float("inf")
        y0 = tl.where(finite[:, None], y0, 0.0)
        y1 = tl.where(finite[:, None], y1, 0.0)
        counted = finite & real
        count = tl.maximum(tl.sum(counted.to(tl.int32), 0), 1).to(tl.float32)
        stored0, mean0 = _mean(y0, count)  # rows that do not count are 0
        stored1, mean1 = _mean(y1, count)
        z_width, peak = _width(y0 - mean0[None, :], y1 - mean1[None, :])
        widens = tl.max(((z_width > 2.0 * width) & counted).to(tl.int32), 0) > 0
        tl.store(mean + tile * (2 * HALF) + dim, tl.where(widens, 0.0, stored0))
        tl.store(mean + tile * (2 * HALF) + HALF + dim, tl.where(widens, 0.0, stored1))
        y0 -= tl.where(widens, 0.0, mean0)[None, :]
        y1 -= tl.where(widens, 0.0, mean1)[None, :]
        width, peak = _width(y0, y1)
        peak = tl.where(peak >= _TINY, peak, 0.0)
        scaled = inverse(peak)[:, None]
        y0 *= scaled
        y1 *= scaled
        row_length = length(y0, y1)
        inverse_step = inverse(row_length * step_norm)
        c0 = levels(y0, inverse_step)
        c1 = levels(y1, inverse_step)
        odd = length(2.0 * c0 + 1.0, 2.0 * c1 + 1.0)
        row_scale = (tl.div_rn(peak * row_length, odd) * 2.0).to(tl.float16)
        good = finite & (row_scale.to(tl.float32) <= 65504.0)
        stored = tl.where(real, tl.where(good, row_scale, float("nan")), 0.0)
        held = (real & good & (peak > 0.0))[:, None]
        p0 = _paired(tl.where(held, c0 + 2.0, 0.0).to(tl.uint8))
        p1 = _paired(tl.where(held, c1 + 2.0, 0.0).to(tl.uint8))
        tl.store(packed_tile + tile * (P * QUARTER), p0 | (p1 << 4))
        tl.store(scale + tile * P + slot, stored.to(tl.float16))


@triton.jit
def _odd_levels(packed):
    """packed [P, HALF / 2], of which the low four bits count -> 2 codes - 3 [P, HALF] fp16."""
    P: tl.constexpr = packed.shape[0]
    HALF: tl.constexpr = 2 * packed.shape[1]
    pairs = tl.permute(tl.join(packed & 3, (packed >> 2) & 3), [0, 2, 1])
    return (2.0 * tl.reshape(pairs, [P, HALF]).to(tl.float16) - 3.0).to(tl.float16)


@triton.jit
def _rotated_mean(mean, dim, norm, HALF: tl.constexpr):
    """mean [2 HALF] fp16 -> halves of its rotation, fp32; sums are exact in fp64 in any order."""
    signs = signs_of(HALF, tl.int8)
    m0 = tl.load(mean + dim).to(tl.float64)
    m1 = tl.load(mean + HALF + dim).to(tl.float64)
    r0 = tl.sum(tl.where(signs > 0, m0[:, None], -m0[:, None]), 0)
    r1 = tl.sum(tl.where(signs > 0, m1[:, None], -m1[:, None]), 0)
    return (r0 + r1).to(tl.float32) * norm, (r0 - r1).to(tl.float32) * norm


@triton.jit
def _decode_k_kernel(
    codes,
    scale,
    mean,
    out,
    out_t,
    out_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    half_norm,
    HALF: tl.constexpr,
    P: tl.constexpr,
):
    QUARTER: tl.constexpr = HALF // 2
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    packed_tile = codes + slot[:, None] * QUARTER + tl.arange(0, QUARTER)[None, :]
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, tl.float16)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        m0, m1 = _rotated_mean(mean + tile * (2 * HALF), dim, norm, HALF)
        packed = tl.load(packed_tile + tile * (P * QUARTER))
        step = tl.load(scale + tile * P + slot).to(tl.float32)[:, None]
        # sums of small whole numbers: exact in any order
        y0, y1 = rotate_halves(_odd_levels(packed), _odd_levels(packed >> 4), signs)
        y0 = y0 * step * half_norm + m0[None, :]
        y1 = y1 * step * half_norm + m1[None, :]
        token = tile // num_heads * P + slot
        out_tile = out + (token * out_t + tile % num_heads * out_h)[:, None]
        store_halves(out_tile, dim, token < num_tokens, y0, y1, HALF)


def encode(k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As page_int2.encode, for CUDA tensors; D 32 to 256, a power of two."""
    norm = 1 / math.sqrt(k.shape[2])
    launch(_encode_k_kernel, "int2 encode k", (k, *into[:3]), k, into[1], (norm, STEP * norm))
    page_k4v2_triton.encode_v(v, into[3:])


def decode(tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
    """As page_int2.decode, for CUDA tensors; D 32 to 256, a power of two."""
    norm = 1 / math.sqrt(k.shape[2])
    launch(_decode_k_kernel, "int2 decode k", (*tensors[:3], k), k, tensors[1], (norm, 0.5 * norm))
    page_k4v2_triton.decode_v(tensors[3:], v)
