"""Pages of K in 4 bits and V in 2, by torch: the definition, and what a CPU runs.

K is int4's, tensor by tensor (page_int4.py). V has a scale on both axes of its page:

    y = x S / sqrt(D) (D a power of two), else x
    n = y / rms of its row                                     a row is (token, head)
    dims = round(255 g / max g), at least 1; g: rms of n down each dimension of the page
    u = n / dims;  c = floor(u / (STEP rms of its row)) in -2 .. 1          codes = c + 2
    w = (2 codes - 3) dims          whole numbers, -765 .. 765
    scale = fp16(512 |y| / |w|), the lengths of a row
    y' = w * scale / 512            x' = y' S / sqrt(D)

x        [T, H, D]       fp32 | bf16 | fp16
k_codes  [U, H, P, D/2]  uint8, k_scale and k_zero [U, H, G, P] fp16, k_mean [U, H, D] fp16
v_codes  [U, H, D/2, P/2]  uint8: token n of dimension d in the lowest two bits, then n + P/2 of d,
                         n of d + D/2, n + P/2 of d + D/2
v_scale  [U, H, P]       fp16
v_dims   [U, H, D]       uint8
Bits   K as int4; V 2 + 16 / D + 8 / P. Both at D 128, P 128: (4.625 + 2.1875) / 2 = 3.41.
Source KVarN (Hadamard, then scales of both axes of a tile, K in 4 bits and V in 2, without
       calibration): its pull request to vLLM, https://github.com/vllm-project/vllm/pull/46613; the
       scaling is R. Sinkhorn, P. Knopp, Pacific J. Math. 21 (1967), here one round.

The levels of 2 bits are odd halves of a step of one sigma, near the best for Gaussian values (9.3
dB), which is what a rotation leaves; least and largest in their place, as int4 has them, give 7.1
dB on real values. A scale keeps a row's length: attention averages values, and the least squares,
which shortens every row, costs more there than its noise gains.

A row of zeros has scale 0. A row that is not finite, or whose scale fp16 cannot hold, comes back as
nan (scale nan), and takes no part in the page's dims. Its codes are 0, as those of missing tokens.
Decoding rotates w first, which is exact in any order: the same bits on every device.
"""

from __future__ import annotations

import math

import torch

from ringspan.kernels import page_int4
from ringspan.kernels.page_columns import (
    butterflies,
    from_columns,
    rotate,
    rotates,
    stretches,
    to_columns,
)
from ringspan.kernels.quantize import TINY

STEP = 0.9957
"""Of two bits, in sigmas of a Gaussian: the uniform quantiser of least error (J. Max, IRE
Transactions on Information Theory 6 (1960), table 1)."""
LARGEST_DIM = 255.0
UNIT = 1 / 512
"""Of `scale`, so that it is of the size of a row's values."""


