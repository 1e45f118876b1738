"""The Gluon kernel of flash.py for Hopper (sm_90): bf16 and fp16, head_dim 64 and 128.

One program is three groups of warps that meet at barriers in shared memory:

    producer    1 warp    copies tiles of q, k and v to shared memory (TMA), as slots get free
    consumers   2 x 4 warps, 64 rows each: products on the tensor cores, softmax between them

Within a consumer the products run beside the softmax: while P_(j-1) V_(j-1) and Q K_j^T are on the
tensor cores, nothing waits for them but the softmax of block j. Between the consumers a turn is
passed on after the products are issued, so that one computes exponentials while the other
multiplies. Both ideas: FlashAttention 3, https://arxiv.org/abs/2407.08608, section 3.

Blocks of keys are taken from the last to the first, so that the masked ones (diagonal, ragged end)
come first; those that all rows see go through a loop without a mask:

    skipped | masked (window's edge) | seen by all rows | masked (diagonal, ragged end) | skipped

Programs are persistent: each takes every n-th tile, longest tiles of a causal mask first, and there
and back, so that no program gets the longest of each round.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringspan.types import Part

_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # 3.9 | 3.6


@gluon.jit
def _place(index, num_row_tiles, heads_at_once):
    """The index-th tile in the order of work -> (tile of rows, q head).

    Heads that share the L2 go together, all their longest tiles first.
    """
    batch = num_row_tiles * heads_at_once
    within = index % batch
    tile = num_row_tiles - 1 - within // heads_at_once
    return tile, index // batch * heads_at_once + within % heads_at_once


@gluon.jit
def _index(turn, num_tiles):
    """The turn-th tile of this program: rounds go there and back."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - place, place)


