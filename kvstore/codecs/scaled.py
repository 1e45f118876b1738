"""The tensors of the codecs with a scale per (token, kv head)."""

from __future__ import annotations

import torch

from ringspan.attention.kv import TensorSpec


def scaled_specs(num_kv_heads: int, head_dim: int, codes: torch.dtype) -> tuple[TensorSpec, ...]:
    """Codes [T, Hkv, D] and fp32 scales [T, Hkv], K's first."""
    shape, heads = (num_kv_heads, head_dim), (num_kv_heads,)
    return (
        TensorSpec("k_codes", shape, codes),
        TensorSpec("k_scale", heads, torch.float32),
        TensorSpec("v_codes", shape, codes),
        TensorSpec("v_scale", heads, torch.float32),
    )
