"""Codec `fp8`: float8 e4m3 with one scale per (token, kv head).

    scale = max_d |x_d| / 448    c_d = e4m3(x_d / scale);  all-zero rows: c = 0
    decode: x = c * scale

Bits per element: 8 codes + 32 / D scale (8.25 at D 128). Relative error of an element at most
2^-4 (3 mantissa bits), less the small ones below 2^-6 * scale. A row with a value that is not
finite comes back as nan.
Source: FP8 formats for deep learning, https://arxiv.org/abs/2209.05433 (e4m3 without infinities,
largest value 448); a scale per token and head as vLLM's `fp8_per_token_head` has it.
"""

from __future__ import annotations

from ringspan.kvstore.codecs.paged import PagedCodec


class Fp8Codec(PagedCodec):
    """A page: k_codes [Hkv, P, D] e4m3, k_scale [Hkv, P] fp32, v_codes [Hkv, D, P], v_scale."""

    name = "fp8"

    def params(self, head_dim: int) -> str:
        return "e4m3"
