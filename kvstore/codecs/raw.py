"""Codec `raw`: K and V in the model's compute dtype, bit for bit. The default everywhere.

    encode(x) = x        decode(c) = c

Bits per element: those of the compute dtype (16 for bf16 and fp16, 32 for fp32), no side data.
A raw shard is attended in place, without decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringspan.attention.kv import TensorSpec

if TYPE_CHECKING:
    import torch


class RawCodec:
    """Exact. Tensors: k, v [T, Hkv, D] in the compute dtype."""

    name = "raw"
    exact = True

    def params(self, head_dim: int) -> str:
        return ""

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        shape = (num_kv_heads, head_dim)
        return TensorSpec("k", shape, dtype), TensorSpec("v", shape, dtype)

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        into[0].copy_(k)
        into[1].copy_(v)

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        k.copy_(tensors[0])
        v.copy_(tensors[1])
