"""The Walsh-Hadamard rotation, alone and in one pass with int8 quantisation.

    y = (x S) / sqrt(D)                    S[i, j] = (-1)^popcount(i & j)
    scale = max |y| / 127                  codes = round(y * (127 / max |y|))
    x' = (codes S) * (scale / sqrt(D))     S / sqrt(D) is its own inverse

x      [..., D]  fp32 | bf16 | fp16, the last axis contiguous; a row is (token, head)
codes  [..., D]  int8, contiguous
scale  [...]     fp32, contiguous; quantize.py says what zeros and what is not finite become
Cost   int8 of bf16: reads 2 bytes a value, writes 1, and D multiply-adds: memory-bound.
Source QuaRot, https://arxiv.org/abs/2404.00456; `_butterflies` is the fast Walsh-Hadamard
       transform of Fino and Algazi, https://doi.org/10.1109/TC.1976.1674569.

A row's bits never depend on the rows beside it, so it does not matter how tokens are cut into
writes: a library's matrix product, which sums in an order that depends on the number of rows,
promises no such thing. codes S holds whole numbers below 2^24, exact in any order, so decoding
gives the same bits on every device. Tensor cores encode bf16 and fp16 with sums in another order
than a CPU's: there a scale may differ in its last bits, and a code that lay on an edge by one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from ringspan.kernels.quantize import check_codes, quantize_int8

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNEL_DIMS = (16, 32, 64, 128, 256)
KERNEL_256_SHARED_BYTES = 208 << 10
"""What the kernels take at D 256: Hopper's and Blackwell's data centre GPUs have it."""

SLICE_ELEMENTS = 1 << 24
"""Elements taken at a time where fp32 scratch is needed: 64 MiB of it."""

_BUTTERFLY_ELEMENTS = 1 << 17
"""Elements that go through all butterflies while they lie in a CPU core's cache."""


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] S / sqrt(D) -> the same shape and dtype, contiguous. fp32 inside.

    S / sqrt(D) is symmetric, orthonormal and its own inverse: hadamard(hadamard(x)) is x up to
    rounding. The same bits on every device. Raises ValueError if D is not a power of two.
    """
    dim = _check_dim(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, out_rows = x.reshape(-1, dim), out.view(-1, dim)
    step = max(1, (SLICE_ELEMENTS if x.is_cuda else _BUTTERFLY_ELEMENTS) // dim)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        out_rows[part] = _butterflies(rows[part].float().contiguous()).mul_(1 / math.sqrt(dim))
    return out


def rotate_quantize_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """x [..., D] -> codes [..., D] int8 and scale [...] fp32 of its rotation, written in place.

    Raises ValueError if D is not a power of two.
    """
    dim = _check_dim(x)
    check_codes(x, codes, scale, torch.int8)
    if not x.numel():
        return
    # tensor cores would round fp32; its butterflies give the bits of the CPU on any device
    if _has_kernel(x.device, dim) and x.dtype in (torch.bfloat16, torch.float16):
        from ringspan.kernels.rotate_triton import rotate_quantize_triton

        rotate_quantize_triton(x, codes, scale)
        return
    for part in _slices(x):
        quantize_int8(hadamard(x[part].float()), codes[part], scale[part])


def dequantize_rotate_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """codes [..., D] int8, scale [...] fp32 -> out [..., D] any float dtype, written in place.

    The inverse of `rotate_quantize_int8`. Raises ValueError if D is not a power of two.
    """
    dim = _check_dim(out)
    check_codes(out, codes, scale, torch.int8)
    if not out.numel():
        return
    if _has_kernel(out.device, dim):
        from ringspan.kernels.rotate_triton import dequantize_rotate_triton

        dequantize_rotate_triton(codes, scale, out)
        return
    for part in _slices(out):
        out[part] = dequantize_rotate_ref(codes[part], scale[part])


def dequantize_rotate_ref(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition -> [..., D] fp32. The kernel gives the same bits."""
    dim = codes.shape[-1]
    factor = scale * (1 / math.sqrt(dim))
    return (codes.float() @ _signs(dim, codes.device)).mul_(factor[..., None])


def _butterflies(x: torch.Tensor) -> torch.Tensor:
    """x [N, D] fp32, contiguous -> x S: log2 D rounds of a + b and a - b, in a fixed order."""
    dim = x.shape[-1]
    source, spare = x, torch.empty_like(x)
    half = 1
    while half < dim:
        a, b = source.view(-1, 2, half).unbind(1)
        sums, differences = spare.view(-1, 2, half).unbind(1)
        torch.add(a, b, out=sums)
        torch.sub(a, b, out=differences)
        # the input itself is never written
        source, spare = spare, torch.empty_like(x) if source is x else source
        half *= 2
    return source.clone() if source is x else source


@lru_cache(maxsize=16)
def _signs(dim: int, device: torch.device) -> torch.Tensor:
    """S [D, D] fp32, by Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.to(device)


def _has_kernel(device: torch.device, dim: int) -> bool:
    if device.type != "cuda" or dim not in KERNEL_DIMS:
        return False
    properties = torch.cuda.get_device_properties(device)
    return dim < 256 or properties.shared_memory_per_block_optin >= KERNEL_256_SHARED_BYTES


def _slices(x: torch.Tensor) -> Iterator[slice | tuple[()]]:
    """Indices of x's first axis with at most SLICE_ELEMENTS elements each (at least one row)."""
    if x.dim() == 1:
        yield ()
        return
    step = max(1, SLICE_ELEMENTS * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def _check_dim(x: torch.Tensor) -> int:
    dim = x.shape[-1]
    if dim & (dim - 1) or not dim:
        raise ValueError(f"head_dim is {dim}, expected a power of two for the Hadamard rotation")
    return dim
