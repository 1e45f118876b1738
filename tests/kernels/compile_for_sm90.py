"""Compiles every Triton kernel to sm_90 machine code without a GPU; run by test_compile.py.

Prints one JSON row a kernel: name, shared memory in bytes, warp-group products in the ptx.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringspan.kernels.flash_triton import CONFIGS, _flash_kernel
from ringspan.kernels.merge_triton import _merge_kernel
from ringspan.kernels.quantize_triton import _dequantize_kernel, _quantize_kernel
from ringspan.kernels.rotate_triton import (
    _dequantize_rotate_kernel,
    _rotate_quantize_kernel,
    options,
)
from ringspan.kernels.sum64_triton import _sum64_kernel

STRIDE_16 = [["tt.divisibility", 16]]


def compile_kernel(kernel, pointers, constants, floats=(), wide=(), unaligned=(), **options):
    """All arguments that are not named are i32; pointers and strides count as multiples of 16."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = "fp32" if name in floats else "i64" if name in wide else "i32"
    attrs = {
        (i,): STRIDE_16
        for i, name in enumerate(names)
        if name in pointers or ("_" in name and signature[name] == "i32" and name not in unaligned)
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def flash(dtype, dim, config, causal, windowed=False, softcap=False):
    return compile_kernel(
        _flash_kernel,
        {"q": dtype, "k": dtype, "v": dtype, "out": dtype, "lse": "fp32"},
        {
            "GROUP": 4,
            "D": dim,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "CAUSAL": causal,
            "WINDOWED": windowed,
            "SOFTCAP": softcap,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        },
        floats=("scale", "softcap"),
        unaligned=("lse_p", "lse_t", "split_keys"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def all_kernels():
    yield "flash bf16 D64 full", flash("bf16", 64, CONFIGS[64][0], False)
    yield "flash bf16 D128 causal", flash("bf16", 128, CONFIGS[128][0], True)
    blocks = {"D": 128, "BLOCK_R": 16, "BLOCK_D": 128}
    yield (
        "merge bf16",
        compile_kernel(
            _merge_kernel,
            {"out": "fp32", "lse": "fp32", "part_out": "bf16", "part_lse": "fp32"},
            blocks,
        ),
    )
    yield (
        "sum64",
        compile_kernel(
            _sum64_kernel,
            {"words": "i64", "sums": "i64"},
            {"BLOCK": 1024, "BLOCKS": 8},
            wide=("first_key",),
            unaligned=("num_words", "row_stride"),
        ),
    )
    for codes in ("i8", "fp8e4nv"):
        yield (
            f"quantize {codes}",
            compile_kernel(
                _quantize_kernel,
                {"x": "bf16", "codes": codes, "scale": "fp32"},
                {**blocks, "INTEGER": codes == "i8"},
                floats=("largest", "tiny"),
                unaligned=("num_rows", "num_b"),
                enable_fp_fusion=False,
            ),
        )
        yield (
            f"dequantize {codes}",
            compile_kernel(
                _dequantize_kernel,
                {"codes": codes, "scale": "fp32", "out": "bf16"},
                blocks,
                unaligned=("num_rows", "num_b"),
            ),
        )
    for dim in (64, 128, 256):
        yield from rotate_kernels("bf16", dim)


def rotate_kernels(dtype, dim):
    blocks, unaligned = {"D": dim, "BLOCK_R": 64}, ("num_rows", "num_b")
    yield (
        f"rotate_quantize {dtype} D{dim}",
        compile_kernel(
            _rotate_quantize_kernel,
            {"x": dtype, "codes": "i8", "scale": "fp32"},
            blocks,
            floats=("norm", "largest", "tiny"),
            unaligned=unaligned,
            **options(dim),
        ),
    )
    yield (
        f"dequantize_rotate {dtype} D{dim}",
        compile_kernel(
            _dequantize_rotate_kernel,
            {"codes": "i8", "scale": "fp32", "out": dtype},
            blocks,
            floats=("norm",),
            unaligned=unaligned,
            **options(dim),
        ),
    )


def main() -> None:
    rows = []
    for name, compiled in all_kernels():
        ptx = compiled.asm["ptx"]
        rows.append(
            {
                "name": name,
                "shared_bytes": compiled.metadata.shared,
                "wgmma": ptx.count("wgmma.mma_async"),
                "cubin_bytes": len(compiled.asm["cubin"]),
            }
        )
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
