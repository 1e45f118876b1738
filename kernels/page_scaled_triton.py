"""The Triton kernels of page_scaled.py: a program takes every num_programs-th (page, head).

A tile is loaded as two halves of D, a and b: x S is a T + b T and a T - b T with the signs T of
D / 2, half the products and a quarter of the signs. The shapes do not depend on the number of
pages, so neither do the bits of a page.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ringspan.kernels import page_scaled
from ringspan.kernels.page_columns import rotates
from ringspan.kernels.quantize import TINY
from ringspan.kernels.rotate_triton import signs_of


class Config(NamedTuple):
    """How one kernel is built and launched."""

    num_warps: int
    num_stages: int
    programs: int
    """At most; 528 are four on each of the 132 multiprocessors of an H100 or H200."""

    def options(self, dim: int = 128) -> dict[str, int | bool]:
        """As in rotate_triton: sums must not be fused with products."""
        # a tile's registers are those of its values: it takes more warps beyond 128 dimensions
        num_warps = max(self.num_warps, 8 if dim > 128 else 1)
        return {
            "num_warps": num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
        }


CONFIGS = {
    "int8 encode k": Config(8, 2, 528),
    "int8 encode v": Config(8, 2, 528),
    "int8 decode k": Config(8, 2, 528),
    "int8 decode v": Config(8, 2, 528),
    "fp8 encode k": Config(8, 2, 528),
    "fp8 encode v": Config(8, 2, 528),
    "fp8 decode k": Config(8, 2, 528),
    "fp8 decode v": Config(8, 2, 528),
}


@triton.jit
def load_halves(x_tile, dim, real, HALF: tl.constexpr):
    """The dimensions d < D / 2 and d + D / 2 of rows of x; 0 where not real."""
    inside = real[:, None] & (dim < HALF)[None, :]
    a = tl.load(x_tile + dim[None, :], mask=inside, other=0.0)
    b = tl.load(x_tile + HALF + dim[None, :], mask=inside, other=0.0)
    return a, b


@triton.jit
def store_halves(out_tile, dim, real, y0, y1, HALF: tl.constexpr):
    inside = real[:, None] & (dim < HALF)[None, :]
    tl.store(out_tile + dim[None, :], y0.to(out_tile.dtype.element_ty), mask=inside)
    tl.store(out_tile + HALF + dim[None, :], y1.to(out_tile.dtype.element_ty), mask=inside)


@triton.jit
def rotate_halves(a, b, signs):
    """Halves of rows of x -> of x S, in fp32."""
    # the products are exact; "ieee" keeps them so in fp32
    ra = tl.dot(a, signs, input_precision="ieee")
    rb = tl.dot(b, signs, input_precision="ieee")
    return ra + rb, ra - rb


@triton.jit
def row_peak(y0, y1):
    """max |y| of each row; inf where anything is inf or nan, which max would drop."""
    size0 = tl.where(tl.abs(y0) < float("inf"), tl.abs(y0), float("inf"))
    size1 = tl.where(tl.abs(y1) < float("inf"), tl.abs(y1), float("inf"))
    return tl.max(tl.maximum(size0, size1), 1)


@triton.jit
def round_to_even(value):
    """value [..] fp32, |value| < 2^22: 1.5 * 2^23 leaves fp32 no bits for a fraction."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _encode_kernel(
    x,
    codes,
    scale,
    x_t,
    x_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    largest,
    tiny,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    ROTATE: tl.constexpr,
    INTEGER: tl.constexpr,
    TOKEN_LAST: tl.constexpr,
):
    dim = tl.arange(0, BLOCK_D)
    slot = tl.arange(0, P)
    one = tl.full([], 1, tl.int64)
    if ROTATE:
        signs = signs_of(BLOCK_D, x.dtype.element_ty)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        token = tile // num_heads * P + slot
        real = token < num_tokens
        x_tile = x + (token * x_t + tile % num_heads * x_h)[:, None]
        y0, y1 = load_halves(x_tile, dim, real, HALF)  # [P, BLOCK_D]
        if ROTATE:
            y0, y1 = rotate_halves(y0, y1, signs)
            y0 *= norm
            y1 *= norm
        else:
            y0 = y0.to(tl.float32)
            y1 = y1.to(tl.float32)
        peak = row_peak(y0, y1)  # [P]
        bad = peak == float("inf")
        empty = peak < tiny
        usable = (bad | empty) == 0
        inverse = tl.where(usable, tl.div_rn(largest, tl.where(usable, peak, 1.0)), 0.0)
        row_scale = tl.where(usable, tl.div_rn(peak, largest + tl.zeros_like(peak)), 0.0)
        tl.store(scale + tile * P + slot, tl.where(bad, float("nan"), row_scale))
        y0 = tl.where(bad[:, None], 0.0, y0) * inverse[:, None]
        y1 = tl.where(bad[:, None], 0.0, y1) * inverse[:, None]
        if INTEGER:
            y0 = round_to_even(y0)
            y1 = round_to_even(y1)
        else:
            y0 = tl.minimum(tl.maximum(y0, -largest), largest)
            y1 = tl.minimum(tl.maximum(y1, -largest), largest)
        code0 = y0.to(codes.dtype.element_ty)
        code1 = y1.to(codes.dtype.element_ty)
        page = codes + tile * (2 * HALF * P)
        if TOKEN_LAST:
            code_tile = page + dim[:, None] * P + slot[None, :]  # [BLOCK_D, P]
            inside = (dim < HALF)[:, None]
            tl.store(code_tile, tl.trans(code0), mask=inside)
            tl.store(code_tile + HALF * P, tl.trans(code1), mask=inside)
        else:
            code_tile = page + slot[:, None] * (2 * HALF) + dim[None, :]  # [P, BLOCK_D]
            inside = (dim < HALF)[None, :]
            tl.store(code_tile, code0, mask=inside)
            tl.store(code_tile + HALF, code1, mask=inside)


