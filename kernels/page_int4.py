"""Pages of 4-bit codes in groups of 64 dimensions, by torch: the definition, and what a CPU runs.

    y = x S / sqrt(D) (D a power of two), else x
    m = fp16(mean of y over the page's tokens), or 0        K only; V has none
    zero = fp16(min z)    scale = fp16((max z - min z) / 15)    over a group of z = y - m
    codes = round((z - zero) * (1 / scale)), clamped to 0 .. 15     half to even
    y' = codes * scale + zero + m          x' = y' S / sqrt(D)

x        [T, H, D]       fp32 | bf16 | fp16; a row is (token, head)
k_codes  [U, H, P, D/2]  uint8, dimension d in the low nibble, d + D/2 in the high one
v_codes  [U, H, D, P/2]  uint8, token n in the low nibble, n + P/2 in the high one
scale    [U, H, G, P]    fp16, zero alike; G = D / 64 groups of 64, or one of D if 64 does not
                         divide D
k_mean   [U, H, D]       fp16
Bits   4 + 32 / 64 a value, and of K 16 / P: 4.56 at D 128, P 128.
Source https://arxiv.org/abs/2404.00456, section 4 (rotated, asymmetric, in groups);
       https://arxiv.org/abs/2402.02750, section 3 (K's outliers lie in channels).

m is 0 for a page and head in which it would more than double some token's range of values (the
largest max - min of its groups): an attention sink is unlike its page's mean, so that subtracting
it coarsens the steps of the one token that has most of the weight.

Scale, zero and mean are rounded before they are used, so that coding uses what is stored. A
constant group has scale 0 and codes 0. A row with a value that is not finite takes no part in the
mean; it, a group beyond fp16's range, and a mean beyond it come back as nan (scale nan, zero 0,
codes 0; or mean nan).

Decoding rotates whole numbers first (codes S within a group, exact in any order), then scales them,
adds group to group in the order of the butterflies, and m S last, which is exact in fp64: the same
bits on every device.
"""

from __future__ import annotations

import math

import torch

from ringspan.kernels.page_columns import (
    butterflies,
    from_columns,
    rotate,
    rotates,
    stretches,
    to_columns,
)
from ringspan.kernels.rotate import signs

GROUP = 64
LARGEST = 15.0


def num_groups(dim: int) -> int:
    return dim // GROUP if dim % GROUP == 0 else 1


