"""The Triton kernels of decode.py: a sweep of the keys in splits, then a merge of the splits.

Keys are the rows of both products and queries their columns, so that four queries fill half of a
tensor core's eight columns (as its rows they would fill a quarter of sixteen), and pages go to the
tensor cores as they lie, K [P, D] and V [D, P], without a transposition:

    prepare   q H / unit -> high and low codes, once a call
    means     int4, k4v2: q . k_mean of each page (one number a row and page)
    sweep     x = k_codes (q_high | q_low) * k_scale;  p = exp2(x - peak)
              acc += v_codes (w_high | w_low),  w = p * v_scale / (largest of the tile)
    join      merges the splits and takes out back through H

Codes are never converted to floats: K's and V's go as int8 or e4m3, int4's nibbles as
16 * (code - 8), which one shift and one logical operation make of four at a time; the zeros (moved
by those 8 steps) are sums over p, kept per thread until the end. A query is one number in two
codes, 256 * high + low for int8 (15 bits), high + low / 16 for e4m3 (8 bits), and so is a weight w,
in units of the largest of its own tile: against the largest of all keys a million small weights
beside one sink would all round to 0.

One term each is not enough (error against exact K and V, over that of decoding the pages and
attending in fp32; 1,101 keys, channels of unequal size, flat | peaked | one sink whose value is
near 0):

    terms of q, w   int8                  int4
    2, 2            1.00 | 1.00 | 1.16    1.00 | 1.00 | 1.00
    1, 2            1.21 | 1.00 | 3.40    1.00 | 1.00 | 1.19
    2, 1            2.05 | 1.26 | 21.9    1.02 | 1.00 | 1.96
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from ringspan.kernels.decode import CODES, ROTATED, page_tokens_of
from ringspan.kernels.decode4_triton import sweep4_kernel
from ringspan.kernels.decode8_triton import sweep8_kernel
from ringspan.kernels.decode_ends_triton import join_kernel, means_kernel, prepare_kernel
from ringspan.kernels.decode_k4v2_triton import sweep_k4v2_kernel
from ringspan.kernels.decode_plain_triton import sweep_plain_kernel
from ringspan.kernels.decode_wide_triton import sweep4_wide_kernel, sweep8_wide_kernel
from ringspan.types import Part

LOG2_E = 1.4426950408889634

NARROW_ROWS = 16
"""Up to here a sweep is bound by reading the keys; above it by the work on scores: see
decode_wide_triton.py."""

WIDE = ("int8", "int4")
"""Kinds that decode_wide_triton.py sweeps for more rows."""

MAX_BLOCK_R = 64
"""Rows (tokens times q heads of a kv head) that share one sweep."""

MAX_SPLITS = 256

_PREPARE_ROWS = 16
_MEANS_PAGES = 64
_PLAIN_KEYS = 64


class Config(NamedTuple):
    """How a sweep is built and cut."""

    num_warps: int
    num_stages: int
    programs: int
    """Of one multiprocessor that the number of splits aims at."""
    q_terms: int = 2
    p_terms: int = 2
    """Codes that make up a query and a weight; fewer than 2 are for measuring what they cost."""
    least_r: int = 8
    """Columns of the smallest tile: from 16 on Hopper's warp-group products are taken."""
    most_r: int = MAX_BLOCK_R
    """Columns of the largest; more rows are more tiles, each of which sweeps the keys."""
    steps: int = 1
    """In which a page of int4 is taken."""
    paired: bool = True
    """Both codes of a weight share one product, where rows fill at most half of the columns."""


DEFAULTS: dict[str, tuple[Config, Config]] = {
    "int8": (Config(4, 3, 2), Config(4, 3, 2)),
    "fp8": (Config(4, 3, 2, least_r=16), Config(8, 3, 1)),
    "int4": (Config(4, 3, 2), Config(4, 2, 2)),
    "k4v2": (Config(4, 3, 2), Config(8, 3, 1, steps=2)),
    "plain": (Config(4, 2, 2), Config(4, 2, 1)),
}
"""For up to 16 rows of a kv head, and for more."""

