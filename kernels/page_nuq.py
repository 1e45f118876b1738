"""Pages of normal-float codes, keys without their positions, one row of a page kept as it is.

    K   u = x turned back to the page's first token (page_turn.py)
        kept = the token of the largest |u - mean u|^2 / |u|^2: its x is stored in 16 bits
        m = fp16(mean of u over the other tokens), or 0        z = u - m
    V   z = x; the row of K's kept token is stored in 16 bits
    y = z S / sqrt(D) (D a power of two), else z
    scale: the s that leaves the least |y - s level(y / s)|^2, by rounds, as fp16(64 s)
    code = the nearest of 16 or 8 levels to y / s
    z' = (level(code) S) * (s / sqrt(D))     x' = z' + m turned on again; of the kept token x

x       [T, H, D]       fp32 | bf16 | fp16; a row is (token, head)
codes   [U, H, P, B]    uint8. Of 4 bits, B = D/2: dimension d in the low nibble, d + D/2 in the
                        high one; the highest bit of a code is its sign, the others say which
                        magnitude. Of 3 bits, B = D/4 + D/8: byte j of the magnitudes has
                        dimensions j + i D/4 in bits 2i and 2i + 1, byte j of the signs behind them
                        j + i D/8 in bit i
scale   [U, H, P]       fp16
k_mean  [U, H, D]       fp16
k_kept  [U, H, 8]       uint8: the kept token's slot, which of page_turn.BASES, and six zeros, so
                        that all of a page is whole words
row     [U, H, D]       the 16-bit dtype of x; bf16 of fp32
Bits    4 + 16 / D (scale) + 16 / P (kept row), and of K 16 / P + 64 / PD: 4.31 at D 128, P 128,
        4.44 at D 64; one less with 8 levels.

The levels are those of least error for a normal distribution (Lloyd and Max), which rows are nearly
of once they are rotated; as whole numbers up to 127, so that their rotation is exact in any order
and 8-bit tensor cores could take them. A row has one side value where int4's groups of 64 have two,
and non-uniform levels win back more than that.

The kept row is what KVQuant's outliers and its sink are to a page: one token in 128 in 16 bits. An
attention sink is unlike its page's mean and small beside it, so it is what the ratio finds; so is a
row of zeros. m is 0 for a page and head in which it would make some other token's energy more than
8 times as large (a second sink).

A row with a value that is not finite, or beyond what fp16 can scale, comes back as nan and takes no
part in the mean. Decoding gives the same bits on every device.

Source KVQuant, https://arxiv.org/abs/2401.18079, sections 3.2 to 3.5 (keys before their positions,
       non-uniform levels, outliers and sinks kept); its scale per channel with 1 % of outliers by
       element was measured against this, docs/codecs.md. Lloyd, https://doi.org/10.1109/TIT.1982.
       1056489. QuaRot, https://arxiv.org/abs/2404.00456 (rotation).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ringspan.kernels.merge import FLOATS
from ringspan.kernels.page_columns import (
    butterflies,
    from_columns,
    rotate,
    rotates,
    stretches,
    to_columns,
)
from ringspan.kernels.page_turn import added, find_base, turn, turn_back

ROUNDS = 3
"""Of the fit, behind the guess from the row's size: 0.5 dB more, half of it by the first."""
UNIT = 64.0
"""The stored scale is this times s, so that small rows stay clear of fp16's subnormal numbers."""
WIDENED = 8.0
KEPT_BYTES = 8


class Levels(NamedTuple):
    """A kind of code: `bits`, of which the highest is the sign."""

    bits: int
    magnitudes: tuple[int, ...]
    deviation: float
    """Standard deviation of the normal distribution that the magnitudes are best for."""

    @property
    def edges(self) -> tuple[float, ...]:
        """Between one magnitude and the next."""
        pairs = zip(self.magnitudes, self.magnitudes[1:], strict=False)
        return tuple((low + high) / 2 for low, high in pairs)


NUQ4 = Levels(4, (6, 18, 31, 44, 58, 75, 96, 127), 46.476)
NUQ3 = Levels(3, (14, 45, 79, 127), 59.015)


def row_bytes(levels: Levels, head_dim: int) -> int:
    return head_dim * levels.bits // 8


