"""Codec `int8`: Hadamard rotation, then symmetric int8 with one scale per (token, kv head).

    y = x H / sqrt(D)            when D is a power of two (H: Hadamard matrix), else y = x
    scale = max_d |y_d| / 127    c_d = round(y_d / scale) in -127..127;  all-zero rows: c = 0
    decode: x = (c H) * (scale / sqrt(D))    (H / sqrt(D) is its own inverse; c H is exact)

Bits per element: 8 codes + 32 / D scale (8.25 at D 128, 8.5 at D 64).
The rotation spreads outlier channels over the row, so that the largest element, which sets the
step, is small; an error of at most scale / 2 per rotated element remains. A row with a value that
is not finite comes back as nan.
Source: QuaRot, https://arxiv.org/abs/2404.00456, section 4 (KV cache), there in 4 bits.
"""

from __future__ import annotations

from ringspan.kvstore.codecs.paged import PagedCodec, rotates


class Int8Codec(PagedCodec):
    """A page: k_codes [Hkv, P, D] int8, k_scale [Hkv, P] fp32, v_codes [Hkv, D, P], v_scale."""

    name = "int8"

    def params(self, head_dim: int) -> str:
        return "hadamard" if rotates(head_dim) else "plain"