def shapes(
    num_kv_heads: int, head_dim: int, page_tokens: int
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Raises ValueError for an odd head_dim or page: two codes make a byte."""
    if head_dim % 2 or page_tokens % 2:
        raise ValueError(
            f"head_dim {head_dim} and page_tokens {page_tokens}: int4 pages pack two codes into a "
            "byte, expected both even; take int8 or raw"
        )
    side = (num_kv_heads, num_groups(head_dim), page_tokens)
    return (
        ("k_codes", (num_kv_heads, page_tokens, head_dim // 2), torch.uint8),
        ("k_scale", side, torch.float16),
        ("k_zero", side, torch.float16),
        ("k_mean", (num_kv_heads, head_dim), torch.float16),
        ("v_codes", (num_kv_heads, head_dim, page_tokens // 2), torch.uint8),
        ("v_scale", side, torch.float16),
        ("v_zero", side, torch.float16),
    )


def encode(k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As pages.encode_pages, whose checks have passed."""
    encode_k(k, into[:4])
    v_codes, v_scale, v_zero = into[4:]
    page_tokens = v_scale.shape[3]
    for tokens, pages in stretches(v, page_tokens):
        z, finite = _rotated(v[tokens], page_tokens)
        codes, v_scale[pages], v_zero[pages] = _codes(z, finite, v[tokens].shape[0])
        low, high = codes.chunk(2, 3)
        v_codes[pages] = (low | high << 4).permute(1, 2, 0, 3)


def encode_k(k: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """K alone -> its four tensors."""
    k_codes, k_scale, k_zero, k_mean = into
    page_tokens, half = k_codes.shape[2], k_codes.shape[3]
    for tokens, pages in stretches(k, page_tokens):
        y, finite = _rotated(k[tokens], page_tokens)
        counted = finite & _real(finite, k[tokens].shape[0])
        mean = _mean(y, counted)
        # a mean beyond fp16 is there to be seen, not to be subtracted
        z = y - torch.where(mean.isfinite(), mean, 0.0).permute(2, 0, 1)[..., None]
        widens = ((_range(z) > 2 * _range(y)) & counted).any(2, keepdim=True)  # [U, H, 1]
        k_mean[pages] = torch.where(widens, 0.0, mean)
        z = torch.where(widens, y, z)
        codes, k_scale[pages], k_zero[pages] = _codes(z, finite, k[tokens].shape[0])
        packed = codes[:half] | codes[half:] << 4  # [D/2, U, H, P]
        k_codes[pages] = packed.permute(1, 2, 3, 0)


def decode(tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
    """As pages.decode_pages, whose checks have passed."""
    decode_k(tensors[:4], k)
    v_codes, v_scale, v_zero = tensors[4:]
    page_tokens = v_scale.shape[3]
    for tokens, pages in stretches(v, page_tokens):
        packed = v_codes[pages].permute(2, 0, 1, 3)  # [D, U, H, P/2]
        columns = torch.empty(*packed.shape[:3], page_tokens, device=v.device)
        columns[..., : page_tokens // 2] = packed & 15
        columns[..., page_tokens // 2 :] = packed >> 4
        from_columns(_values(columns, v_scale[pages], v_zero[pages]), v[tokens])


def decode_k(tensors: tuple[torch.Tensor, ...], k: torch.Tensor) -> None:
    """K alone, from its four tensors."""
    k_codes, k_scale, k_zero, k_mean = tensors
    page_tokens, dim = k_codes.shape[2], k.shape[2]
    for tokens, pages in stretches(k, page_tokens):
        packed = k_codes[pages].permute(3, 0, 1, 2).contiguous()  # [D/2, U, H, P]
        columns = torch.empty(dim, *packed.shape[1:], device=k.device)
        columns[: dim // 2] = packed & 15
        columns[dim // 2 :] = packed >> 4
        columns = _values(columns, k_scale[pages], k_zero[pages])
        columns += rotated_mean(k_mean[pages]).permute(2, 0, 1)[..., None]
        from_columns(columns, k[tokens])


def rotated_mean(mean: torch.Tensor) -> torch.Tensor:
    """mean [..., D] fp16 -> m S / sqrt(D) (or m) fp32: exact in fp64 in any order, then rounded."""
    dim = mean.shape[-1]
    if not rotates(dim):
        return mean.float()
    total = mean.double() @ signs(dim, mean.device).double()
    return total.float().mul_(1 / math.sqrt(dim))


def _rotated(x: torch.Tensor, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H, D] -> y [D, U, H, P] fp32 and finite [U, H, P]; rows that are not finite are 0."""
    y = to_columns(x, page_tokens)
    if rotates(y.shape[0]):
        y = rotate(y)
    finite = y.amax(0).isfinite() & y.amin(0).isfinite()
    return torch.where(finite, y, 0.0), finite


def _mean(y: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[U, H, D] fp16 over a page's tokens that count (y of others is 0), added by halves."""
    total, length = y, y.shape[3]
    while length > 1:
        half = (length + 1) // 2
        folded = total[..., :half].clone()
        folded[..., : length - half] += total[..., half:length]
        total, length = folded, half
    count = counted.sum(2).clamp_(min=1).float()  # [U, H]
    mean = (total[..., 0] / count).permute(1, 2, 0).half()
    return torch.where(mean.isfinite(), mean, torch.nan)


def _range(y: torch.Tensor) -> torch.Tensor:
    """[U, H, P]: the largest max - min of a token's groups."""
    groups = y.view(num_groups(y.shape[0]), -1, *y.shape[1:])
    return (groups.amax(1) - groups.amin(1)).amax(0)


def _codes(
    z: torch.Tensor, finite: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z [D, U, H, P] fp32, overwritten -> codes [D, U, H, P] uint8, scale and zero [U, H, G, P]."""
    groups = z.view(num_groups(z.shape[0]), -1, *z.shape[1:])  # [G, 64, U, H, P]
    low, high = groups.amin(1), groups.amax(1)  # [G, U, H, P]
    zero = low.half()
    spread = high.sub_(low)
    # tensor by tensor: see quantize_ref
    scale = (spread / torch.full_like(spread, LARGEST)).half()
    real = _real(finite, num_tokens)
    good = finite & scale.isfinite() & zero.isfinite()
    scale = torch.where(real, torch.where(good, scale, torch.nan), 0.0)
    zero = torch.where(real & good, zero, 0.0)
    step = scale.float()
    inverse = torch.where(step > 0, torch.ones_like(step) / step, 0.0)  # of nan: 0
    groups.sub_(zero.float()[:, None]).mul_(inverse[:, None]).clamp_(0.0, LARGEST).round_()
    return z.to(torch.uint8), scale.permute(1, 2, 0, 3), zero.permute(1, 2, 0, 3)


def _values(columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Codes [D, U, H, P] as fp32, overwritten -> x' but for the mean."""
    dim = columns.shape[0]
    count = num_groups(dim)
    step = scale.permute(2, 0, 1, 3).float()  # [G, U, H, P]
    base = zero.permute(2, 0, 1, 3).float()
    if not rotates(dim):
        groups = columns.view(count, -1, *columns.shape[1:])
        groups.mul_(step[:, None]).add_(base[:, None])
        return columns
    length = dim // count
    columns = butterflies(columns, 1, length)
    groups = columns.view(count, length, *columns.shape[1:])
    groups.mul_(step[:, None])
    groups[:, 0] += base * length  # a constant row rotates into its first dimension alone
    return butterflies(columns, length, dim).mul_(1 / math.sqrt(dim))


def _real(finite: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[U, 1, P]: whether a page's place holds a token."""
    units, _, page_tokens = finite.shape
    place = torch.arange(units * page_tokens, device=finite.device)
    return (place < num_tokens).view(units, 1, page_tokens)
