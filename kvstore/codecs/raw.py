"""Codec `raw`: K and V in the model's compute dtype, bit for bit. The default everywhere.

    encode(x) = x        decode(c) = c

Bits per element: those of the compute dtype (16 for bf16 and fp16, 32 for fp32), no side data.
A raw shard is attended in place, without decoding.
"""

from __future__ import annotations

from ringspan.attention.kv import Plain


class RawCodec(Plain):
    """Exact. Tensors: k, v [T, Hkv, D] in the compute dtype."""

    name = "raw"

    def params(self, head_dim: int) -> str:
        return ""