TUNED: dict[tuple[tuple[int, int], str], tuple[Config, Config]] = {
    ((9, 0), "int8"): (Config(4, 3, 2), Config(4, 3, 6)),
    ((9, 0), "fp8"): (Config(4, 3, 2), Config(8, 3, 4)),
    ((9, 0), "int4"): (Config(2, 3, 4), Config(4, 2, 6)),
}
"""As DEFAULTS, by compute capability and kind; on an H200, 2^20 keys of 8 heads of 128."""


def config_for(kind: str, block_r: int, device: torch.device) -> Config:
    pair = TUNED.get((_capability(device), kind), DEFAULTS[kind])
    return pair[block_r > NARROW_ROWS]


def serves(kind: str, q: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether the kernels take these shapes on q's device."""
    dim, tokens = q.shape[2], page_tokens_of(kind, tensors)
    if kind == "plain":
        return dim in (16, 32, 64, 128, 256)
    if kind == "int8" and dim == 256 and q.dtype == torch.float32:
        return False  # the matrix of signs in fp32 is larger than a multiprocessor's shared memory
    if kind == "int2":
        return False  # few rows attend to decoded stretches
    if kind in ("int4", "k4v2"):
        return dim in (64, 128) and tokens in (64, 128)
    if kind == "fp8" and _capability(q.device) < (8, 9):
        return False
    return dim in (64, 128, 256) and tokens in (32, 64, 128)


def attend_pages_triton(
    kind: str,
    q: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    *,
    scale: float,
    stop: int,
    first: int | torch.Tensor,
    softcap: float,
    page_table: torch.Tensor | None,
    cu_rows: torch.Tensor | None,
    lengths: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
    splits: int | None = None,
) -> Part:
    """As decode.attend_pages, whose checks have passed, for shapes that `serves` takes.

    Nothing waits for the device, and every launch's shape follows from what the host knows: safe
    within a CUDA graph, whose pool keeps the scratch memory.
    """
    num_tokens, q_heads, dim = q.shape
    num_heads = tensors[0].shape[1]
    group = q_heads // num_heads
    num_rows = num_tokens * q_heads
    sequences = 1 if cu_rows is None else cu_rows.numel() - 1
    block_r = _block_r(num_tokens, sequences, group)
    config = config or config_for(kind, block_r, q.device)
    block_r = min(max(block_r, config.least_r), config.most_r)
    if dim == 256:
        block_r = min(block_r, NARROW_ROWS)  # more would not fit the registers
    wide = block_r > NARROW_ROWS and kind in WIDE
    if wide:
        block_r = MAX_BLOCK_R  # the rows of a warp-group product
    paired = config.paired and config.p_terms == 2 and not wide and kind != "plain"
    paired = paired and 2 * triton.cdiv(num_tokens, sequences) * group <= block_r
    tile_rows = block_r // 2 if paired else block_r
    tiles = triton.cdiv(num_tokens * group, tile_rows)
    if cu_rows is not None:
        tiles = num_tokens * group // tile_rows + sequences
    block_n = _PLAIN_KEYS if kind == "plain" else page_tokens_of(kind, tensors)
    lowest = 0 if isinstance(first, torch.Tensor) else first
    if splits is None:
        splits = _splits(config, tiles * num_heads, stop - lowest, block_n, q.device)

    fp32 = {"dtype": torch.float32, "device": q.device}
    part_out = torch.empty((splits, num_rows, dim), **fp32)
    part_lse = torch.empty((splits, num_rows), **fp32)
    out = torch.empty((num_tokens, q_heads, dim), dtype=out_dtype, device=q.device)
    lse = torch.empty((num_tokens, q_heads), **fp32)
    factor = scale * 2 * LOG2_E / softcap if softcap else scale * LOG2_E
    rotate = kind in ROTATED
    grid = (tiles * num_heads, splits)
    index = {
        "GROUP": group, "D": dim, "BLOCK_R": block_r,
        "BLOCK_B": triton.next_power_of_2(sequences), "HAS_ROWS": cu_rows is not None,
    }  # fmt: skip
    rows = q if cu_rows is None else cu_rows
    ends = q if lengths is None else lengths
    launch = {
        "SOFTCAP": softcap != 0.0, "HAS_LENGTHS": lengths is not None,
        "num_warps": config.num_warps,
        # looking up a page is a stage of its own
        "num_stages": config.num_stages + (page_table is not None),
    }  # fmt: skip
    if kind == "plain":
        sweep_plain_kernel[grid](
            q, *tensors, rows, first, ends, part_out, part_lse, q.stride(0), q.stride(1),
            num_tokens, sequences, num_heads, stop, factor, softcap * LOG2_E,
            BLOCK_N=block_n, HAS_FIRST=isinstance(first, torch.Tensor), **index, **launch,
        )  # fmt: skip
    else:
        table = q if page_table is None else page_table
        width = 0 if page_table is None else page_table.shape[-1]
        paged: dict[str, int] = {"HAS_TABLE": page_table is not None}
        dtype = torch.float16 if wide else CODES["fp8" if kind == "fp8" else "int8"]
        high, low = torch.empty((2, num_rows, dim), dtype=dtype, device=q.device)
        groups = max(1, dim // 64) if kind in ("int4", "k4v2") and not wide else 0
        row_scale = torch.empty(num_rows, **fp32)
        sums = torch.empty((num_rows, groups), **fp32) if groups else row_scale
        prepare_kernel[(triton.cdiv(num_rows, _PREPARE_ROWS),)](
            q, high, low, row_scale, sums, q.stride(0), q.stride(1), num_rows, q_heads,
            factor, 1 / math.sqrt(dim),
            D=dim, GROUPS=groups, ROTATE=rotate, BLOCK_R=_PREPARE_ROWS,
            CODES="wide" if wide else "fp8" if kind == "fp8" else "int8",
            num_warps=4 if dim < 256 else 8,
        )  # fmt: skip
        sizes = (num_tokens, sequences, num_heads, width)
        split = (table, rows, first, ends, part_out, part_lse, *sizes)
        last = (stop, softcap * LOG2_E)
        terms = {"Q_TERMS": config.q_terms, "P_TERMS": config.p_terms, "PAIRED": paired}
        paged |= {"P": block_n}
        if wide:
            kernel = sweep4_wide_kernel if kind == "int4" else sweep8_wide_kernel
            kernel[grid](
                high, row_scale, *tensors, *split, *last,
                ASM=q.is_cuda, STEPS=config.steps, **index, **paged, **launch,
            )  # fmt: skip
        elif kind in ("int4", "k4v2"):
            k_codes, k_scale, k_zero, k_mean, *v_side = tensors
            pages = triton.cdiv(stop, block_n)
            means = torch.empty((tiles * num_heads, pages, block_r), **fp32)
            means_kernel[(tiles * num_heads, triton.cdiv(pages, _MEANS_PAGES))](
                high, low, k_mean, means, table, rows, *sizes, pages,
                BLOCK_P=_MEANS_PAGES, PAIRED=paired, **index,
                HAS_TABLE=page_table is not None, num_warps=4,
            )  # fmt: skip
            kernel = sweep4_kernel if kind == "int4" else sweep_k4v2_kernel
            kernel[grid](
                high, low, row_scale, sums, means, k_codes, k_scale, k_zero, *v_side, *split,
                pages, *last,
                ASM=q.is_cuda, STEPS=config.steps, **index, **paged, **terms, **launch,
            )  # fmt: skip
        else:
            sweep8_kernel[grid](
                high, low, row_scale, *tensors, *split, *last,
                INTEGER=kind == "int8", **index, **paged, **terms, **launch,
            )  # fmt: skip
    join_kernel[(num_rows,)](
        part_out, part_lse, out, lse, num_rows, splits, 1 / math.sqrt(dim),
        D=dim, ROTATE=rotate, BLOCK_S=triton.next_power_of_2(splits),
        TILE_S=16, DIMS=min(dim, 32), num_warps=4,
    )  # fmt: skip
    return Part(out, lse)


def _block_r(num_tokens: int, sequences: int, group: int) -> int:
    """Columns of a tile: the rows of an average sequence, at least a tensor core's eight."""
    rows = triton.cdiv(num_tokens, sequences) * group
    return max(8, min(MAX_BLOCK_R, triton.next_power_of_2(rows)))


def _splits(config: Config, columns: int, keys: int, block_n: int, device: torch.device) -> int:
    """As many as fill the device, of at least two blocks each."""
    wanted = config.programs * _multiprocessors(device) // columns
    return max(1, min(wanted, MAX_SPLITS, keys // (2 * block_n)))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