@triton.jit
def _decode_kernel(
    codes,
    scale,
    out,
    out_t,
    out_h,
    num_tokens,
    num_heads,
    num_tiles,
    norm,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    ROTATE: tl.constexpr,
    TOKEN_LAST: tl.constexpr,
):
    dim = tl.arange(0, BLOCK_D)
    slot = tl.arange(0, P)
    one = tl.full([], 1, tl.int64)
    if ROTATE:
        signs = signs_of(BLOCK_D, tl.float16)
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = one * i
        page = codes + tile * (2 * HALF * P)
        if TOKEN_LAST:
            code_tile = page + dim[:, None] * P + slot[None, :]  # [BLOCK_D, P]
            inside = (dim < HALF)[:, None]
            code0 = tl.trans(tl.load(code_tile, mask=inside))
            code1 = tl.trans(tl.load(code_tile + HALF * P, mask=inside))
        else:
            code_tile = page + slot[:, None] * (2 * HALF) + dim[None, :]  # [P, BLOCK_D]
            inside = (dim < HALF)[None, :]
            code0 = tl.load(code_tile, mask=inside)
            code1 = tl.load(code_tile + HALF, mask=inside)
        factor = tl.load(scale + tile * P + slot)
        if ROTATE:
            # codes are exact in fp16, their sums are whole numbers below 2^24: exact in any order
            y0, y1 = rotate_halves(code0.to(tl.float16), code1.to(tl.float16), signs)
            factor *= norm
        else:
            y0 = code0.to(tl.float32)
            y1 = code1.to(tl.float32)
        token = tile // num_heads * P + slot
        out_tile = out + (token * out_t + tile % num_heads * out_h)[:, None]
        y0 *= factor[:, None]
        y1 *= factor[:, None]
        store_halves(out_tile, dim, token < num_tokens, y0, y1, HALF)


class Launcher(NamedTuple):
    """encode and decode as in page_scaled.py, for CUDA tensors."""

    kind: page_scaled.Scaled

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        for x, codes, scale, side in zip((k, v), into[::2], into[1::2], "kv", strict=True):
            dim, tiles = x.shape[2], scale.shape[0] * scale.shape[1]
            config = CONFIGS[f"{self.kind.name} encode {side}"]
            _encode_kernel[(min(tiles, config.programs),)](
                x, codes, scale, x.stride(0), x.stride(1), x.shape[0], x.shape[1], tiles,
                1 / math.sqrt(dim), self.kind.largest, TINY, **self.shape(dim, scale.shape[2]),
                INTEGER=self.kind.dtype == torch.int8, TOKEN_LAST=side == "v",
                **config.options(dim),
            )  # fmt: skip

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        for out, codes, scale, side in zip((k, v), tensors[::2], tensors[1::2], "kv", strict=True):
            dim, tiles = out.shape[2], scale.shape[0] * scale.shape[1]
            config = CONFIGS[f"{self.kind.name} decode {side}"]
            _decode_kernel[(min(tiles, config.programs),)](
                codes, scale, out, out.stride(0), out.stride(1), out.shape[0], out.shape[1], tiles,
                1 / math.sqrt(dim), **self.shape(dim, scale.shape[2]), TOKEN_LAST=side == "v",
                **config.options(dim),
            )  # fmt: skip

    def shape(self, dim: int, page_tokens: int) -> dict[str, int | bool]:
        return {
            "HALF": dim // 2,
            "BLOCK_D": triton.next_power_of_2(dim // 2),
            "P": page_tokens,
            "ROTATE": self.kind.may_rotate and rotates(dim),
        }


INT8 = Launcher(page_scaled.INT8)
FP8 = Launcher(page_scaled.FP8)