def shapes(
    levels: Levels, num_kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape of one page and dtype of each tensor. dtype: of K and V.

    Raises ValueError where codes do not fill bytes.
    """
    whole = 2 if levels.bits == 4 else 8
    if head_dim % whole:
        raise ValueError(
            f"head_dim {head_dim}: codes of {levels.bits} bits fill bytes {whole} at a time, "
            "expected a multiple of that; take int8 or raw"
        )
    codes = (num_kv_heads, page_tokens, row_bytes(levels, head_dim))
    scale, row = (num_kv_heads, page_tokens), (num_kv_heads, head_dim)
    kept = torch.float16 if dtype == torch.float16 else torch.bfloat16
    return (
        ("k_codes", codes, torch.uint8),
        ("k_scale", scale, torch.float16),
        ("k_mean", row, torch.float16),
        ("k_kept", (num_kv_heads, KEPT_BYTES), torch.uint8),
        ("k_row", row, kept),
        ("v_codes", codes, torch.uint8),
        ("v_scale", scale, torch.float16),
        ("v_row", row, kept),
    )


def check(
    levels: Levels, k: torch.Tensor, v: torch.Tensor, tensors: tuple[torch.Tensor, ...]
) -> int:
    """P; raises ValueError unless all fit together. k, v [T, H, D]; tensors [U, ...]."""
    if k.dim() != 3 or v.shape != k.shape or v.dtype != k.dtype or k.dtype not in FLOATS:
        raise ValueError(
            f"k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype}, expected both "
            "[T, H, D] and both fp32, bf16 or fp16"
        )
    if k.numel() and (k.stride(2) != 1 or v.stride(2) != 1):
        raise ValueError(
            f"k and v have strides {k.stride()} and {v.stride()}, expected a contiguous last axis"
        )
    page_tokens = tensors[0].shape[2] if tensors and tensors[0].dim() == 4 else 0
    wanted = shapes(levels, k.shape[1], k.shape[2], page_tokens, k.dtype)
    if len(tensors) != len(wanted):
        raise ValueError(f"pages of this kind have {len(wanted)} tensors, found {len(tensors)}")
    units = tensors[0].shape[0]
    for tensor, (name, shape, dtype) in zip(tensors, wanted, strict=True):
        if tuple(tensor.shape) != (units, *shape) or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {(units, *shape)} "
                f"{dtype} for pages of k and v {tuple(k.shape)}"
            )
        if not tensor.is_contiguous() or tensor.device != k.device:
            raise ValueError(
                f"{name} on {tensor.device} has strides {tensor.stride()}, expected it contiguous "
                f"and on {k.device} as k and v"
            )
    if page_tokens and -(-k.shape[0] // page_tokens) > units:
        raise ValueError(f"{k.shape[0]} tokens in {units} pages of {page_tokens}: pass them all")
    return page_tokens


def encode(
    levels: Levels, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]
) -> None:
    """By torch: k, v [T, H, D] of consecutive pages, only the last of them short -> `into`."""
    k_codes, k_scale, k_mean, k_kept, k_row, v_codes, v_scale, v_row = into
    page_tokens = k_codes.shape[2]
    for tokens, pages in stretches(k, page_tokens):
        num_tokens = k[tokens].shape[0]
        x = to_columns(k[tokens], page_tokens)
        finite = _finite(x)
        counted = finite & _real(x, num_tokens)
        clean = torch.where(counted, x, 0.0)
        base = find_base(clean, counted)
        u = turn_back(clean, base)
        kept = _strangest(u, counted)  # [U, H]
        k_kept[pages] = 0
        k_kept[pages, :, 0], k_kept[pages, :, 1] = kept.byte(), base.byte()
        k_row[pages] = _row(x, kept)
        counted &= torch.arange(page_tokens, device=x.device) != kept[..., None]
        mean = _mean(u, counted)  # [U, H, D] fp16
        z = u - mean.float().permute(2, 0, 1)[..., None]
        widens = (added(z * z, 0) > WIDENED * added(u * u, 0)) & counted
        leave = widens.any(2, keepdim=True)  # [U, H, 1]
        k_mean[pages] = torch.where(leave, 0.0, mean)
        codes, k_scale[pages] = _codes(levels, torch.where(leave, u, z), finite, num_tokens)
        k_codes[pages] = pack(levels, codes)
    for tokens, pages in stretches(v, page_tokens):
        x = to_columns(v[tokens], page_tokens)
        finite = _finite(x)
        v_row[pages] = _row(x, k_kept[pages][..., 0].long())
        z = torch.where(finite, x, 0.0)
        codes, v_scale[pages] = _codes(levels, z, finite, v[tokens].shape[0])
        v_codes[pages] = pack(levels, codes)


def decode(
    levels: Levels, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor
) -> None:
    """By torch: the first T tokens of `tensors` -> k, v [T, H, D], in place."""
    k_codes, k_scale, k_mean, k_kept, k_row, v_codes, v_scale, v_row = tensors
    for tokens, pages in stretches(k, k_codes.shape[2]):
        z = _values(levels, k_codes[pages], k_scale[pages], k.shape[2])
        z += k_mean[pages].float().permute(2, 0, 1)[..., None]
        x = turn(z, k_kept[pages][..., 1].long())
        from_columns(_with_row(x, k_kept[pages], k_row[pages]), k[tokens])
    for tokens, pages in stretches(v, k_codes.shape[2]):
        x = _values(levels, v_codes[pages], v_scale[pages], v.shape[2])
        from_columns(_with_row(x, k_kept[pages], v_row[pages]), v[tokens])


def pack(levels: Levels, codes: torch.Tensor) -> torch.Tensor:
    """codes [D, U, H, P] uint8 -> bytes [U, H, P, B]."""
    if levels.bits == 4:
        packed = _folded(codes, 4)
    else:
        magnitudes = _folded(_folded(codes & 3, 4), 2)
        packed = torch.cat((magnitudes, _folded(_folded(_folded(codes >> 2, 4), 2), 1)))
    return packed.permute(1, 2, 3, 0)


def unpack(levels: Levels, packed: torch.Tensor, dim: int) -> torch.Tensor:
    """bytes [U, H, P, B] -> codes [D, U, H, P] uint8."""
    packed = packed.permute(3, 0, 1, 2)
    if levels.bits == 4:
        return torch.cat((packed & 15, packed >> 4))
    magnitudes, signs = packed[: dim // 4], packed[dim // 4 :]
    for shift in (2, 4):
        magnitudes = torch.cat((magnitudes, magnitudes >> shift))
    for shift in (1, 2, 4):
        signs = torch.cat((signs, signs >> shift))
    return magnitudes & 3 | (signs & 1) << 2


def _folded(x: torch.Tensor, shift: int) -> torch.Tensor:
    low, high = x.chunk(2)
    return low | high << shift


def _finite(x: torch.Tensor) -> torch.Tensor:
    """[U, H, P] of columns x: whether a row is finite."""
    return x.amax(0).isfinite() & x.amin(0).isfinite()


def _real(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[U, 1, P]: whether a page's place holds a token."""
    _, units, _, page_tokens = x.shape
    place = torch.arange(units * page_tokens, device=x.device)
    return (place < num_tokens).view(units, 1, page_tokens)


def _mean(u: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[U, H, D] fp16 over the tokens that count; 0 where fp16 cannot hold it."""
    count = counted.sum(2).clamp_(min=1).float()
    mean = (added(torch.where(counted, u, 0.0), 3) / count).permute(1, 2, 0).half()
    return torch.where(mean.isfinite(), mean, 0.0)


def _strangest(u: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[U, H] int64: the first of the tokens least like the mean, for their size."""
    mean = _mean(u, counted).float().permute(2, 0, 1)[..., None]
    size, away = added(u * u, 0), added((u - mean).square_(), 0)
    strange = torch.where(size > 0, away / size, torch.where(away > 0, torch.inf, 0.0))
    # inf / inf, of a row that no scale can hold
    strange = torch.where(strange >= 0, strange, torch.inf)
    strange = torch.where(counted, strange, -1.0)
    slot = torch.arange(u.shape[3], device=u.device)
    first = strange == strange.amax(2, keepdim=True)
    return torch.where(first, slot, u.shape[3]).amin(2)


def _row(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[U, H, D]: of each page and head the kept token's row of columns x."""
    at = kept[None, ..., None].expand(x.shape[0], -1, -1, 1)
    return x.gather(3, at)[..., 0].permute(1, 2, 0)


def _with_row(x: torch.Tensor, kept: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    slot = torch.arange(x.shape[3], device=x.device)
    here = slot == kept[..., :1]  # [U, H, P]
    return torch.where(here, row.float().permute(2, 0, 1)[..., None], x).contiguous()


def _codes(
    levels: Levels, z: torch.Tensor, finite: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [D, U, H, P] fp32, may be overwritten -> codes alike, uint8, and scale [U, H, P] fp16."""
    dim = z.shape[0]
    z = z.contiguous()
    y = rotate(z) if rotates(dim) else z
    size = y.abs()
    edges = torch.tensor(levels.edges, device=z.device)
    magnitudes = torch.tensor(levels.magnitudes, dtype=torch.float32, device=z.device)
    step = (added(size * size, 0) * (1.0 / dim)).sqrt_() * (1.0 / levels.deviation)
    for _ in range(ROUNDS):
        level = magnitudes[torch.bucketize(size * _inverse(step), edges)]
        step = added(size * level, 0) / added(level * level, 0)
    scale = (step * UNIT).half()
    real = _real(z, num_tokens)
    scale = torch.where(finite & scale.isfinite(), scale, torch.nan)
    scale = torch.where(real, scale, 0.0)
    inverse = _inverse(scale.float() * (1.0 / UNIT))
    codes = torch.bucketize(size * inverse, edges).to(torch.uint8)
    codes |= ((y < 0) & (inverse > 0)).to(torch.uint8) << (levels.bits - 1)
    # what inf * 0 is as a code is the machine's business: make it 0
    return torch.where(inverse > 0, codes, 0), scale


def _inverse(step: torch.Tensor) -> torch.Tensor:
    """1 / step; 0 of what is not above 0, or nan."""
    return torch.where(step > 0, torch.ones_like(step) / step, 0.0)


def _values(levels: Levels, packed: torch.Tensor, scale: torch.Tensor, dim: int) -> torch.Tensor:
    """bytes [U, H, P, B] and scale [U, H, P] -> z' [D, U, H, P] fp32."""
    sizes = torch.tensor(levels.magnitudes, dtype=torch.float32, device=packed.device)
    columns = torch.cat((sizes, -sizes))[unpack(levels, packed, dim).long()].contiguous()
    step = scale.float() * (1.0 / UNIT)
    if not rotates(dim):
        return columns * step
    return butterflies(columns, 1, dim) * (step * (1 / math.sqrt(dim)))


def encode_pages(
    levels: Levels, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]
) -> None:
    """k, v [T, H, D] of consecutive pages, only the last of them short -> `into`, in place.

    k, v fp32 | bf16 | fp16, the last axis contiguous; `into` [ceil(T / P), ...] as `shapes` says.
    Raises ValueError for anything else; nothing for values that are not finite: they come back nan.
    """
    page_tokens = check(levels, k, v, into)
    if not k.numel():
        return
    # tensor cores would round fp32: the torch code gives the bits of the CPU on any device
    if k.dtype != torch.float32 and _has_kernel(k, page_tokens):
        from ringspan.kernels import page_nuq_triton

        page_nuq_triton.encode(levels, k, v, into)
    else:
        encode(levels, k, v, into)


def decode_pages(
    levels: Levels, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor
) -> None:
    """The first T tokens of `tensors` [U, ...] -> k, v [T, H, D], written in place; T <= U * P.
    Raises ValueError as `encode_pages`."""
    page_tokens = check(levels, k, v, tensors)
    if not k.numel():
        return
    tensors = tuple(tensor[: -(-k.shape[0] // page_tokens)] for tensor in tensors)
    if _has_kernel(k, page_tokens):
        from ringspan.kernels import page_nuq_triton

        page_nuq_triton.decode(levels, tensors, k, v)
    else:
        decode(levels, tensors, k, v)


def _has_kernel(k: torch.Tensor, page_tokens: int) -> bool:
    """Products of tensor cores are 16 values deep or more, tiles have powers of two."""
    dim = k.shape[2]
    return k.is_cuda and page_tokens in (32, 64, 128) and rotates(dim) and 32 <= dim <= 256
