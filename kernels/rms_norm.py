"""Root-mean-square normalisation of rows, in one pass over the hidden states.

    y = x / sqrt(mean(x^2) + eps)          fp32
    plain        out = weight * y          y rounded to x's dtype first, as LlamaRMSNorm does
    unit offset  out = (1 + weight) * y    in fp32, rounded once, as Gemma's norms do

x, out [.., H]  bf16 | fp16 | fp32, last axis contiguous; a row is all leading axes
weight [H]      the dtype of x
Cost   reads N*H elements, writes N*H: memory-bound. Plain torch moves 7 to 9 times as much.
Source https://arxiv.org/abs/1910.07467; where it rounds: transformers' modules.
"""

from __future__ import annotations

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

MAX_HIDDEN = 1 << 16
"""Elements of a row that one program of the Triton kernel can hold."""

_TILE_ELEMENTS = 1 << 18
"""Of the fp32 scratch on a CPU: what stays in a core's cache."""


def rms_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False
) -> torch.Tensor:
    """The definition -> the shape and dtype of x. The rest may only be faster."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (y * (1.0 + weight.float())).to(x.dtype)
    return weight * y.to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False
) -> torch.Tensor:
    """x [.., H], weight [H] -> [.., H], with the strides that torch's own operations would give.

    Equals transformers' modules up to the order of the sum: on a CPU the same bits, on a GPU within
    two units in the last place of the dtype, and that in few elements. Raises ValueError for
    shapes or dtypes that are not these.
    """
    hidden = weight.shape[-1]
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != hidden:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected [.., H] and [H]"
        )
    if x.dtype not in FLOATS or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device} and weight {weight.dtype} on {weight.device}, "
            "expected one of bf16, fp16, fp32 for both, on one device"
        )
    if x.stride(-1) != 1 or weight.stride(0) != 1:
        x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    if not x.numel():
        return out
    if x.is_cuda and hidden <= MAX_HIDDEN:
        from ringspan.kernels.rms_norm_triton import rms_norm_triton

        rms_norm_triton(x, weight, eps, unit_offset, out)
    else:
        _rms_norm_torch(x, weight, eps, unit_offset, out)
    return out


def _rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool, out: torch.Tensor
) -> None:
    """Tile by tile along the longest axis of rows, so that no fp32 copy of x exists."""
    if x.dim() == 1:
        x, out = x[None], out[None]
    axis = max(range(x.dim() - 1), key=lambda i: x.shape[i])
    length = x.shape[axis]
    step = max(1, _TILE_ELEMENTS // (x.numel() // length))
    for start in range(0, length, step):
        count = min(step, length - start)
        tile = x.narrow(axis, start, count)
        out.narrow(axis, start, count).copy_(rms_norm_ref(tile, weight, eps, unit_offset))
