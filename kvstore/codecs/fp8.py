"""Codec `fp8`: float8 e4m3 with one scale per (token, kv head).

    scale = max_d |x_d| / 448    c_d = e4m3(x_d / scale);  all-zero rows: c = 0
    decode: x = c * scale

Bits per element: 8 codes + 32 / D scale (8.25 at D 128). Relative error of an element at most
2^-4 (3 mantissa bits), less the small ones below 2^-6 * scale.
Source: FP8 formats for deep learning, https://arxiv.org/abs/2209.05433 (e4m3 without infinities,
largest value 448); a scale per token and head as vLLM's `fp8_per_token_head` has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ringspan.kernels.quantize import dequantize_fp8, quantize_fp8
from ringspan.kvstore.codecs.scaled import scaled_specs

if TYPE_CHECKING:
    from ringspan.attention.kv import TensorSpec


class Fp8Codec:
    """Tensors: k_codes [T, Hkv, D] e4m3, k_scale [T, Hkv] fp32, and the same of V."""

    name = "fp8"
    exact = False

    def params(self, head_dim: int) -> str:
        return "e4m3"

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        return scaled_specs(num_kv_heads, head_dim, torch.float8_e4m3fn)

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        k_codes, k_scale, v_codes, v_scale = into
        quantize_fp8(k, k_codes, k_scale)
        quantize_fp8(v, v_codes, v_scale)

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        k_codes, k_scale, v_codes, v_scale = tensors
        dequantize_fp8(k_codes, k_scale, k)
        dequantize_fp8(v_codes, v_scale, v)
