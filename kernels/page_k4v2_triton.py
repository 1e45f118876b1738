"""The Triton kernels of page_k4v2.py's V; K's are int4's. A program takes every num_programs-th
(page, head), a tile of all its tokens, in two halves of D as page_scaled_triton.py has them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ringspan.kernels import page_int4_triton
from ringspan.kernels.page_k4v2 import LARGEST_DIM, STEP, UNIT
from ringspan.kernels.page_scaled_triton import (
    Config,
    load_halves,
    rotate_halves,
    round_to_even,
    row_peak,
    store_halves,
)
from ringspan.kernels.quantize import TINY
from ringspan.kernels.rotate_triton import signs_of

CONFIGS = {
    "k4v2 encode v": Config(8, 2, 264),
    "k4v2 decode v": Config(8, 2, 528),
    "int2 encode k": Config(8, 2, 264),
    "int2 decode k": Config(8, 2, 528),
}

_LARGEST_DIM = tl.constexpr(LARGEST_DIM)
_UNITS = tl.constexpr(1 / UNIT)
_TINY = tl.constexpr(TINY)


@triton.jit
def inverse(x):
    """1 / x, and 0 of 0."""
    return tl.where(x > 0.0, tl.div_rn(1.0 + tl.zeros_like(x), tl.where(x > 0.0, x, 1.0)), 0.0)


@triton.jit
def length(y0, y1):
    """[R]: of rows in halves."""
    return tl.sqrt_rn(tl.sum(y0 * y0, 1) + tl.sum(y1 * y1, 1))


@triton.jit
def levels(u, inverse_step):
    """u [R, HALF] -> -2 .. 1, as floats."""
    return tl.minimum(tl.maximum(tl.floor(u * inverse_step[:, None]), -2.0), 1.0)


@triton.jit
def _packed(c0, c1):
    """Both halves of codes [P, HALF] -> four of them in a byte, turned: [HALF, P / 2] uint8."""
    P: tl.constexpr = c0.shape[0]
    HALF: tl.constexpr = c0.shape[1]
    shift = 2 * (tl.arange(0, P) // (P // 2))
    placed = (c0.to(tl.int32) | (c1.to(tl.int32) << 4)) << shift[:, None]
    return tl.trans(tl.sum(tl.reshape(placed, [2, P // 2, HALF]), 0).to(tl.uint8))


@triton.jit
def _encode_v_kernel(
    x,
    codes,
    scale,
    dims,
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
    HALF_P: tl.constexpr = P // 2
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    packed_tile = codes + dim[:, None] * HALF_P + tl.arange(0, HALF_P)[None, :]
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
        peak = row_peak(y0, y1)
        finite = peak < float("inf")
        peak = tl.where(finite & (peak >= _TINY), peak, 0.0)
        scaled = inverse(peak)[:, None]
        y0 = tl.where(finite[:, None], y0, 0.0) * scaled
        y1 = tl.where(finite[:, None], y1, 0.0) * scaled
        row_length = length(y0, y1)
        scaled = inverse(row_length * norm)[:, None]
        y0 *= scaled
        y1 *= scaled
        spread0 = tl.sqrt_rn(tl.sum(y0 * y0, 0))  # [HALF]
        spread1 = tl.sqrt_rn(tl.sum(y1 * y1, 0))
        most = inverse(tl.maximum(tl.max(spread0, 0), tl.max(spread1, 0)))
        dims0 = tl.maximum(round_to_even(spread0 * most * _LARGEST_DIM), 1.0)
        dims1 = tl.maximum(round_to_even(spread1 * most * _LARGEST_DIM), 1.0)
        y0 *= inverse(dims0)[None, :]
        y1 *= inverse(dims1)[None, :]
        inverse_step = inverse(length(y0, y1) * step_norm)
        c0 = levels(y0, inverse_step)
        c1 = levels(y1, inverse_step)
        w0 = (2.0 * c0 + 1.0) * dims0[None, :]
        w1 = (2.0 * c1 + 1.0) * dims1[None, :]
        row_scale = tl.div_rn(peak * row_length, length(w0, w1)) * _UNITS
        row_scale = row_scale.to(tl.float16)
        good = finite & (row_scale.to(tl.float32) <= 65504.0)
        stored = tl.where(real, tl.where(good, row_scale, float("nan")), 0.0)
        held = (real & good & (peak > 0.0))[:, None]
        packed = _packed(tl.where(held, c0 + 2.0, 0.0), tl.where(held, c1 + 2.0, 0.0))
        tl.store(packed_tile + tile * (HALF * HALF_P), packed)
        tl.store(scale + tile * P + slot, stored.to(tl.float16))
        tl.store(dims + tile * (2 * HALF) + dim, dims0.to(tl.uint8))
        tl.store(dims + tile * (2 * HALF) + HALF + dim, dims1.to(tl.uint8))


@triton.jit
def _weights(packed, dims, P: tl.constexpr):
    """packed [HALF, P / 2], of which the low four bits count, dims [HALF] -> w [P, HALF], whole
    numbers that fp16 holds."""
    HALF: tl.constexpr = packed.shape[0]
    shift = (2 * tl.arange(0, 2)).to(tl.uint8)
    codes = (packed[:, None, :] >> shift[None, :, None]) & 3
    levels = 2.0 * tl.trans(tl.reshape(codes, [HALF, P])).to(tl.float16) - 3.0
    return levels.to(tl.float16) * dims.to(tl.float16)[None, :]


@triton.jit
def _decode_v_kernel(
    codes,
    scale,
    dims,
    out,
    out_t,
    out_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    HALF: tl.constexpr,
    P: tl.constexpr,
):
    HALF_P: tl.constexpr = P // 2
    dim = tl.arange(0, HALF)
    slot = tl.arange(0, P)
    packed_tile = codes + dim[:, None] * HALF_P + tl.arange(0, HALF_P)[None, :]
    one = tl.full([], 1, tl.int64)
    signs = signs_of(HALF, tl.float16)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        packed = tl.load(packed_tile + tile * (HALF * HALF_P))
        dims_tile = dims + tile * (2 * HALF) + dim
        w0 = _weights(packed, tl.load(dims_tile), P)
        w1 = _weights(packed >> 4, tl.load(dims_tile + HALF), P)
        step = tl.load(scale + tile * P + slot).to(tl.float32)[:, None]
        # sums of whole numbers below 2^18: exact in any order
        y0, y1 = rotate_halves(w0, w1, signs)
        token = tile // num_heads * P + slot
        out_tile = out + (token * out_t + tile % num_heads * out_h)[:, None]
        store_halves(out_tile, dim, token < num_tokens, y0 * step * norm, y1 * step * norm, HALF)


def encode(k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As page_k4v2.encode, for CUDA tensors; D 32 to 256, a power of two."""
    page_int4_triton.encode_k(k, into[:4])
    encode_v(v, into[4:])


