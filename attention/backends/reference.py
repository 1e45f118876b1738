"""Attention by its definition, in fp32, for any device, dtype and mask."""

from __future__ import annotations

import torch

from ringspan.attention.backends.case import Backend, Case
from ringspan.kernels.flash import flash_ref
from ringspan.types import Part


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    """q [T, Hq, D], k, v [S, Hkv, D] -> out [T, Hq, D] in q.dtype, lse [T, Hq] fp32."""
    return flash_ref(q, k, v, **case.mask._asdict(), softcap=case.softcap, scale=case.scale)


REFERENCE = Backend(
    name="reference",
    available=lambda device_type: None,
    why_not=lambda case: None,
    run=reference,
)
