"""Codec `int8`: Hadamard rotation, then symmetric int8 with one scale per (token, kv head).

    y = x H / sqrt(D)            when D is a power of two (H: Hadamard matrix), else y = x
    scale = max_d |y_d| / 127    c_d = round(y_d / scale) in -127..127;  all-zero rows: c = 0
    decode: x = (c H) * (scale / sqrt(D))    (H / sqrt(D) is its own inverse; c H is exact)

Bits per element: 8 codes + 32 / D scale (8.25 at D 128, 8.5 at D 64).
The rotation spreads outlier channels over the row, so that the largest element, which sets the
step, is small; an error of at most scale / 2 per rotated element remains.
Source: QuaRot, https://arxiv.org/abs/2404.00456, section 4 (KV cache), there in 4 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ringspan.kernels.quantize import dequantize_int8, quantize_int8
from ringspan.kernels.rotate import dequantize_rotate_int8, rotate_quantize_int8
from ringspan.kvstore.codecs.scaled import scaled_specs

if TYPE_CHECKING:
    from ringspan.attention.kv import TensorSpec


def rotates(head_dim: int) -> bool:
    """Whether rows of this length are rotated: Hadamard matrices of powers of two only."""
    return head_dim > 1 and head_dim & (head_dim - 1) == 0


class Int8Codec:
    """Tensors: k_codes [T, Hkv, D] int8, k_scale [T, Hkv] fp32, and the same of V."""

    name = "int8"
    exact = False

    def params(self, head_dim: int) -> str:
        return "hadamard" if rotates(head_dim) else "plain"

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        return scaled_specs(num_kv_heads, head_dim, torch.int8)

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        k_codes, k_scale, v_codes, v_scale = into
        _encode(k, k_codes, k_scale)
        _encode(v, v_codes, v_scale)

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        k_codes, k_scale, v_codes, v_scale = tensors
        _decode(k_codes, k_scale, k)
        _decode(v_codes, v_scale, v)


def _encode(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    encode = rotate_quantize_int8 if rotates(x.shape[-1]) else quantize_int8
    encode(x, codes, scale)


def _decode(codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> None:
    decode = dequantize_rotate_int8 if rotates(x.shape[-1]) else dequantize_int8
    decode(codes, scale, x)
