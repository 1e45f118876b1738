"""The gated product between an MLP's projections, in one pass.

    out = act(gate) * up
    silu       act(x) = x / (1 + exp(-x))
    gelu_tanh  act(x) = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)
               which is x (1 + tanh u) / 2 without its cancellation where tanh u is near -1

gate, up, out [N, F]  bf16 | fp16 | fp32, last axis contiguous
act(gate) is computed in fp32 and rounded to the dtype before the product, as two modules would.
Cost   reads 2*N*F elements, writes N*F: memory-bound.
Source https://arxiv.org/abs/2002.05202; the tanh form: https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

_TILE_ELEMENTS = 1 << 18
"""Of the scratch on a CPU: what stays in a core's cache."""


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor, act: str = "silu") -> torch.Tensor:
    """The definition. The rest may only be faster."""
    return ACTIVATIONS[act](gate) * up


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, act: str = "silu", out: torch.Tensor | None = None
) -> torch.Tensor:
    """gate and up [.., F] -> act(gate) * up [.., F], into `out` if given; out may be gate or up.

    On a CPU the bits of plain torch, on a GPU within two units in the last place, and that in few
    elements. Raises ValueError for an unknown act, and for shapes, dtypes or strides that are not
    these.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    out = torch.empty_like(gate) if out is None else out
    for name, x in (("gate", gate), ("up", up), ("out", out)):
        if x.shape != gate.shape or x.dtype != gate.dtype or x.device != gate.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, expected "
                f"{tuple(gate.shape)} {gate.dtype} on {gate.device}, as gate"
            )
    if gate.dtype not in FLOATS or gate.dim() < 1:
        raise ValueError(f"gate is {gate.dim()}-d {gate.dtype}, expected [.., F] bf16, fp16, fp32")
    if not gate.numel():
        return out
    try:
        rows = [x.view(-1, x.shape[-1]) for x in (gate, up, out)]
    except RuntimeError:
        rows = []
    if not rows or any(x.stride(1) != 1 for x in rows):
        strides = ", ".join(str(x.stride()) for x in (gate, up, out))
        raise ValueError(
            f"gate, up and out have strides {strides}, expected rows of one stride with a "
            "contiguous last axis; give contiguous copies"
        )
    if gate.is_cuda:
        from ringspan.kernels.swiglu_triton import swiglu_triton

        swiglu_triton(rows[0], rows[1], rows[2], act)
    else:
        step = max(1, _TILE_ELEMENTS // gate.shape[-1])
        for start in range(0, rows[0].shape[0], step):
            part = slice(start, start + step)
            torch.mul(ACTIVATIONS[act](rows[0][part]), rows[1][part], out=rows[2][part])
    return out
