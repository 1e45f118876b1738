"""cuDNN's attention through torch.

Its causal mask is aligned top-left, so an aligned causal block with more keys than rows is cut into
a full rectangle and a causal square. lse comes as [1, Hq, T] or [1, Hq, T, 1], natural log. It
splits the keys among the multiprocessors when rows are few: the best for decode over many keys. It
builds an execution plan for each new shape, which takes milliseconds: not for shapes that change
from token to token.
"""

from __future__ import annotations

import torch

from ringspan.attention.backends.case import Backend, Case
from ringspan.attention.backends.square import rectangle_and_square
from ringspan.types import Part


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    """q [T, Hq, D], k, v [S, Hkv, D] bf16 or fp16 -> out in q.dtype (fp32 where merged), lse."""
    if case.mask.causal:
        return rectangle_and_square(q, k, v, case.scale, _op)
    return _op(q, k, v, False, case.scale)


def _op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Part:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        None,
        True,  # compute_log_sumexp
        0.0,
        causal,
        False,
        scale=scale,
    )[:2]
    return Part(out[0].transpose(0, 1), lse.reshape(q.shape[1], q.shape[0]).transpose(0, 1))


def _available(device_type: str) -> str | None:
    if device_type != "cuda":
        return "it runs on CUDA devices only"
    if not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    return None


def _why_not(case: Case) -> str | None:
    if case.capability is None or case.capability < (8, 0):
        return f"it wants compute capability 8.0 or higher, not {case.capability}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {case.dtype}"
    if case.head_dim % 8 or not 8 <= case.head_dim <= 128:
        return f"it takes head_dim 8 to 128 in steps of 8, not {case.head_dim}"
    if case.mask.window is not None:
        return "it has no sliding window"
    if case.softcap:
        return f"it has no softcap (asked for {case.softcap})"
    return None


CUDNN = Backend(name="cudnn", available=_available, why_not=_why_not, run=cudnn)
