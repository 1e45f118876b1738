"""Pages of 8-bit codes with one scale a row, by torch: the definition, and what a CPU runs.

    y = x S / sqrt(D) (int8, D a power of two), else x
    scale = max |y| / M            M = 127 (int8) or 448 (fp8 e4m3)
    codes = round(y * (M / max |y|))      half to even
    x' = (codes S) * (scale / sqrt(D)), else codes * scale

x        [T, H, D]     fp32 | bf16 | fp16; a row is (token, head). The same of K and of V
k_codes  [U, H, P, D]  int8 | float8_e4m3fn        v_codes [U, H, D, P]
scale    [U, H, P]     fp32

The rows are those of quantize.py: of zeros (or below 2^-100) scale 0, of what is not finite scale
nan and codes 0. codes S holds whole numbers below 2^24, exact in any order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ringspan.kernels.page_columns import (
    butterflies,
    from_columns,
    rotate,
    rotates,
    stretches,
    to_columns,
)
from ringspan.kernels.quantize import FP8_MAX, INT8_MAX, TINY


class Scaled(NamedTuple):
    """What sets one of these kinds apart."""

    name: str
    dtype: torch.dtype
    largest: float
    """Of the codes."""
    may_rotate: bool


INT8 = Scaled("int8", torch.int8, INT8_MAX, True)
FP8 = Scaled("fp8", torch.float8_e4m3fn, FP8_MAX, False)


def shapes(
    kind: Scaled, num_kv_heads: int, head_dim: int, page_tokens: int
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    scale = (num_kv_heads, page_tokens)
    return (
        ("k_codes", (num_kv_heads, page_tokens, head_dim), kind.dtype),
        ("k_scale", scale, torch.float32),
        ("v_codes", (num_kv_heads, head_dim, page_tokens), kind.dtype),
        ("v_scale", scale, torch.float32),
    )


def encode(kind: Scaled, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As pages.encode_pages, whose checks have passed."""
    for x, codes, scale, token_last in _sides(k, v, into):
        for tokens, pages in stretches(x, scale.shape[2]):
            new_codes, new_scale = _encode(kind, to_columns(x[tokens], scale.shape[2]))
            codes[pages] = new_codes.permute(1, 2, 0, 3) if token_last else _rows(new_codes)
            scale[pages] = new_scale


def decode(
    kind: Scaled, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor
) -> None:
    """As pages.decode_pages, whose checks have passed."""
    for x, codes, scale, token_last in _sides(k, v, tensors):
        for tokens, pages in stretches(x, scale.shape[2]):
            part = codes[pages].permute(2, 0, 1, 3) if token_last else _columns(codes[pages])
            from_columns(_decode(kind, part, scale[pages]), x[tokens])


def _sides(k: torch.Tensor, v: torch.Tensor, tensors: tuple[torch.Tensor, ...]):
    k_codes, k_scale, v_codes, v_scale = tensors
    # a copy of bytes is a copy of bytes, and torch has fast ones for integers
    return (
        (k, k_codes.view(torch.int8), k_scale, False),
        (v, v_codes.view(torch.int8), v_scale, True),
    )


def _encode(kind: Scaled, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """columns [D, U, H, P] fp32, overwritten -> codes alike, as int8, and scale [U, H, P]."""
    if kind.may_rotate and rotates(columns.shape[0]):
        columns = rotate(columns)
    peak = torch.maximum(columns.amax(0), columns.amin(0).neg_())  # of nan it is nan
    peak = torch.where(peak.isfinite(), peak, torch.nan)
    peak = torch.where(peak < TINY, 0.0, peak)
    # tensor by tensor, as in quantize_ref
    most = torch.full_like(peak, kind.largest)
    inverse = torch.where(peak == 0, 0.0, most / peak)
    columns = columns.mul_(inverse).nan_to_num_(nan=0.0)
    if kind.dtype == torch.int8:
        columns = columns.round_()
    else:
        columns = columns.clamp_(-kind.largest, kind.largest)
    return columns.to(kind.dtype).view(torch.int8), peak / most


def _decode(kind: Scaled, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [D, U, H, P] as int8, any strides; scale [U, H, P] -> columns [D, U, H, P] fp32."""
    dim = codes.shape[0]
    columns = codes.contiguous().view(kind.dtype).float()
    if kind.may_rotate and rotates(dim):
        return butterflies(columns, 1, dim).mul_(scale * (1 / math.sqrt(dim)))
    return columns.mul_(scale)


def _rows(columns: torch.Tensor) -> torch.Tensor:
    """[D, U, H, P] -> a view [U, H, P, D]."""
    return columns.permute(1, 2, 3, 0)


def _columns(rows: torch.Tensor) -> torch.Tensor:
    """[U, H, P, D] -> a view [D, U, H, P]."""
    return rows.permute(3, 0, 1, 2)
