"""Codec `int4`: Hadamard rotation, K less its channel means, 4 bits in groups of 64 dimensions.

    y = x H / sqrt(D)            when D is a power of two (H: Hadamard matrix), else y = x
    m = mean of y over the page's tokens, fp16        K only; V has none
    z = y - m
    zero = min z    scale = (max z - min z) / 15      over a group of a token's row, both fp16
    c_d = round((z_d - zero) / scale) in 0..15
    decode: y = c * scale + zero + m,  x = y H / sqrt(D)

Bits per element: 4 codes + 32 / 64 scale and zero; K also 16 / P for its mean: 4.5625 over K and V
at D 128 and pages of 128 tokens. Scale, zero and mean are rounded before they are used, so that
coding sees what is stored; an error of at most scale / 2 per rotated element remains, and what fp16
leaves of zero is taken up by the codes.

The rotation spreads outliers over a row; what K's channels have in common over all tokens (large
biases of few channels, which positions turn slowly) it spreads too, and the mean takes it off. A
group beyond fp16's range, or with a value that is not finite, comes back as nan.
Source: QuaRot, https://arxiv.org/abs/2404.00456, section 4 (rotated, asymmetric, in groups); KIVI,
https://arxiv.org/abs/2402.02750, section 3 (K's outliers lie in channels; there each channel has a
scale, here a mean).
"""

from __future__ import annotations

from ringspan.kvstore.codecs.paged import PagedCodec, rotates


class Int4Codec(PagedCodec):
    """A page, two codes in a byte, G groups:

    k_codes [Hkv, P, D/2] uint8, k_scale and k_zero [Hkv, G, P] fp16, k_mean [Hkv, D] fp16,
    v_codes [Hkv, D, P/2] uint8, v_scale and v_zero as K's.
    """

    name = "int4"

    def params(self, head_dim: int) -> str:
        rotation = "hadamard" if rotates(head_dim) else "plain"
        return f"{rotation} groups=64 k-mean"
