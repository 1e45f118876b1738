"""Attention by its definition, in fp32, for any device, dtype and mask."""

from __future__ import annotations

import torch

from ringspan.attention.backends.case import Backend, Case
from ringspan.kernels.flash import flash_ref
from ringspan.kernels.merge import merge_many
from ringspan.types import Part


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    """q [T, Hq, D], k, v [S, Hkv, D] -> out [T, Hq, D] in q.dtype, lse [T, Hq] fp32."""
    return flash_ref(q, k, v, **case.mask._asdict(), softcap=case.softcap, scale=case.scale)


def reference_into(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, into: Part
) -> None:
    """Continues `into` (out [T, Hq, D], lse [T, Hq], fp32) in place."""
    part = reference(q, k, v, case)
    merge_many((into, Part(part.out, part.lse)), into.out, into.lse)


REFERENCE = Backend(
    name="reference",
    available=lambda device_type: None,
    why_not=lambda case: None,
    run=reference,
    run_into=reference_into,
)
