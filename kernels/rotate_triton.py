"""The matrix of signs of rotate.py within a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signs_of(D: tl.constexpr, dtype: tl.constexpr):
    """S [D, D], D at most 256: row i, column j is (-1)^popcount(i & j)."""
    i = tl.arange(0, D)
    both = i[:, None] & i[None, :]  # below 2^8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(dtype)
