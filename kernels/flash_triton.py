"""The Triton kernel of flash.py: online softmax over blocks of keys.

One program takes BLOCK_M rows of one q head over one range of keys (a split). Blocks of keys that
no row sees are skipped; those that all rows see go through a loop without a mask:

    skipped | masked (window's edge) | seen by all rows | masked (diagonal, ragged end) | skipped

Exponents are in base 2 (exp2 is one instruction): scale is folded with log2(e); lse leaves in base
e. Few rows over many keys are split along the keys, and the parts merged. A carried part is loaded
as what the loop would have reached after its keys, a sink as a first key with value 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ringspan.kernels.flash import merged
from ringspan.kernels.merge import merge_parts
from ringspan.types import Part


class Config(NamedTuple):
    """Tile and launch parameters of one compiled variant."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, block_d: int, itemsize: int) -> int:
        """Shared memory for the tile of q and the staged tiles of k and v."""
        return (self.block_m + 2 * self.num_stages * self.block_n) * block_d * itemsize


CONFIGS: dict[int, tuple[Config, ...]] = {
    64: (Config(128, 128, 8, 3), Config(128, 64, 4, 3), Config(64, 64, 4, 2)),
    128: (Config(128, 128, 8, 2), Config(128, 64, 4, 2), Config(64, 32, 4, 2)),
    256: (Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)),
}
"""For 16-bit inputs, by padded head_dim (smaller ones take 64's), fastest first on an H100; the
first that fits the GPU's shared memory is taken."""

FP32_CONFIGS = (Config(32, 32, 4, 2), Config(32, 16, 4, 1))
"""fp32 products run without the tensor cores: exact, slow, small tiles."""

INTERPRETER_CONFIG = Config(32, 32, 4, 1)

_SPLIT_KEYS = 512
"""Keys of the shortest split; a multiple of every BLOCK_N."""
_MAX_SPLITS = 128


@triton.jit
def _flash_kernel(
    q,
    k,
    v,
    out,
    lse,
    sinks,
    q_t,
    q_h,
    k_s,
    k_h,
    v_s,
    v_h,
    out_p,
    out_t,
    out_h,
    lse_p,
    lse_t,
    lse_h,
    rows,
    keys,
    offset,
    window,
    split_keys,
    scale,
    softcap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTO: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest go first
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    q += head * q_h
    k += head // GROUP * k_h
    v += head // GROUP * v_h

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dim < D)[None, :]
    q_tile = tl.load(q + row.to(tl.int64)[:, None] * q_t + dim[None, :], mask=inside, other=0.0)

    first = split * split_keys
    stop = tl.minimum(first + split_keys, keys)
    last_row = tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1
    all_stop = stop  # keys in [all_first, all_stop) are seen by all rows
    if CAUSAL:
        stop = tl.minimum(stop, last_row + offset + 1)
        all_stop = tl.minimum(all_stop, tile * BLOCK_M + offset + 1)
    all_first = first
    if WINDOWED:
        oldest = tl.maximum(tile * BLOCK_M + offset - window + 1, first)
        all_first = tl.maximum(last_row + offset - window + 1, oldest)
        first = oldest // BLOCK_N * BLOCK_N
        all_first = tl.minimum(
            tl.cdiv(all_first, BLOCK_N), tl.cdiv(tl.maximum(stop, first), BLOCK_N)
        )
        all_first = all_first * BLOCK_N
    all_stop = tl.maximum(tl.maximum(all_stop, 0) // BLOCK_N * BLOCK_N, all_first)

    out_tile = out + split.to(tl.int64) * out_p + head * out_h
    out_tile += row.to(tl.int64)[:, None] * out_t + dim[None, :]
    lse_row = lse + split.to(tl.int64) * lse_p + head * lse_h + row.to(tl.int64) * lse_t
    to_peak = 1.4426950408889634 if SOFTCAP else 1.4426950408889634 / scale
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if INTO:
        peak = tl.load(lse_row, mask=row < rows, other=-float("inf"))
        acc = tl.load(out_tile, mask=inside, other=0.0)
        total = tl.where(peak == -float("inf"), 0.0, 1.0)
        if SINKS:
            sink = tl.load(sinks + head)
            pivot = tl.maximum(peak, sink)
            shrink = tl.exp2((peak - pivot) * 1.4426950408889634)
            total = shrink + tl.exp2((sink - pivot) * 1.4426950408889634)
            peak = pivot
            acc = acc * shrink[:, None]
        peak *= to_peak
    elif SINKS:
        peak = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head) * to_peak
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    if WINDOWED:
        peak, total, acc = _over_keys(
            q_tile, k, v, k_s, v_s, row, dim, peak, total, acc, first, all_first,
            keys, offset, window, scale, softcap,
            D, BLOCK_D, BLOCK_N, True, CAUSAL, WINDOWED, SOFTCAP, PRECISION,
        )  # fmt: skip
    peak, total, acc = _over_keys(
        q_tile, k, v, k_s, v_s, row, dim, peak, total, acc, all_first, all_stop,
        keys, offset, window, scale, softcap,
        D, BLOCK_D, BLOCK_N, False, CAUSAL, WINDOWED, SOFTCAP, PRECISION,
    )  # fmt: skip
    peak, total, acc = _over_keys(
        q_tile, k, v, k_s, v_s, row, dim, peak, total, acc, all_stop, stop,
        keys, offset, window, scale, softcap,
        D, BLOCK_D, BLOCK_N, True, CAUSAL, WINDOWED, SOFTCAP, PRECISION,
    )  # fmt: skip

    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    if not SOFTCAP:
        peak *= scale
    row_lse = tl.where(seen, (peak + tl.log2(divisor)) * 0.6931471805599453, -float("inf"))
    tl.store(out_tile, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse_row, row_lse, mask=row < rows)