def v_shapes(
    num_kv_heads: int, head_dim: int, page_tokens: int
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    return (
        ("v_codes", (num_kv_heads, head_dim // 2, page_tokens // 2), torch.uint8),
        ("v_scale", (num_kv_heads, page_tokens), torch.float16),
        ("v_dims", (num_kv_heads, head_dim), torch.uint8),
    )


def shapes(
    num_kv_heads: int, head_dim: int, page_tokens: int
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Raises ValueError for an odd head_dim or page: two or four codes make a byte."""
    if head_dim % 2 or page_tokens % 2:
        raise ValueError(
            f"head_dim {head_dim} and page_tokens {page_tokens}: k4v2 pages pack two codes of K "
            "and four of V into a byte, expected both even; take int8 or raw"
        )
    return (
        *page_int4.shapes(num_kv_heads, head_dim, page_tokens)[:4],
        *v_shapes(num_kv_heads, head_dim, page_tokens),
    )


def encode(k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """As pages.encode_pages, whose checks have passed."""
    page_int4.encode_k(k, into[:4])
    encode_v(v, into[4:])


def encode_v(v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
    """V alone -> its three tensors."""
    v_codes, v_scale, v_dims = into
    page_tokens = v_scale.shape[2]
    for tokens, pages in stretches(v, page_tokens):
        columns = to_columns(v[tokens], page_tokens)
        if rotates(columns.shape[0]):
            columns = rotate(columns)
        codes, v_scale[pages], v_dims[pages] = _encode(columns, v[tokens].shape[0])
        low, high = codes.chunk(2, 3)
        low, high = (low | high << 2).chunk(2, 0)
        v_codes[pages] = (low | high << 4).permute(1, 2, 0, 3)


def decode(tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
    """As pages.decode_pages, whose checks have passed."""
    page_int4.decode_k(tensors[:4], k)
    decode_v(tensors[4:], v)


def decode_v(tensors: tuple[torch.Tensor, ...], v: torch.Tensor) -> None:
    """V alone, from its three tensors."""
    v_codes, v_scale, v_dims = tensors
    dim = v.shape[2]
    norm = UNIT / math.sqrt(dim) if rotates(dim) else UNIT
    for tokens, pages in stretches(v, v_scale.shape[2]):
        columns = weights(v_codes[pages], v_dims[pages]).permute(2, 0, 1, 3).contiguous()
        if rotates(dim):
            columns = butterflies(columns, 1, dim)
        from_columns(columns.mul_(v_scale[pages].float()).mul_(norm), v[tokens])


def weights(codes: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    """codes [..., D/2, P/2] uint8, dims [..., D] uint8 -> w [..., D, P] fp32, whole numbers."""
    levels = torch.cat((codes & 15, codes >> 4), -2)
    levels = torch.cat((levels & 3, levels >> 2), -1).float()
    return levels.mul_(2.0).sub_(3.0).mul_(dims.float()[..., None])


def _encode(y: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [D, U, H, P] fp32, overwritten -> codes [D, U, H, P] uint8, scale [U, H, P], dims
    [U, H, D]. Sums are added by halves, element by element: the same bits on every device."""
    dim, units, _, page_tokens = y.shape
    peak = torch.maximum(y.amax(0), y.amin(0).neg_())  # of nan it is nan
    peak = torch.where(peak < TINY, 0.0, peak)
    finite = peak.isfinite()
    y = torch.where(finite, y, 0.0)
    y.mul_(inverse(torch.where(finite, peak, 0.0)))  # at most 1: no square overflows
    length = _squares(y).sqrt_()
    y.mul_(inverse(length * (1 / math.sqrt(dim))))
    spread = by_halves(y.square().movedim(3, 0)).sqrt_()  # [D, U, H]
    most = spread.amax(0)
    dims = spread.mul_(inverse(most)).mul_(LARGEST_DIM).round_().clamp_(min=1.0)
    y.mul_((torch.ones_like(dims) / dims)[..., None])
    step = _squares(y).sqrt_().mul_(STEP / math.sqrt(dim))
    codes = y.mul_(inverse(step)).floor_().clamp_(-2.0, 1.0)
    w = (2 * codes + 1).mul_(dims[..., None])
    scale = (peak * length / _squares(w).sqrt_()).mul_(1 / UNIT).half()
    place = torch.arange(units * page_tokens, device=y.device).view(units, 1, page_tokens)
    good = finite & scale.isfinite()
    held = good & (place < num_tokens)
    scale = torch.where(place < num_tokens, torch.where(good, scale, torch.nan), 0.0)
    codes = torch.where(held & (peak > 0), codes.add_(2.0), 0.0).to(torch.uint8)
    return codes, scale, dims.permute(1, 2, 0).to(torch.uint8)


def inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 of 0."""
    return torch.where(x > 0, torch.ones_like(x) / x, 0.0)


def _squares(y: torch.Tensor) -> torch.Tensor:
    """Sum of y^2 down the first axis."""
    return by_halves(y.square())


def by_halves(total: torch.Tensor) -> torch.Tensor:
    """Sum down the first axis, the second half added to the first until one is left."""
    length = total.shape[0]
    while length > 1:
        half = (length + 1) // 2
        folded = total[:half].clone()
        folded[: length - half] += total[half:length]
        total, length = folded, half
    return total[0]
