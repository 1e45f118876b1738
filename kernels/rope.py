"""Rotary position embedding of queries and keys, in one pass over both.

    out = x * cos + rotate_half(x) * sin       rotate_half(x) = (-x[D/2:], x[:D/2])

q      [B, Hq, T, D]   bf16 | fp16 | fp32, any strides with the last axis contiguous
k      [B, Hkv, T, D]  likewise
cos    [B, T, D]       the dtype of q; sin likewise
Both products and their sum are rounded to the dtype, as transformers' apply_rotary_pos_emb does.
Cost   reads and writes B*(Hq + Hkv)*T*D elements: memory-bound. Plain torch moves 6 times as much.
Source RoFormer, https://arxiv.org/abs/2104.09864, in the half-split form of GPT-NeoX.
"""

from __future__ import annotations

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_TILE_ELEMENTS = 1 << 18
"""Of the scratch on a CPU: what stays in a core's cache."""


def rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The definition for one of q, k [B, H, T, D]. The rest may only be faster."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Hq, T, D], k [B, Hkv, T, D], cos and sin [B, T, D] -> q and k, rotated; same strides.

    The bits of transformers. Raises ValueError for what `why_not` tells.
    """
    reason = why_not(q, k, cos, sin)
    if reason is not None:
        raise ValueError(reason)
    outs = torch.empty_like(q), torch.empty_like(k)
    if q.is_cuda:
        from ringspan.kernels.rope_triton import rope_triton

        rope_triton(q, k, cos, sin, *outs)
    else:
        for x, out in zip((q, k), outs, strict=True):
            _rope_torch(x, cos, sin, out)
    return outs


def why_not(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why these are no arguments of `apply_rope`, in one line; None if they are."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[-1] % 2 or not q.shape[-1]:
        return (
            f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}, "
            "expected [B, Hq, T, D] and [B, Hkv, T, D] with an even D"
        )
    batch, _, tokens, dim = q.shape
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        return f"k has shape {tuple(k.shape)}, expected [B, Hkv, T, D] to match q {tuple(q.shape)}"
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (batch, tokens, dim):
            return (
                f"{name} has shape {tuple(table.shape)}, "
                f"expected [B, T, D] = {(batch, tokens, dim)}"
            )
    tensors = (q, k, cos, sin)
    if q.dtype not in FLOATS or any(t.dtype != q.dtype or t.device != q.device for t in tensors):
        told = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        return f"q, k, cos, sin are {told}; expected one of bf16, fp16, fp32 and one device"
    if any(t.numel() and t.stride(-1) != 1 for t in tensors):
        return "q, k, cos and sin must have a contiguous last axis; give contiguous copies"
    return None


def _rope_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Tile by tile of tokens, so that no copies of x exist."""
    tokens = x.shape[2]
    step = max(1, _TILE_ELEMENTS * tokens // max(1, x.numel()))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        out[:, :, part] = rope_ref(x[:, :, part], cos[:, part], sin[:, part])
