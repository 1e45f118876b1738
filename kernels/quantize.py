"""Per-row symmetric quantisation to 8 bits, and the Walsh-Hadamard rotation.

    scale = max |x| / M            M = 127 (int8) or 448 (fp8 e4m3)
    codes = round(x * (M / max |x|))      half to even
    x'    = codes * scale

x      [..., D]  fp32 | bf16 | fp16, the last axis contiguous; a row is (token, head)
codes  [..., D]  int8 or float8_e4m3fn, contiguous
scale  [...]     fp32, contiguous
Cost   int8 of bf16: reads 2 bytes a value, writes 1: memory-bound. All mathematics in fp32.

A row of zeros (or one whose largest value is below 2^-100) has scale 0 and comes back as zeros. A
row that holds a value that is not finite gets scale nan and comes back as nan, so it is not hidden;
nothing is raised, since that would make a GPU wait.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

INT8_MAX = 127.0
FP8_MAX = 448.0
TINY = 2.0**-100
"""Below it M / max |x| could overflow fp32."""

_ROTATE_ROWS = 1 << 16
"""Rows rotated at once, which bounds the fp32 temporaries (32 MiB each at D 128)."""


def quantize_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """x [..., D] -> codes [..., D] int8 and scale [...] fp32, written in place."""
    _quantize(x, codes, scale, torch.int8, INT8_MAX)


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """codes [..., D] int8, scale [...] fp32 -> out [..., D] any float dtype, written in place."""
    _dequantize(codes, scale, out, torch.int8)


def quantize_fp8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """x [..., D] -> codes [..., D] float8_e4m3fn and scale [...] fp32, written in place."""
    _quantize(x, codes, scale, torch.float8_e4m3fn, FP8_MAX)


def dequantize_fp8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """codes [..., D] float8_e4m3fn, scale [...] fp32 -> out [..., D], written in place."""
    _dequantize(codes, scale, out, torch.float8_e4m3fn)


def quantize_ref(
    x: torch.Tensor, dtype: torch.dtype, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition -> codes, scale. The kernel gives the same bits for int8."""
    x = x.float()
    peak = x.abs().amax(-1)
    peak = torch.where(peak.isfinite(), peak, torch.nan)
    peak = torch.where(peak < TINY, 0.0, peak)
    inverse = torch.where(peak == 0, 0.0, largest / peak)
    scaled = x * inverse[..., None]
    if dtype == torch.int8:
        # what nan becomes as an integer is the machine's business: make it 0
        return torch.nan_to_num(scaled.round_(), nan=0.0).to(dtype), peak / largest
    return scaled.clamp_(-largest, largest).to(dtype), peak / largest


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] H -> the same shape and dtype; H the orthonormal Walsh-Hadamard matrix.

    H is symmetric and its own inverse: hadamard(hadamard(x)) is x up to rounding. fp32 inside.
    Raises ValueError if D is not a power of two.
    """
    dim = x.shape[-1]
    if dim & (dim - 1) or not dim:
        raise ValueError(f"head_dim is {dim}, expected a power of two for the Hadamard rotation")
    matrix = _hadamard_matrix(dim, x.device)
    rows = x.reshape(-1, dim)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for start in range(0, rows.shape[0], _ROTATE_ROWS):
        out[start : start + _ROTATE_ROWS] = rows[start : start + _ROTATE_ROWS].float() @ matrix
    return out.view(x.shape)


@lru_cache(maxsize=16)
def _hadamard_matrix(dim: int, device: torch.device) -> torch.Tensor:
    """[D, D] fp32, by Sylvester's construction, scaled to be orthonormal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / math.sqrt(dim)).to(device)


def _quantize(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, largest: float
) -> None:
    _check(x, codes, scale, dtype)
    if not x.numel():
        return
    if x.is_cuda:
        from ringspan.kernels.quantize_triton import quantize_triton

        quantize_triton(x, codes, scale, largest)
        return
    new_codes, new_scale = quantize_ref(x, dtype, largest)
    codes.copy_(new_codes)
    scale.copy_(new_scale)


def _dequantize(
    codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, dtype: torch.dtype
) -> None:
    _check(out, codes, scale, dtype)
    if not out.numel():
        return
    if out.is_cuda:
        from ringspan.kernels.quantize_triton import dequantize_triton

        dequantize_triton(codes, scale, out)
    elif out.dtype == torch.float32:
        out.copy_(codes).mul_(scale[..., None])
    else:
        out.copy_(codes.float().mul_(scale[..., None]))


def _check(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    if codes.shape != x.shape or scale.shape != x.shape[:-1]:
        raise ValueError(
            f"x {tuple(x.shape)}, codes {tuple(codes.shape)}, scale {tuple(scale.shape)} are not "
            "[..., D], [..., D], [...]"
        )
    if codes.dtype != dtype or scale.dtype != torch.float32:
        raise ValueError(
            f"codes are {codes.dtype} and scale {scale.dtype}, expected {dtype} and torch.float32"
        )
    if not (codes.is_contiguous() and scale.is_contiguous()):
        raise ValueError(
            f"codes and scale have strides {codes.stride()} and {scale.stride()}, "
            "expected contiguous"
        )
