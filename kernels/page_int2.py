"""Pages of K and V in 2 bits, by torch: the definition, and what a CPU runs.

V is k4v2's (page_k4v2.py). K has a scale a row and leaves out its page's mean:

    y = x S / sqrt(D) (D a power of two), else x               a row is (token, head)
    m = fp16(mean of y over the page's tokens), or 0           z = y - m
    c = floor(z / (STEP rms of its row)) in -2 .. 1            codes = c + 2
    scale = fp16(2 |z| / |2 codes - 3|), the lengths of a row
    y' = (2 codes - 3) * scale / 2 + m                         x' = y' S / sqrt(D)

x        [T, H, D]       fp32 | bf16 | fp16
k_codes  [U, H, P, D/4]  uint8: dimension d in the lowest two bits, then d + D/4, d + D/2, d + 3D/4
k_scale  [U, H, P]       fp16
k_mean   [U, H, D]       fp16
V        v_codes, v_scale, v_dims as page_k4v2.py has them
Bits     K 2 + 16 / D + 16 / P, V 2 + 16 / D + 8 / P. Both at D 128, P 128: 2.22.
Source   QuaRot, https://arxiv.org/abs/2404.00456 (rotation); KIVI, https://arxiv.org/abs/2402.02750
         (K's outliers lie in channels: here the mean of each); see page_k4v2.py for V and the step.

Without the mean 2 bits of K lose twice as much of attention's output (real keys of a model of
135 M parameters: 0.49 of it with a scale a row, 0.20 with the mean off; least and largest value as
int4 has them 0.58 and 0.24). Scales of K's dimensions, as V has them, cost more than they gain:
with the mean off there is little left of the channels, and what is left carries positions.

m is 0 for a page and head in which it would more than double the range (max - min) of some token: a
sink, as page_int4.py has it. Rows of zeros, rows that are not finite, and what fp16 cannot hold
become what they become there, and decoding gives the same bits on every device as it does there.
"""

from __future__ import annotations

import math

import torch

from ringspan.kernels import page_k4v2
from ringspan.kernels.page_columns import (
    butterflies,
    from_columns,
    rotate,
    rotates,
    stretches,
    to_columns,
)
from ringspan.kernels.page_int4 import rotated_mean
from ringspan.kernels.page_k4v2 import STEP, by_halves, inverse
from ringspan.kernels.quantize import TINY


def shapes(
    num_kv_heads: int, head_dim: int, page_tokens: int
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Raises ValueError where four codes do not fill bytes."""
    if head_dim % 4 or page_tokens % 2:
        raise ValueError(
            f"head_dim {head_dim} and page_tokens {page_tokens}: int2 pages pack four codes into a "
            "byte, expected multiples of 4 and of 2; take int8 or raw"
        )
    return (
        ("k_codes", (num_kv_heads, page_tokens, head_dim // 4), torch.uint8),
        ("k_scale", (num_kv_heads, page_tokens), torch.float16),
        ("k_mean", (num_kv_heads, head_dim), torch.float16),
        *page_k4v2.v_shapes(num_kv_heads, head_dim, page_tokens),
    )


def encode(k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As pages.encode_pages, whose checks have passed."""
    k_codes, k_scale, k_mean = into[:3]
    page_tokens = k_scale.shape[2]
    for tokens, pages in stretches(k, page_tokens):
        columns = to_columns(k[tokens], page_tokens)
        if rotates(columns.shape[0]):
            columns = rotate(columns)
        codes, k_scale[pages], k_mean[pages] = _encode(columns, k[tokens].shape[0])
        low, high = codes.chunk(2, 0)
        packed = low | high << 4  # dimension d, d + D/2
        low, high = packed.chunk(2, 0)
        k_codes[pages] = (low | high << 2).permute(1, 2, 3, 0)
    page_k4v2.encode_v(v, into[3:])


def decode(tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
    """As pages.decode_pages, whose checks have passed."""
    k_codes, k_scale, k_mean = tensors[:3]
    dim = k.shape[2]
    norm = 0.5 / math.sqrt(dim) if rotates(dim) else 0.5
    for tokens, pages in stretches(k, k_scale.shape[2]):
        columns = levels(k_codes[pages]).permute(3, 0, 1, 2).contiguous()
        if rotates(dim):
            columns = butterflies(columns, 1, dim)
        columns.mul_(k_scale[pages].float()).mul_(norm)
        columns += rotated_mean(k_mean[pages]).permute(2, 0, 1)[..., None]
        from_columns(columns, k[tokens])
    page_k4v2.decode_v(tensors[3:], v)


def levels(codes: torch.Tensor) -> torch.Tensor:
    """codes [..., D/4] uint8 -> 2 codes - 3 [..., D] fp32."""
    low, high = codes & 15, codes >> 4
    fours = (low & 3, low >> 2, high & 3, high >> 2)
    return torch.cat(fours, -1).float().mul_(2.0).sub_(3.0)


def _encode(y: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [D, U, H, P] fp32, overwritten -> codes [D, U, H, P] uint8, scale [U, H, P], mean
    [U, H, D]. Sums are added by halves, element by element: the same bits on every device."""
    dim, units, _, page_tokens = y.shape
    real = torch.arange(units * page_tokens, device=y.device).view(units, 1, page_tokens)
    real = real < num_tokens
    width = y.amax(0) - y.amin(0)  # of inf and nan not finite
    finite = width.isfinite()
    y = torch.where(finite, y, 0.0)
    counted = finite & real
    count = counted.sum(2).clamp_(min=1).float()  # [U, H]
    mean = (by_halves(torch.where(counted, y, 0.0).movedim(3, 0)) / count).half()  # [D, U, H]
    mean = torch.where(mean.isfinite(), mean, torch.nan)
    z = y - torch.where(mean.isfinite(), mean, 0.0)[..., None]
    widens = (((z.amax(0) - z.amin(0)) > 2 * width) & counted).any(2)  # [U, H]
    mean = torch.where(widens, 0.0, mean)
    z = torch.where(widens[..., None], y, z)
    peak = torch.maximum(z.amax(0), z.amin(0).neg())
    peak = torch.where(peak < TINY, 0.0, peak)
    z.mul_(inverse(peak))  # at most 1: no square overflows
    length = by_halves(z.square()).sqrt_()
    codes = z.mul_(inverse(length * (STEP / math.sqrt(dim)))).floor_().clamp_(-2.0, 1.0)
    odd = 2 * codes + 1
    scale = (peak * length / by_halves(odd.square()).sqrt_()).mul_(2.0).half()
    good = finite & scale.isfinite()
    scale = torch.where(real, torch.where(good, scale, torch.nan), 0.0)
    codes = torch.where(real & good & (peak > 0), codes.add_(2.0), 0.0).to(torch.uint8)
    return codes, scale, mean.permute(1, 2, 0)