@gluon.jit
def _blocks(
    tile, rows, keys, offset, window,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """Blocks of keys: [first, stop) are seen by a row, [all_first, all_stop) by all rows."""
    first_row = tile * BLOCK_M
    last_row = gl.minimum(first_row + BLOCK_M, rows) - 1
    stop_key = keys
    all_stop_key = keys
    if CAUSAL:
        stop_key = gl.maximum(gl.minimum(keys, last_row + offset + 1), 0)
        all_stop_key = gl.maximum(gl.minimum(keys, first_row + offset + 1), 0)
    first = 0
    all_first = 0
    if WINDOWED:
        first = gl.maximum(first_row + offset - window + 1, 0) // BLOCK_N
        all_first = gl.cdiv(gl.maximum(last_row + offset - window + 1, 0), BLOCK_N)
    stop = gl.maximum(gl.cdiv(stop_key, BLOCK_N), first)
    all_first = gl.minimum(all_first, stop)
    all_stop = gl.maximum(all_stop_key // BLOCK_N, all_first)
    return first, all_first, all_stop, stop


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    num_tiles, num_row_tiles, heads_at_once, rows, keys, offset, window,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """The producer warp: every copy that the consumers will wait for, in their order."""
    WG_M: gl.constexpr = q_desc.block_type.shape[1]
    count = 0  # of blocks
    visible = 0  # of tiles with a block
    turn = 0
    tile_index = _index(turn, num_tiles)
    while tile_index < num_tiles:
        tile, head = _place(tile_index, num_row_tiles, heads_at_once)
        first, _, _, stop = _blocks(
            tile, rows, keys, offset, window, 2 * WG_M, BLOCK_N, CAUSAL, WINDOWED
        )
        if stop > first:
            for group in gl.static_range(2):
                mbarrier.wait(q_empty.index(group), (visible & 1) ^ 1)
                mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
                _copy_tile(
                    q_desc,
                    [head, tile * (2 * WG_M) + group * WG_M, 0],
                    q_full.index(group),
                    q_tiles.index(group),
                )
            visible += 1
        kv_head = head // GROUP
        for block in range(stop - first):
            start = (stop - 1 - block) * BLOCK_N
            slot = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            _copy_tile(k_desc, [kv_head, start, 0], k_full.index(slot), k_tiles.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            _copy_tile(v_desc, [kv_head, start, 0], v_full.index(slot), v_tiles.index(slot))
            count += 1
        turn += 1
        tile_index = _index(turn, num_tiles)


@gluon.jit
def _softmax(
    scores, peak, total, row, start, keys, offset, window, scale, softcap,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """A block's scores [M, N] -> weights, the new peak and total, and what earlier sums shrink by.

    total [M, 8] is summed over its columns after the last block, which spares shuffles.
    Without a softcap peak is a raw score: scale meets it in the exponent, in one multiply-add.
    """
    S_LAYOUT: gl.constexpr = scores.type.layout
    BLOCK_N: gl.constexpr = scores.type.shape[1]
    if SOFTCAP:
        scores = softcap - 2 * softcap / (gl.exp2(scores * scale) + 1)
    if MASKED:
        key = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
        seen = (key < keys)[None, :]
        ahead = (row + offset)[:, None] - key[None, :]
        if CAUSAL:
            seen = seen & (ahead >= 0)
        if WINDOWED:
            seen = seen & (ahead < window)
        scores = gl.where(seen, scores, -float("inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    pivot = new_peak
    if MASKED:
        pivot = gl.where(new_peak == -float("inf"), 0.0, new_peak)  # nothing seen yet
    if SOFTCAP:
        weights = gl.exp2(scores - pivot[:, None])
        shrink = gl.exp2(peak - pivot)
    else:
        pivot = pivot * scale
        weights = gl.exp2(scores * scale - pivot[:, None])
        shrink = gl.exp2(peak * scale - pivot)
    columns = _column_sums(weights)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
    return weights, new_peak, total + columns, shrink


@gluon.jit
def _column_sums(x):
    """[M, N] -> [M, 8]: sums that stay within a thread, which holds two of every 8 columns."""
    M: gl.constexpr = x.type.shape[0]
    N: gl.constexpr = x.type.shape[1]
    return gl.sum(gl.reshape(x, [M, N // 8, 8]), 1)


@gluon.jit
def _pin(x):
    """x (four values a thread), computed before the next wait.

    ptxas moves arithmetic behind a wait for products that it does not depend on, where it would no
    longer run beside them. What follows x here is never executed (a total is at most the number of
    keys), but ptxas does not know that and moves it over no wait.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred huge;
        .reg .f32 sum, sum1;
        add.f32 sum, $4, $5;
        add.f32 sum1, $6, $7;
        add.f32 sum, sum, sum1;
        setp.gt.f32 huge, sum, 0f7E967699;
        @huge nanosleep.u32 20;
        mov.b32 $0, $4;
        mov.b32 $1, $5;
        mov.b32 $2, $6;
        mov.b32 $3, $7;
        }""",
        "=f,=f,=f,=f,f,f,f,f", [x], dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _anew(x):
    """x, so that addresses made of it are computed again, not kept since an earlier use."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _step(
    weights, peak, total, acc, count, row, start,
    q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turns,
    keys, offset, window, scale, softcap,
    S_LAYOUT: gl.constexpr, STAGES: gl.constexpr, WG: gl.constexpr, TURNS: gl.constexpr,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Scores of the count-th block, weights times values of the one before.

    weights go round the loop in fp32: as pairs of 16 bits they would be taken apart and put
    together again each time.
    """
    WG_M: gl.constexpr = acc.type.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.type.shape[2]
    D: gl.constexpr = k_tiles.type.shape[3]
    O_LAYOUT: gl.constexpr = acc.type.layout
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    weights = gl.convert_layout(weights.to(v_tiles.dtype), P_LAYOUT)
    slot = count % STAGES
    last = (count - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
    if TURNS:
        mbarrier.wait(turns.index(WG), (count & 1) ^ (1 - WG))
    k_tile = k_tiles.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
    zeros = gl.zeros([WG_M, BLOCK_N], gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(
        weights, v_tiles.index(last).reshape([BLOCK_N, D]), acc, use_acc=True, is_async=True
    )
    if TURNS:
        mbarrier.arrive(turns.index(1 - WG))
    scores = warpgroup_mma_wait(1, deps=[scores])
    new_weights, peak, total, shrink = _softmax(
        scores, peak, total, row, start, keys, offset, window, scale, softcap,
        MASKED, CAUSAL, WINDOWED, SOFTCAP,
    )  # fmt: skip
    total = _pin(total)
    mbarrier.arrive(k_empty.index(slot))
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(last))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return new_weights, peak, total, acc


@gluon.jit
def _consume(
    out, lse, sinks, out_t, out_h, lse_t, lse_h,
    q_tiles, k_tiles, v_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    num_tiles, num_row_tiles, heads_at_once, rows, keys, offset, window, scale, softcap,
    WG: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
    INTO: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """One consumer: 64 rows of each tile, written to out and lse."""
    WG_M: gl.constexpr = q_tiles.type.shape[2]
    BLOCK_N: gl.constexpr = k_tiles.type.shape[2]
    D: gl.constexpr = k_tiles.type.shape[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    LN2: gl.constexpr = 0.6931471805599453
    LOG2E: gl.constexpr = 1.4426950408889634

    q_tile = q_tiles.index(WG).reshape([WG_M, D])
    count = 0  # of blocks
    visible = 0  # of tiles with a block
    turn = 0
    tile_index = _index(turn, num_tiles)
    while tile_index < num_tiles:
        tile, head = _place(tile_index, num_row_tiles, heads_at_once)
        first, all_first, all_stop, stop = _blocks(
            tile, rows, keys, offset, window, 2 * WG_M, BLOCK_N, CAUSAL, WINDOWED
        )
        row = tile * (2 * WG_M) + WG * WG_M + gl.arange(0, WG_M, ROW_LAYOUT)
        lse_row = lse + row.to(gl.int64) * lse_t + head.to(gl.int64) * lse_h
        out_head = out + head.to(gl.int64) * out_h
        out_row = tile * (2 * WG_M) + WG * WG_M + gl.arange(0, WG_M, gl.SliceLayout(1, O_LAYOUT))
        dim = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))

        to_peak = LOG2E if SOFTCAP else LOG2E / scale
        peak = gl.full([WG_M], -float("inf"), gl.float32, ROW_LAYOUT)
        total = gl.zeros([WG_M], gl.float32, ROW_LAYOUT)
        acc = gl.zeros([WG_M, D], gl.float32, O_LAYOUT)
        if INTO:
            peak = gl.load(lse_row, mask=row < rows, other=-float("inf"))
            out_tile = out_head + out_row.to(gl.int64)[:, None] * out_t + dim[None, :]
            acc = gl.load(out_tile, mask=(out_row < rows)[:, None], other=0.0)
            total = gl.where(peak == -float("inf"), 0.0, 1.0)
            if SINKS:
                # the sink is one more key with value 0
                sink = gl.load(sinks + head)
                pivot = gl.maximum(peak, sink)
                shrink = gl.exp2((peak - pivot) * LOG2E)
                total = shrink + gl.exp2((sink - pivot) * LOG2E)
                peak = pivot
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
            peak = peak * to_peak
        elif SINKS:
            peak = gl.load(sinks + head) * to_peak + gl.zeros([WG_M], gl.float32, ROW_LAYOUT)
            total = gl.full([WG_M], 1.0, gl.float32, ROW_LAYOUT)

        # as eight equal columns: exact
        columns = _column_sums(gl.zeros([WG_M, BLOCK_N], gl.float32, S_LAYOUT))
        total = gl.convert_layout(total, gl.SliceLayout(1, columns.type.layout))
        columns += total[:, None] * 0.125
        if stop > first:
            mbarrier.wait(q_full.index(WG), visible & 1)
            visible += 1
            slot = count % STAGES
            mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
            if TURNS:
                mbarrier.wait(turns.index(WG), (count & 1) ^ (1 - WG))
            k_tile = k_tiles.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
            zeros = gl.zeros([WG_M, BLOCK_N], gl.float32, S_LAYOUT)
            scores = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index(1 - WG))
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(slot))
            block = stop - 1
            weights, peak, columns, shrink = _softmax(
                scores, peak, columns, row, block * BLOCK_N, keys, offset, window, scale, softcap,
                True, CAUSAL, WINDOWED, SOFTCAP,
            )  # fmt: skip
            if INTO:
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))[:, None]
            count += 1
            block -= 1
            while block >= all_stop:
                weights, peak, columns, acc = _step(
                    weights, peak, columns, acc, count, row, block * BLOCK_N,
                    q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turns,
                    keys, offset, window, scale, softcap,
                    S_LAYOUT, STAGES, WG, TURNS, True, CAUSAL, WINDOWED, SOFTCAP,
                )  # fmt: skip
                count += 1
                block -= 1
            while block >= all_first:
                weights, peak, columns, acc = _step(
                    weights, peak, columns, acc, count, row, block * BLOCK_N,
                    q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turns,
                    keys, offset, window, scale, softcap,
                    S_LAYOUT, STAGES, WG, TURNS, False, CAUSAL, WINDOWED, SOFTCAP,
                )  # fmt: skip
                count += 1
                block -= 1
            if WINDOWED:
                while block >= first:
                    weights, peak, columns, acc = _step(
                        weights, peak, columns, acc, count, row, block * BLOCK_N,
                        q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turns,
                        keys, offset, window, scale, softcap,
                        S_LAYOUT, STAGES, WG, TURNS, True, CAUSAL, WINDOWED, SOFTCAP,
                    )  # fmt: skip
                    count += 1
                    block -= 1
            mbarrier.arrive(q_empty.index(WG))
            last = (count - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            acc = warpgroup_mma(
                gl.convert_layout(weights.to(v_tiles.dtype), P_LAYOUT),
                v_tiles.index(last).reshape([BLOCK_N, D]),
                acc,
                use_acc=True,
                is_async=True,
            )
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(last))

        total = gl.convert_layout(gl.sum(columns, 1), ROW_LAYOUT)
        seen = total > 0
        divisor = gl.where(seen, total, 1.0)
        log2_total = gl.log2(divisor) + (peak if SOFTCAP else peak * scale)
        gl.store(lse_row, gl.where(seen, log2_total * LN2, -float("inf")), mask=row < rows)
        acc = acc * gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, O_LAYOUT))[:, None]
        out_row = _anew(out_row)
        out_tile = out_head + out_row.to(gl.int64)[:, None] * out_t + dim[None, :]
        gl.store(out_tile, acc.to(out.dtype.element_ty), mask=(out_row < rows)[:, None])
        turn += 1
        tile_index = _index(turn, num_tiles)


@gluon.jit
def _flash_hopper_kernel(
    q_desc, k_desc, v_desc, out, lse, sinks, out_t, out_h, lse_t, lse_h,
    num_tiles, num_row_tiles, heads_at_once, rows, keys, offset, window, scale, softcap,
    GROUP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr,
    INTO: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    WG_M: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    D: gl.constexpr = k_desc.block_type.shape[2]
    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [2, 1, WG_M, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()  # the copy engine sees the barriers as they are now

    # the arguments stand in the call: a name would make run-time values of the constexprs
    gl.warp_specialize(
        [
            (_consume, (
                out, lse, sinks, out_t, out_h, lse_t, lse_h, q_tiles, k_tiles, v_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                num_tiles, num_row_tiles, heads_at_once, rows, keys, offset, window, scale, softcap,
                0, STAGES, TURNS, CAUSAL, WINDOWED, SOFTCAP, INTO, SINKS,
            )),
            (_consume, (
                out, lse, sinks, out_t, out_h, lse_t, lse_h, q_tiles, k_tiles, v_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                num_tiles, num_row_tiles, heads_at_once, rows, keys, offset, window, scale, softcap,
                1, STAGES, TURNS, CAUSAL, WINDOWED, SOFTCAP, INTO, SINKS,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                num_tiles, num_row_tiles, heads_at_once, rows, keys, offset, window,
                GROUP, BLOCK_N, STAGES, CAUSAL, WINDOWED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


class HopperConfig(NamedTuple):
    """Tile and schedule of one compiled variant; rows come in two tiles of 64."""

    block_n: int
    stages: int
    turns: bool
    """The two consumers issue their products in turns."""


WG_ROWS = 64
"""Rows of one consumer: one warp-group product's."""

HOPPER_CONFIGS: dict[int, tuple[HopperConfig, ...]] = {
    dim: (HopperConfig(128, 2, True), HopperConfig(128, 3, True), HopperConfig(128, 2, False))
    for dim in (64, 128)
}
"""By head_dim, the default first. On an H200 they are close: which is ahead depends on the run."""

_L2_SHARE = 0.5
"""Share of the L2 that the K and V of the heads at work may take."""


def why_not_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why this kernel cannot take the tensors of a flash() call, or None."""
    if not q.is_cuda or _properties(q.device).major != 9:
        return "it runs on compute capability 9 (Hopper) only"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {q.dtype}"
    if q.shape[2] not in HOPPER_CONFIGS:
        return f"it takes head_dim 64 and 128, not {q.shape[2]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides = [x.stride(i) for i in (0, 1) if x.shape[i] > 1]
        if x.data_ptr() % 16 or any(stride <= 0 or stride % 8 for stride in strides):
            return f"{name} (strides {x.stride()}) is not made of rows on 16-byte boundaries"
    return None


def flash_hopper(
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
    config: HopperConfig | None = None,
) -> Part:
    """As flash.flash, for T, S >= 1, scale > 0 and tensors that `why_not_hopper` lets pass."""
    (rows, q_heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    config = config or HOPPER_CONFIGS[dim][0]
    if into is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(rows, q_heads, dtype=torch.float32, device=q.device)
    else:
        out, lse = into
    properties = _properties(q.device)
    group = q_heads // kv_heads
    row_tiles = triton.cdiv(rows, 2 * WG_ROWS)
    kv_at_once = max(
        1, min(kv_heads, int(_L2_SHARE * properties.L2_cache_size) // (keys * dim * 4))
    )
    while kv_heads % kv_at_once:
        kv_at_once -= 1
    num_tiles = row_tiles * q_heads
    log2_e = 1.4426950408889634
    _flash_hopper_kernel[(min(num_tiles, properties.multi_processor_count),)](
        _descriptor(q, WG_ROWS), _descriptor(k, config.block_n), _descriptor(v, config.block_n),
        out, lse, lse if sinks is None else sinks,
        out.stride(0), out.stride(1), lse.stride(0), lse.stride(1),
        num_tiles, row_tiles, kv_at_once * group, rows, keys, offset, window or 0,
        scale * 2 / softcap * log2_e if softcap else scale * log2_e,
        softcap * log2_e,
        GROUP=group, STAGES=config.stages, TURNS=config.turns,
        CAUSAL=causal, WINDOWED=window is not None, SOFTCAP=softcap > 0,
        INTO=into is not None, SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip
    return Part(out, lse)


def _descriptor(x: torch.Tensor, block_rows: int) -> TensorDescriptor:
    """x [N, H, D] of any strides, for the copy engine: [H, N, D] in tiles of [1, rows, D]."""
    num_rows, heads, dim = x.shape
    # the stride of an axis of length 1 may be anything, but the engine wants multiples of 16 bytes
    stride_n = x.stride(0) if num_rows > 1 else dim
    stride_h = x.stride(1) if heads > 1 else dim
    block = [1, block_rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    return TensorDescriptor(x, [heads, num_rows, dim], [stride_h, stride_n, 1], block, layout)


_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@lru_cache(maxsize=64)
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)
