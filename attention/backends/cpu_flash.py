"""torch's flash attention for CPUs: GQA without expansion, log-sum-exp returned.

Its causal mask is aligned top-left, so an aligned causal block with more keys than rows is cut into
a full rectangle and a causal square. A window is served by tiles of rows with an additive mask.
A row that sees no key would get lse 0 from it: canonical cases have none.
"""

from __future__ import annotations

import torch

from ringspan.attention.backends.case import Backend, Case
from ringspan.attention.backends.square import rectangle_and_square
from ringspan.kernels.flash import hidden_keys
from ringspan.types import Part

WINDOW_TILE = 256
"""Rows of a tile under a window: a tile reads window + WINDOW_TILE keys."""

FEW_ROWS = 16
"""Up to so many rows, the q heads of one kv head become rows of one head, so that K and V are read
once per kv head: 17 against 41 ms for one fp32 row over 32,768 keys, 9 q and 3 kv heads, 1 core."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cpu_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    """q [T, Hq, D], k, v [S, Hkv, D] -> out in q.dtype (fp32 where two parts were merged), lse."""
    if case.mask.window is not None:
        return _windowed(q, k, v, case)
    if case.mask.causal:
        return rectangle_and_square(q, k, v, case.scale, _op)
    if case.rows <= FEW_ROWS and case.num_q_heads > case.num_kv_heads:
        return _packed(q, k, v, case)
    return _op(q, k, v, False, case.scale)


def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    mask: torch.Tensor | None = None,
) -> Part:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        0.0,
        causal,
        attn_mask=mask,
        scale=scale,
    )
    return Part(out[0].transpose(0, 1), lse[0].transpose(0, 1))  # lse comes as [1, Hq, T]


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    rows, groups = case.rows, case.num_q_heads // case.num_kv_heads
    packed = q.unflatten(1, (case.num_kv_heads, groups)).transpose(1, 2).flatten(0, 1)
    out, lse = _op(packed, k, v, False, case.scale)  # [T * G, Hkv, ...]
    out, lse = out.unflatten(0, (rows, groups)), lse.unflatten(0, (rows, groups))
    return Part(out.transpose(1, 2).flatten(1, 2), lse.transpose(1, 2).flatten(1, 2))


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    causal, offset, window = case.mask.causal, case.mask.offset, case.mask.window or 0
    outs, lses = [], []
    for start in range(0, case.rows, WINDOW_TILE):
        stop = min(case.rows, start + WINDOW_TILE)
        first = max(0, start + offset - window + 1)
        last = min(case.keys, stop + offset) if causal else case.keys
        hidden = hidden_keys(start, stop, first, last, causal, offset, window, q.device)
        bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        part = _op(q[start:stop], k[first:last], v[first:last], False, case.scale, bias)
        outs.append(part.out)
        lses.append(part.lse)
    return Part(torch.cat(outs), torch.cat(lses))


def _why_not(case: Case) -> str | None:
    if case.dtype not in _DTYPES:
        return f"it takes fp32, fp64, bf16 and fp16, not {case.dtype}"
    if case.softcap:
        return f"it has no softcap (asked for {case.softcap})"
    return None


CPU_FLASH = Backend(
    name="cpu-flash",
    available=lambda device_type: None if device_type == "cpu" else "it runs on CPUs only",
    why_not=_why_not,
    run=cpu_flash,
)