@triton.jit
def _over_keys(
    q_tile,  # [BLOCK_M, BLOCK_D]
    k,
    v,
    k_s,
    v_s,
    row,  # [BLOCK_M]
    dim,  # [BLOCK_D]
    peak,  # [BLOCK_M] largest score so far: q k as it is, or what softcap made of it, base 2
    total,  # [BLOCK_M] sum of the weights
    acc,  # [BLOCK_M, BLOCK_D] fp32
    first,
    stop,
    keys,
    offset,
    window,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulates the blocks of keys that start in [first, stop)."""
    step = tl.arange(0, BLOCK_N)
    one = tl.full([], 1, tl.int64)
    for start in range(first, stop, BLOCK_N):
        # the block's start meets the stride in int64, what lies within the block in int32
        k_tile = k + one * start * k_s + (step[None, :] * k_s + dim[:, None])
        v_tile = v + one * start * v_s + (step[:, None] * v_s + dim[None, :])
        key = start + step
        if MASKED:
            k_block = tl.load(k_tile, mask=(key < keys)[None, :] & (dim < D)[:, None], other=0.0)
        elif D != BLOCK_D:
            k_block = tl.load(k_tile, mask=(dim < D)[:, None], other=0.0)
        else:
            k_block = tl.load(k_tile)  # [BLOCK_D, BLOCK_N]
        scores = tl.dot(q_tile, k_block, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (e^2x + 1); scale and softcap come prepared, see the launcher
            scores = softcap - 2 * softcap / (tl.exp2(scores * scale) + 1)
        if MASKED:
            seen = (key < keys)[None, :]
            ahead = row[:, None] + offset - key[None, :]
            if CAUSAL:
                seen = seen & (ahead >= 0)
            if WINDOWED:
                seen = seen & (ahead < window)
            scores = tl.where(seen, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        pivot = new_peak
        if MASKED:
            pivot = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing seen yet
        if SOFTCAP:
            weights = tl.exp2(scores - pivot[:, None])
            shrink = tl.exp2(peak - pivot)
        else:  # scale meets the score in the exponent: one multiply-add
            pivot = pivot * scale
            weights = tl.exp2(scores * scale - pivot[:, None])
            shrink = tl.exp2(peak * scale - pivot)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if MASKED:
            v_block = tl.load(v_tile, mask=(key < keys)[:, None] & (dim < D)[None, :], other=0.0)
        elif D != BLOCK_D:
            v_block = tl.load(v_tile, mask=(dim < D)[None, :], other=0.0)
        else:
            v_block = tl.load(v_tile)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(weights.to(v_block.dtype), v_block, acc, input_precision=PRECISION)
        peak = new_peak
    return peak, total, acc


def flash_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    offset: int,
    window: int | None,
    softcap: float,
    scale: float,
    into: Part | None = None,
    sinks: torch.Tensor | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> Part:
    """As flash.flash, for T, S >= 1, scale > 0; `config` and `splits` override the choice."""
    (rows, q_heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    group = q_heads // kv_heads
    full = not causal and window is None
    if full and group > 1 and rows * group <= 128:
        # few rows: the q heads of a kv head become rows, so that K and V are read once
        packed = q.unflatten(1, (kv_heads, group)).transpose(1, 2).flatten(0, 1)
        part = flash_triton(
            packed, k, v, causal=False, offset=0, window=None, softcap=softcap, scale=scale,
            config=config, splits=splits,
        )  # fmt: skip
        out = part.out.unflatten(0, (rows, group)).transpose(1, 2).flatten(1, 2)
        lse = part.lse.unflatten(0, (rows, group)).transpose(1, 2).flatten(1, 2)
        return _finish(out, lse, q.dtype, into, sinks)
    block_d = max(16, triton.next_power_of_2(dim))
    config = config or pick_config(q.device, block_d, q.element_size())
    tiles = triton.cdiv(rows, config.block_m)
    if splits is None:
        splits = num_splits(tiles * q_heads, keys, num_sms(q.device)) if full else 1
    split_keys = triton.cdiv(triton.cdiv(keys, splits), _SPLIT_KEYS) * _SPLIT_KEYS
    splits = triton.cdiv(keys, split_keys)
    if splits == 1 and into is not None:
        out, lse = into.out[None], into.lse[None]
    else:
        out_dtype = q.dtype if splits == 1 else torch.float32
        out = torch.empty(splits, rows, q_heads, dim, dtype=out_dtype, device=q.device)
        lse = torch.empty(splits, rows, q_heads, dtype=torch.float32, device=q.device)
    log2_e = 1.4426950408889634
    _flash_kernel[(tiles, q_heads, splits)](
        q, k, v, out, lse, lse if sinks is None else sinks,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        out.stride(0), out.stride(1), out.stride(2), lse.stride(0), lse.stride(1), lse.stride(2),
        rows, keys, offset, window or 0, split_keys,
        scale * 2 / softcap * log2_e if softcap else scale * log2_e,
        softcap * log2_e,
        GROUP=group, D=dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        CAUSAL=causal, WINDOWED=window is not None, SOFTCAP=softcap > 0,
        INTO=splits == 1 and into is not None, SINKS=splits == 1 and sinks is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits == 1:
        return Part(out[0], lse[0]) if into is None else into
    part = merge_parts(out, lse)
    return _finish(part.out, part.lse, q.dtype, into, sinks)


def _finish(
    out: torch.Tensor,
    lse: torch.Tensor,
    dtype: torch.dtype,
    into: Part | None,
    sinks: torch.Tensor | None,
) -> Part:
    """What the kernel left to do where several programs shared a row: few rows, so by torch."""
    if sinks is not None:
        out, lse = merged(out.float(), lse, None, sinks)
    if into is None:
        return Part(out.to(dtype), lse)
    out, lse = merged(out.float(), lse, *into)
    into.out.copy_(out)
    into.lse.copy_(lse)
    return into


def pick_config(device: torch.device, block_d: int, itemsize: int) -> Config:
    """The first config that fits the device's shared memory; the last one if none is known to."""
    return fitting_configs(device, block_d, itemsize)[0]


def fitting_configs(device: torch.device, block_d: int, itemsize: int) -> tuple[Config, ...]:
    """The configs that fit the device's shared memory, at least the last one."""
    if device.type != "cuda":
        return (INTERPRETER_CONFIG,)
    configs = FP32_CONFIGS if itemsize == 4 else CONFIGS[max(64, block_d)]
    limit = _shared_limit(device)
    return tuple(c for c in configs if c.shared_bytes(block_d, itemsize) <= limit) or configs[-1:]


def num_splits(programs: int, keys: int, num_sms: int) -> int:
    """How many ranges of keys keep all multiprocessors busy with at least _SPLIT_KEYS keys each."""
    wanted = triton.cdiv(2 * num_sms, programs) if programs < num_sms else 1
    return max(1, min(wanted, keys // _SPLIT_KEYS, _MAX_SPLITS))


@lru_cache(maxsize=64)
def _shared_limit(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@lru_cache(maxsize=64)
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
