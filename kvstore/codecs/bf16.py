"""Codec `bf16`: K and V rounded to bfloat16, for models that compute in fp32 or fp16.

    encode(x) = round_to_nearest_even(x, 8 significant bits)        decode(c) = c

Bits per element: 16, no side data. Relative error of an element at most 2^-8 (half a unit in the
last of 8 bits is 2^-9 of its power of two). Of a bf16 model it is what `raw` is; only `raw` is
called exact.
"""

from __future__ import annotations

import torch

from ringspan.attention.kv import TensorSpec


class Bf16Codec:
    """Tensors: k, v [T, Hkv, D] in bfloat16."""

    name = "bf16"
    exact = False
    cut_tokens = 1

    def params(self, head_dim: int) -> str:
        return ""

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        shape = (num_kv_heads, head_dim)
        return TensorSpec("k", shape, torch.bfloat16), TensorSpec("v", shape, torch.bfloat16)

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        into[0].copy_(k)
        into[1].copy_(v)

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        k.copy_(tensors[0])
        v.copy_(tensors[1])
