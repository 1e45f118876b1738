"""The Triton kernel of swiglu.py: BLOCK_F columns of one row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_ELEMENTS = 2048
_NUM_WARPS = 4
_MAX_PROGRAMS = (1 << 31) - 1


@triton.jit
def _swiglu_kernel(
    gate,
    up,
    out,
    gate_n,
    up_n,
    out_n,
    num_blocks,
    F: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    dim = (tl.program_id(0) % num_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = dim < F
    dtype = out.dtype.element_ty
    x = tl.load(gate + row * gate_n + dim, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_n + dim, mask=inside, other=0.0).to(tl.float32)
    slope = x
    if GELU:
        slope = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
    active = x / (1.0 + tl.exp(-slope))
    product = active.to(dtype).to(tl.float32) * factor  # the product of two rounded factors
    tl.store(out + row * out_n + dim, product.to(dtype), mask=inside)


def swiglu_triton(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, act: str) -> None:
    """As swiglu.swiglu, whose checks have passed; gate, up, out [N, F]."""
    num_rows, width = gate.shape
    block_f = min(_BLOCK_ELEMENTS, triton.next_power_of_2(width))
    num_blocks = triton.cdiv(width, block_f)
    step = _MAX_PROGRAMS // num_blocks
    for start in range(0, num_rows, step):
        gate_rows, up_rows, out_rows = (x[start : start + step] for x in (gate, up, out))
        _swiglu_kernel[(gate_rows.shape[0] * num_blocks,)](
            gate_rows, up_rows, out_rows,
            gate_rows.stride(0), up_rows.stride(0), out_rows.stride(0), num_blocks,
            F=width, GELU=act == "gelu_tanh", BLOCK_F=block_f,
            num_warps=_NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
