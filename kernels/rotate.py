"""The Walsh-Hadamard rotation.

    y = (x S) / sqrt(D)                    S[i, j] = (-1)^popcount(i & j)

S / sqrt(D) is its own inverse.

x      [..., D]  fp32 | bf16 | fp16; a row is (token, head)
Source QuaRot, https://arxiv.org/abs/2404.00456; `_butterflies` is the fast Walsh-Hadamard
       transform of Fino and Algazi, https://doi.org/10.1109/TC.1976.1674569.

A row's bits never depend on the rows beside it, so it does not matter how tokens are cut into
writes: a library's matrix product, which sums in an order that depends on the number of rows,
promises no such thing. Codes S holds whole numbers below 2^24, exact in any order.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

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
def signs(dim: int, device: torch.device) -> torch.Tensor:
    """S [D, D] fp32, by Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.to(device)


def _check_dim(x: torch.Tensor) -> int:
    dim = x.shape[-1]
    if dim & (dim - 1) or not dim:
        raise ValueError(f"head_dim is {dim}, expected a power of two for the Hadamard rotation")
    return dim
