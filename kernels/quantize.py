"""Per-row symmetric quantisation to 8 bits.

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

import torch

INT8_MAX = 127.0
FP8_MAX = 448.0
TINY = 2.0**-100
"""Below it M / max |x| could overflow fp32."""


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
    """The definition -> codes, scale. The kernel gives the same bits."""
    x = x.float()
    peak = x.abs().amax(-1)
    peak = torch.where(peak.isfinite(), peak, torch.nan)
    peak = torch.where(peak < TINY, 0.0, peak)
    # tensor by tensor: torch takes a number / tensor, or a tensor / number on a GPU, for a product
    # with a rounded reciprocal, which is off by one bit now and then
    most = torch.full_like(peak, largest)
    inverse = torch.where(peak == 0, 0.0, most / peak)
    scale = peak / most
    scaled = x * inverse[..., None]
    if dtype == torch.int8:
        # what nan becomes as an integer is the machine's business: make it 0
        return torch.nan_to_num(scaled.round_(), nan=0.0).to(dtype), scale
    return scaled.clamp_(-largest, largest).to(dtype), scale


def _quantize(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, largest: float
) -> None:
    check_codes(x, codes, scale, dtype)
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
    check_codes(out, codes, scale, dtype)
    if not out.numel():
        return
    if out.is_cuda:
        from ringspan.kernels.quantize_triton import dequantize_triton

        dequantize_triton(codes, scale, out)
    elif out.dtype == torch.float32:
        out.copy_(codes).mul_(scale[..., None])
    else:
        out.copy_(codes.float().mul_(scale[..., None]))


def check_codes(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> None:
    """Raises ValueError unless codes and scale have the shapes, dtypes and strides for x."""
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
