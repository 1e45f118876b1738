"""Codec `k4v2`: K as `int4` keeps it, V in 2 bits with scales on both axes of a page.

    K    kvstore/codecs/int4.py
    V    y = x H / sqrt(D)       when D is a power of two (H: Hadamard matrix), else y = x
         y' = scale_t dims_d (code - 3/2)     code 0..3; scale fp16 a (token, head), dims 8 bits a
                                              (dimension, head) of the page

Bits per element: K 4.5 + 16 / P, V 2 + 16 / D + 8 / P; 3.41 over both at D 128 and pages of 128.
What 2 bits of V lose is averaged over the tokens that attention looks at, what 2 bits of K lose is
not: hence 4 and 2. Fidelity is that of V, 2-bit. Formulas, source and what becomes of values that
are not finite: kernels/page_k4v2.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringspan.kernels.decode import KINDS
from ringspan.kvstore.codecs.paged import PagedCodec, rotates

if TYPE_CHECKING:
    import torch


class K4V2Codec(PagedCodec):
    """A page: K's four tensors as `int4`; v_codes [Hkv, D/2, P/2] uint8 (four codes in a byte),
    v_scale [Hkv, P] fp16, v_dims [Hkv, D] uint8."""

    name = "k4v2"

    def params(self, head_dim: int) -> str:
        rotation = "hadamard" if rotates(head_dim) else "plain"
        return f"{rotation} groups=64 k-mean v-dual"

    def serves(self, q: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
        return self.name in KINDS and super().serves(q, tensors)
