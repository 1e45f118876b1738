"""Aligned causal attention by kernels whose causal mask is aligned top-left, as torch's are.

rows of the last T of S keys:   [ full rectangle T x (S - T) | causal square T x T ]
"""

from __future__ import annotations

from typing import Protocol

import torch

from ringspan.kernels.merge import merge_into
from ringspan.types import Part


class Attend(Protocol):
    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, /
    ) -> Part: ...


def rectangle_and_square(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, attend: Attend
) -> Part:
    """q [T, Hq, D], k, v [S, Hkv, D] with S >= T, row i at key i + S - T.

    The out is fp32 where two parts were merged (S > T), else what `attend` gives.
    """
    ahead = k.shape[0] - q.shape[0]
    square = attend(q, k[ahead:], v[ahead:], True, scale)
    if not ahead:
        return square
    out = square.out.float().contiguous()
    lse = square.lse.contiguous()
    rectangle = attend(q, k[:ahead], v[:ahead], False, scale)
    merge_into(out, lse, rectangle.out, rectangle.lse)
    return Part(out, lse)
