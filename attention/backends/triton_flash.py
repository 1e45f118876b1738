"""Our flash kernels: every mask, softcap and head_dim up to 256, on any GPU of Triton's.

On Hopper head_dim 64 and 128 go to a kernel of their own (kernels/flash_hopper.py). Parts are
continued in place, so a ring hop needs no merge.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ringspan.attention.backends.case import Backend, Case
from ringspan.kernels.flash import flash
from ringspan.types import Part


def triton_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    """q [T, Hq, D], k, v [S, Hkv, D] bf16, fp16 or fp32 -> out in q.dtype, lse [T, Hq] fp32."""
    return flash(q, k, v, **case.mask._asdict(), softcap=case.softcap, scale=case.scale)


def triton_flash_into(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, part: Part
) -> None:
    """As triton_flash; `part` (fp32, out's last axis contiguous) takes up these keys in place."""
    flash(q, k, v, **case.mask._asdict(), softcap=case.softcap, scale=case.scale, into=part)


def _available(device_type: str) -> str | None:
    if device_type != "cuda":
        return "it runs on CUDA devices only"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def _why_not(case: Case) -> str | None:
    if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bf16, fp16 and fp32, not {case.dtype}"
    if case.head_dim > 256:
        return f"it takes head_dim up to 256, not {case.head_dim}"
    return None


TRITON = Backend(
    name="triton",
    available=_available,
    why_not=_why_not,
    run=triton_flash,
    run_into=triton_flash_into,
)
