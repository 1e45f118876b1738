"""Merge partial attention results over disjoint keys: n parts, and sinks, in one pass.

    m   = max(lse_0, .., lse_n-1, sink)        w_i = exp(lse_i - m)
    out = sum w_i out_i / (sum w_i + exp(sink - m))
    lse = m + log(sum w_i + exp(sink - m))

out_i  [T, Hq, D]  bf16 | fp16 | fp32, last axis contiguous
lse_i  [T, Hq]     fp32, natural log, any strides; -inf where the part saw no key
sinks  [Hq]        fp32, natural log: what every row's denominator has besides its keys
Cost   reads n*T*Hq*D elements, writes T*Hq*D: memory-bound.
Source https://arxiv.org/abs/2501.01005, section 2.2; sinks: https://arxiv.org/abs/2309.17453.

Sums are fp32 in the order of the parts, so that every rank that holds the same parts gets the same
bits. The Triton kernel lies in merge_triton.py, which is imported only for a CUDA tensor:
importing triton takes half a second, and a machine without a GPU need not have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringspan.types import Part

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_TILE_ELEMENTS = 1 << 18
"""Of the fp32 scratch on a CPU: what stays in a core's cache."""


def merge_many_ref(parts: Sequence[Part], sinks: torch.Tensor | None = None) -> Part:
    """The definition, in fp64. The rest may only be faster."""
    lses = torch.stack([part.lse.double() for part in parts])  # [P, T, Hq]
    if sinks is not None:
        lses = torch.cat([lses, sinks.double().expand_as(lses[:1])])
    lse = lses.logsumexp(0)
    pivot = torch.where(lse.isneginf(), 0.0, lse)  # all parts empty -> out is 0, not nan
    weights = (lses - pivot).exp()[: len(parts), ..., None]
    outs = torch.stack([part.out.double() for part in parts])
    return Part((weights * torch.where(weights == 0, 0.0, outs)).sum(0), lse)


def merge_many(
    parts: Sequence[Part],
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Parts over disjoint keys of the same rows -> out, and lse if wanted, written in place.

    out [T, Hq, D] bf16 | fp16 | fp32, its last axis contiguous; lse [T, Hq] fp32, any strides;
    both may be slices of larger tensors, and both may be the first part's own tensors (to go on
    accumulating), but no other's. Rows where no part saw a key (and without sinks) get out 0 and
    lse -inf; what a part holds in rows where its lse is -inf is not looked at. Each part is read
    once and the result written once, for up to 16 parts on a GPU; beyond that they are folded
    through fp32. Raises ValueError for no parts, or for shapes, dtypes or strides that are not
    these.
    """
    _check(parts, out, lse, sinks)
    if not out.numel():
        return
    if not out.is_cuda:
        _merge_many_torch(parts, out, lse, sinks)
        return
    fold(parts, out, lse, sinks)


def fold(
    parts: Sequence[Part],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """`merge_many` by the Triton kernel: one launch, or several that go on from an fp32 result."""
    from ringspan.kernels import merge_triton as kernel

    rest = list(parts)
    if len(rest) > kernel.MAX_PARTS:
        options = {"dtype": torch.float32, "device": out.device}
        scratch = Part(
            out if out.dtype == torch.float32 else torch.empty(out.shape, **options),
            torch.empty(out.shape[:2], **options),
        )
        while len(rest) > kernel.MAX_PARTS:
            kernel.merge_many_triton(rest[: kernel.MAX_PARTS], *scratch, None)
            rest = [scratch, *rest[kernel.MAX_PARTS :]]
    kernel.merge_many_triton(rest, out, lse, sinks)


def merge(a: Part, b: Part) -> Part:
    """Two parts over disjoint keys as one, rounded once to a.out's dtype; both stay as they are."""
    out = torch.empty_like(a.out, memory_format=torch.contiguous_format)
    lse = torch.empty(a.out.shape[:2], dtype=torch.float32, device=a.out.device)
    merge_many((a, b), out, lse)
    return Part(out, lse)


