"""Codec `int2`: Hadamard rotation, K less its page mean, 2 bits with a scale a row; V as `k4v2`.

    y = x H / sqrt(D)       when D is a power of two (H: Hadamard matrix), else y = x
    K    y' = scale_t (code - 3/2) + m       m: mean of y over the page's tokens, fp16
    V    y' = scale_t dims_d (code - 3/2)    kvstore/codecs/k4v2.py

Bits per element: 2 + 16 / D, of K 16 / P more, of V 8 / P; 2.22 over both at D 128, P 128. It needs
no calibration: rotations from the covariances of keys, of queries and of both, and principal axes
with bits dealt by variance, were measured against it on real keys and gained nothing once the mean
is off (docs/codecs.md). Formulas, source and what becomes of values that are not finite:
kernels/page_int2.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringspan.kernels.decode import KINDS
from ringspan.kvstore.codecs.paged import PagedCodec, rotates

if TYPE_CHECKING:
    import torch


class Int2Codec(PagedCodec):
    """A page: k_codes [Hkv, P, D/4] uint8 (four codes in a byte), k_scale [Hkv, P] fp16, k_mean
    [Hkv, D] fp16; V's three tensors as `k4v2`."""

    name = "int2"

    def params(self, head_dim: int) -> str:
        rotation = "hadamard" if rotates(head_dim) else "plain"
        return f"{rotation} k-mean v-dual"

    def serves(self, q: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
        return self.name in KINDS and super().serves(q, tensors)
