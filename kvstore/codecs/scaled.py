"""What the codecs with a scale per (token, kv head) share: their tensors, and work in slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ringspan.attention.kv import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

SLICE_ELEMENTS = 1 << 24
"""Elements taken at a time where fp32 scratch is needed: 64 MiB of it."""


def scaled_specs(num_kv_heads: int, head_dim: int, codes: torch.dtype) -> tuple[TensorSpec, ...]:
    """Codes [T, Hkv, D] and fp32 scales [T, Hkv], K's first."""
    shape, heads = (num_kv_heads, head_dim), (num_kv_heads,)
    return (
        TensorSpec("k_codes", shape, codes),
        TensorSpec("k_scale", heads, torch.float32),
        TensorSpec("v_codes", shape, codes),
        TensorSpec("v_scale", heads, torch.float32),
    )


def row_slices(x: torch.Tensor) -> Iterator[slice]:
    """Slices of x's first axis that hold at most SLICE_ELEMENTS elements each (at least a row)."""
    rows = x.shape[0]
    step = max(1, SLICE_ELEMENTS * rows // max(1, x.numel()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
