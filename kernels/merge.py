"""Merge partial attention results over disjoint keys.

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

out_*  [T, Hq, D]  bf16 | fp16 | fp32
lse_*  [T, Hq]     fp32, natural log; -inf (and out 0) where the part saw no key
Cost   reads 2*T*Hq*D elements, writes T*Hq*D: memory-bound.
Source https://arxiv.org/abs/2501.01005, section 2.2.

The Triton kernel lies in merge_triton.py, which is imported only for a CUDA tensor: importing
triton takes half a second, and a machine without a GPU need not have it.
"""

from __future__ import annotations

import torch

from ringspan.types import Part


def merge_ref(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition -> out in out_a's dtype, lse. The rest may only be faster."""
    lse = torch.logaddexp(lse_a, lse_b)
    pivot = torch.where(lse.isneginf(), 0.0, lse)  # both parts empty -> out is 0, not nan
    weight_a, weight_b = (lse_a - pivot).exp(), (lse_b - pivot).exp()
    out = weight_a[..., None] * out_a.float() + weight_b[..., None] * out_b.float()
    return out.to(out_a.dtype), lse


def merge(a: Part, b: Part) -> Part:
    """Two parts over disjoint keys as one, in fp32, rounded once to a.out's dtype."""
    _check("b", b.out, b.lse, a.out)
    out = a.out.to(torch.float32, copy=True).contiguous()
    lse = a.lse.to(torch.float32, copy=True).contiguous()
    merge_into(out, lse, b.out, b.lse)
    return Part(out.to(a.out.dtype), lse)


def merge_into(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Accumulate a part into (out, lse), in place.

    out [T, Hq, D] and lse [T, Hq]: fp32, contiguous, finite out; start them with 0 and -inf.
    part_out [T, Hq, D] any float dtype; part_lse [T, Hq] fp32; both may be strided.
    Raises ValueError for shapes, dtypes or strides that are not these.
    """
    if out.dtype != torch.float32 or lse.dtype != torch.float32:
        raise ValueError(f"accumulators are {out.dtype} and {lse.dtype}, expected float32")
    if not (out.is_contiguous() and lse.is_contiguous()):
        raise ValueError(
            f"accumulators have strides {out.stride()} and {lse.stride()}, expected contiguous"
        )
    _check("the accumulator", out, lse, out)
    _check("the part", part_out, part_lse, out)
    if not out.numel():
        return
    if out.is_cuda:
        from ringspan.kernels.merge_triton import merge_into_triton

        merge_into_triton(out, lse, part_out, part_lse)
    else:
        _merge_into_torch(out, lse, part_out, part_lse)


def merge_parts(outs: torch.Tensor, lses: torch.Tensor) -> Part:
    """n parts at once: outs [P, T, Hq, D], lses [P, T, Hq] -> out in outs' dtype, lse fp32.

    Summed in the order of the first axis, so that every rank that holds the same parts gets the
    same bits.
    """
    if outs.dim() != 4 or lses.shape != outs.shape[:3] or not outs.shape[0]:
        raise ValueError(
            f"parts have shapes {tuple(outs.shape)} and {tuple(lses.shape)}, "
            "expected [P, T, Hq, D] and [P, T, Hq] with P >= 1"
        )
    lses = lses.float()
    lse = lses.logsumexp(0)
    weights = (lses - torch.where(lse.isneginf(), 0.0, lse)).exp()
    out = weights[0][..., None] * outs[0].float()
    for weight, part in zip(weights[1:], outs[1:], strict=True):
        out.addcmul_(part.float(), weight[..., None])
    return Part(out.to(outs.dtype), lse)


def _merge_into_torch(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor
) -> None:
    merged = torch.logaddexp(lse, part_lse)
    pivot = torch.where(merged.isneginf(), 0.0, merged)
    weight, part_weight = lse.sub_(pivot).exp_(), (part_lse - pivot).exp_()
    out.mul_(weight[..., None]).addcmul_(part_out.float(), part_weight[..., None])
    lse.copy_(merged)


def _check(name: str, out: torch.Tensor, lse: torch.Tensor, like: torch.Tensor) -> None:
    if out.dim() != 3 or out.shape != like.shape:
        raise ValueError(
            f"out of {name} has shape {tuple(out.shape)}, expected [T, Hq, D] = {tuple(like.shape)}"
        )
    if lse.shape != out.shape[:2]:
        raise ValueError(
            f"lse of {name} has shape {tuple(lse.shape)}, expected [T, Hq] = "
            f"{tuple(out.shape[:2])} to match out {tuple(out.shape)}"
        )