def merge_into(
    out: torch.Tensor, lse: torch.Tensor, part_out: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Accumulate a part into (out, lse), in place.

    out [T, Hq, D] and lse [T, Hq]: fp32; start lse with -inf. part_out [T, Hq, D] any float dtype;
    part_lse [T, Hq] fp32, strided as it likes. Raises ValueError as `merge_many`.
    """
    if out.dtype != torch.float32:
        raise ValueError(f"the accumulator is {out.dtype}, expected float32")
    if part_out.dim() == 3 and part_out.stride(2) != 1:
        part_out = part_out.contiguous()
    merge_many((Part(out, lse), Part(part_out, part_lse)), out, lse)


def merge_parts(outs: torch.Tensor, lses: torch.Tensor) -> Part:
    """n parts at once: outs [P, T, Hq, D], lses [P, T, Hq] -> out in outs' dtype, lse fp32."""
    if outs.dim() != 4 or lses.shape != outs.shape[:3] or not outs.shape[0]:
        raise ValueError(
            f"parts have shapes {tuple(outs.shape)} and {tuple(lses.shape)}, "
            "expected [P, T, Hq, D] and [P, T, Hq] with P >= 1"
        )
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(outs.shape[1:3], dtype=torch.float32, device=outs.device)
    merge_many([Part(*part) for part in zip(outs, lses.float(), strict=True)], out, lse)
    return Part(out, lse)


def _merge_many_torch(
    parts: Sequence[Part],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Tile by tile of rows, so that no fp32 copy of the parts exists."""
    num_tokens, num_heads, dim = out.shape
    step = max(1, _TILE_ELEMENTS // (num_heads * dim))
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        lses = torch.stack([part.lse[rows] for part in parts])  # [P, t, Hq]
        peak = lses.amax(0) if sinks is None else torch.maximum(lses.amax(0), sinks)
        pivot = torch.where(peak.isneginf(), 0.0, peak)  # no part saw a key: weights 0, not nan
        weights = (lses - pivot).exp_()
        total = weights.sum(0) if sinks is None else weights.sum(0) + (sinks - pivot).exp_()
        has_zeros = (weights == 0).flatten(1).any(1).tolist()
        merged = torch.zeros((*peak.shape, dim), dtype=torch.float32, device=out.device)
        for part, weight, zeros in zip(parts, weights[..., None], has_zeros, strict=True):
            block = part.out[rows].float()
            if zeros:  # what a part left in rows where it saw no key may be anything
                block = torch.where(weight == 0, 0.0, block)
            merged.addcmul_(block, weight)
        safe = torch.where(total == 0, 1.0, total)
        out[rows] = merged.mul_((1 / safe)[..., None])
        if lse is not None:
            lse[rows] = torch.where(total == 0, -torch.inf, pivot + safe.log())


def _check(
    parts: Sequence[Part],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    if not parts:
        raise ValueError("no parts to merge, expected at least one")
    if out.dim() != 3:
        raise ValueError(f"the result has shape {tuple(out.shape)}, expected [T, Hq, D]")
    for i, part in enumerate(parts):
        _check_out(f"out of part {i}", part.out, out)
        _check_lse(f"lse of part {i}", part.lse, out)
    _check_out("the result", out, out)
    if lse is not None:
        _check_lse("lse of the result", lse, out)
    if sinks is not None and (
        sinks.shape != out.shape[1:2] or sinks.dtype != torch.float32 or sinks.device != out.device
    ):
        raise ValueError(
            f"sinks are {_told(sinks)}, expected [Hq] = {tuple(out.shape[1:2])} "
            f"torch.float32 on {out.device}"
        )


def _check_out(name: str, out: torch.Tensor, like: torch.Tensor) -> None:
    if out.shape != like.shape or out.dtype not in FLOATS or out.device != like.device:
        raise ValueError(
            f"{name} is {_told(out)}, expected [T, Hq, D] = {tuple(like.shape)} "
            f"bf16, fp16 or fp32 on {like.device}"
        )
    if out.shape[2] > 1 and out.stride(2) != 1:
        raise ValueError(
            f"{name} has strides {out.stride()}, expected a contiguous last axis; "
            "give a contiguous copy"
        )


def _check_lse(name: str, lse: torch.Tensor, out: torch.Tensor) -> None:
    if lse.shape != out.shape[:2] or lse.dtype != torch.float32 or lse.device != out.device:
        raise ValueError(
            f"{name} is {_told(lse)}, expected [T, Hq] = {tuple(out.shape[:2])} "
            f"torch.float32 on {out.device}"
        )


def _told(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