def encode_v(v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As page_k4v2.encode_v."""
    norm = 1 / math.sqrt(v.shape[2])
    launch(_encode_v_kernel, "k4v2 encode v", (v, *into), v, into[1], (norm, STEP * norm))


def decode(tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
    """As page_k4v2.decode, for CUDA tensors; D 32 to 256, a power of two."""
    page_int4_triton.decode_k(tensors[:4], k)
    decode_v(tensors[4:], v)


def decode_v(tensors: tuple[torch.Tensor, ...], v: torch.Tensor) -> None:
    """As page_k4v2.decode_v."""
    norm = UNIT / math.sqrt(v.shape[2])
    launch(_decode_v_kernel, "k4v2 decode v", (*tensors, v), v, tensors[1], (norm,))


def launch(
    kernel: triton.JITFunction,
    name: str,
    tensors: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    scale: torch.Tensor,
    factors: tuple[float, ...],
) -> None:
    """x [T, H, D] is coded or decoded; scale [U, H, P] says how many pages there are."""
    tokens, heads, dim = x.shape
    tiles = scale.shape[0] * scale.shape[1]
    config = CONFIGS[name]
    kernel[(min(tiles, config.programs),)](
        *tensors, x.stride(0), x.stride(1), tokens, heads, tiles, *factors,
        HALF=dim // 2, P=scale.shape[2], **config.options(dim),
    )  # fmt: skip
