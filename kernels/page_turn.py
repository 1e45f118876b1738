"""Keys of a page turned back to one frame: rotary positions undone within the page, and found.

    u_s = R(-w s) x_s        R turns the pairs (d, d + D/2) by the angles w_d s, s = 0 .. P-1
    w_d = base^(-2d / D)     of one base for a (page, head), the one whose mean is the largest:
    base = argmax |mean over s of R(-w s) x_s|^2

columns  [D, U, H, P]  fp32, as in page_columns.py
base     [U, H]        int64, index into BASES; 0 leaves x as it is

Rotary positions turn what keys have in common through the page, so that their mean is less than it
was before them. To undo that needs no absolute positions: turning back to position 0 and turning
back to the page's first token differ by one rotation that all tokens of the page share, under which
means and distances do not change. Nor does it need the model: a page holds consecutive positions,
and of the bases that models use the right one shows in the page itself (on smollm2 in 960 of 960
pages and heads). Scaled positions (YaRN, Llama 3) change slow pairs only, which hardly turn in a
page; of a model without rotary positions, or with pairs of another kind, index 0 is the largest, or
whatever gives a larger mean, which is as good.

Source RoFormer, https://arxiv.org/abs/2104.09864, in the half-split form of GPT-NeoX; keys before
       their positions: KVQuant, https://arxiv.org/abs/2401.18079, section 3.2.
"""

from __future__ import annotations

from functools import lru_cache

import torch

BASES = (0.0, 1e4, 1e5, 1.3e5, 1.5e5, 5e5, 1e6, 5e6, 1e7)
"""Of the models that there are; 0: not turned. Their places stand in pages: add behind."""


@lru_cache(maxsize=16)
def tables(dim: int, page_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [len(BASES), D/2, P] fp32 of the angles w_d s, rounded from fp64 on a CPU: the
    same bits wherever they are used."""
    pair = torch.arange(dim // 2, dtype=torch.float64)
    slot = torch.arange(page_tokens, dtype=torch.float64)
    angles = torch.zeros(len(BASES), dim // 2, page_tokens, dtype=torch.float64)
    for at, base in enumerate(BASES):
        if base:
            angles[at] = base ** (-2 * pair / dim)[:, None] * slot
    return angles.cos().float().to(device), angles.sin().float().to(device)


def find_base(columns: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """-> base [U, H]. counted [U, H, P]: the tokens that make the mean; columns of others are 0."""
    dim, page_tokens = columns.shape[0], columns.shape[3]
    best = torch.zeros(counted.shape[:2], dtype=torch.int64, device=columns.device)
    most = torch.full(best.shape, -1.0, device=columns.device)
    cos, sin = tables(dim, page_tokens, columns.device)
    for at in range(len(BASES)):
        mean = added(_turned(columns, cos[at, :, None, None], -sin[at, :, None, None]), 3)
        energy = added(mean * mean, 0)
        best = torch.where(energy > most, at, best)
        most = torch.maximum(most, energy)
    return best


def turn_back(columns: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """columns -> u."""
    cos, sin = _of_pages(columns, base)
    return _turned(columns, cos, -sin)


def turn(columns: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """u -> columns."""
    cos, sin = _of_pages(columns, base)
    return _turned(columns, cos, sin)


def added(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The sum along an axis, by halves: its order, and so its bits, depend on that length only."""
    length = x.shape[axis]
    while length > 1:
        half = (length + 1) // 2
        folded = x.narrow(axis, 0, half).clone()
        folded.narrow(axis, 0, length - half).add_(x.narrow(axis, half, length - half))
        x, length = folded, half
    return x.squeeze(axis)


def _of_pages(columns: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [D/2, U, H, P]."""
    cos, sin = tables(columns.shape[0], columns.shape[3], columns.device)
    return cos[base].permute(2, 0, 1, 3), sin[base].permute(2, 0, 1, 3)


def _turned(columns: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = columns.shape[0] // 2
    a, b = columns[:half], columns[half:]
    out = torch.empty_like(columns)
    torch.sub(a * cos, b * sin, out=out[:half])
    torch.add(b * cos, a * sin, out=out[half:])
    return out
