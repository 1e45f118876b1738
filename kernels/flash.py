"""Attention over one rectangle of query rows and keys, with its log-sum-exp.

    scores = scale * q k^T;  with softcap c > 0: c * tanh(scores / c);  hidden keys: -inf
    lse = log(sum over keys of exp(scores));  out = exp(scores - lse) v

Row i sees key j iff (not causal or j <= i + offset) and
(window is None or i + offset - j < window).

q     [T, Hq, D]   bf16 | fp16 | fp32, last axis contiguous
k, v  [S, Hkv, D]  the same dtype; kv head h serves the q heads h*G .. h*G + G - 1, G = Hq // Hkv
sinks [Hq]         fp32 or None: one more term exp(sinks[h]) in the sum of each row, with value 0
into  (out, lse)   fp32 or None: a part over other keys; the call adds its keys in place
out   [T, Hq, D]   in q.dtype, fp32 for `into`; 0 where a row sees no key
lse   [T, Hq]      fp32, natural log; -inf where a row sees neither key nor sink
Cost   4*T*S*Hq*D FLOP for a full mask, half of it for a causal square: bound by matrix units;
       `into` adds 8*T*Hq*D bytes read and 4*T*Hq*D written, where a merge of parts would read
       and write a third time.
Source online softmax by blocks, https://arxiv.org/abs/2205.14135 and 2307.08691; carried
       accumulators, https://arxiv.org/abs/2310.01889; sinks, https://arxiv.org/abs/2508.10925.

The kernels lie in flash_triton.py (any GPU of Triton's) and flash_hopper.py (sm_90); see merge.py
for why apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ringspan.types import Part

TILE_BYTES = 64 << 20
"""What the scores of the reference may take (or one row, if that is more)."""


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    offset: int,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    into: Part | None = None,
    sinks: torch.Tensor | None = None,
) -> Part:
    """A kernel for CUDA tensors, the definition for others.

    With `into` the part given is continued in place and returned: its out and lse then hold the
    attention over its keys and these. Start it with out 0 and lse -inf. Pass `sinks` to one of the
    calls that make up a row's attention, not to each. Raises ValueError for bad shapes or dtypes.
    """
    _check(q, k, v)
    _check_carried(q, into, sinks)
    run: Callable[..., Part] = flash_ref
    if q.is_cuda and q.numel() and k.shape[0]:
        from ringspan.kernels.flash_tune import flash_gpu

        run = flash_gpu
    return run(
        q, k, v, causal=causal, offset=offset, window=window, softcap=softcap, scale=scale,
        into=into, sinks=sinks,
    )  # fmt: skip


def flash_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    offset: int,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    into: Part | None = None,
    sinks: torch.Tensor | None = None,
) -> Part:
    """The definition, in fp32 (fp64 for fp64 inputs), any device; by tiles of rows."""
    (rows, q_heads, _), (keys, kv_heads, _) = q.shape, k.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    groups = q_heads // kv_heads
    if into is None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_full((rows, q_heads), -torch.inf, dtype=torch.float32)
    else:
        out, lse = into
    keys_t = k.to(compute).permute(1, 2, 0)  # [Hkv, D, S]
    values = v.to(compute).transpose(0, 1)  # [Hkv, S, D]
    tile = max(1, TILE_BYTES // (q_heads * max(1, keys) * compute.itemsize))
    for start in range(0, rows, tile):
        stop = min(rows, start + tile)
        queries = q[start:stop].to(compute).unflatten(1, (kv_heads, groups))
        scores = queries.permute(1, 2, 0, 3).flatten(1, 2) @ keys_t * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.unflatten(1, (groups, stop - start))  # [Hkv, G, t, S]
        if causal or window is not None:
            scores.masked_fill_(
                hidden_keys(start, stop, 0, keys, causal, offset, window, q.device), -torch.inf
            )
        tile_lse = scores.logsumexp(-1)
        pivot = torch.where(tile_lse.isneginf(), 0.0, tile_lse)  # no key seen: out is 0, not nan
        weights = (scores - pivot[..., None]).exp_()
        tile_out = (weights.flatten(1, 2) @ values).unflatten(1, (groups, stop - start))
        tile_out = tile_out.permute(2, 0, 1, 3).flatten(1, 2)  # [t, Hq, D]
        tile_lse = tile_lse.permute(2, 0, 1).flatten(1, 2)
        if sinks is not None:
            tile_out, tile_lse = merged(tile_out, tile_lse, None, sinks.to(compute))
        if into is not None:
            before = out[start:stop].to(compute), lse[start:stop].to(compute)
            tile_out, tile_lse = merged(tile_out, tile_lse, *before)
        out[start:stop] = tile_out
        lse[start:stop] = tile_lse
    return Part(out, lse)


def merged(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor | None, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts over disjoint keys as one; `other` None: keys whose values are all 0."""
    both = torch.logaddexp(lse, other_lse)
    pivot = torch.where(both.isneginf(), 0.0, both)
    out = out * (lse - pivot).exp()[..., None]
    if other is not None:
        out = out + other * (other_lse - pivot).exp()[..., None]
    return out, both


def hidden_keys(
    row_start: int,
    row_stop: int,
    key_start: int,
    key_stop: int,
    causal: bool,
    offset: int,
    window: int | None,
    device: torch.device,
) -> torch.Tensor:
    """[rows, keys] bool: True where row i may not see key j."""
    ahead = torch.arange(row_start, row_stop, device=device)[:, None] + offset
    ahead = ahead - torch.arange(key_start, key_stop, device=device)  # i + offset - j
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if causal:
        hidden |= ahead < 0
    if window is not None:
        hidden |= ahead >= window
    return hidden


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not "
            "[T, Hq, D], [S, Hkv, D], [S, Hkv, D]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} q heads are no multiple of {k.shape[1]} kv heads")
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        raise ValueError(
            f"q, k, v have strides {q.stride()}, {k.stride()}, {v.stride()}, "
            "expected a contiguous last axis"
        )


def _check_carried(q: torch.Tensor, into: Part | None, sinks: torch.Tensor | None) -> None:
    if sinks is not None and (
        sinks.shape != q.shape[1:2] or sinks.dtype != torch.float32 or not sinks.is_contiguous()
    ):
        raise ValueError(
            f"sinks are {sinks.dtype} {tuple(sinks.shape)}, expected contiguous float32 "
            f"[Hq] = {tuple(q.shape[1:2])}"
        )
    if into is None:
        return
    out, lse = into
    if out.dtype != torch.float32 or lse.dtype != torch.float32:
        raise ValueError(
            f"into holds {out.dtype} and {lse.dtype}, expected float32: it accumulates"
        )
    if out.shape != q.shape or lse.shape != q.shape[:2]:
        raise ValueError(
            f"into has shapes {tuple(out.shape)} and {tuple(lse.shape)}, expected those of q: "
            f"{tuple(q.shape)} and {tuple(q.shape[:2])}"
        )
    if out.stride(2) != 1:
        raise ValueError(f"into.out has strides {out.stride()}, expected a contiguous last axis")
