"""Compiles every Triton kernel to sm_90 machine code without a GPU; run by test_compile.py.

Prints one JSON row a kernel: name, shared memory in bytes, and from the ptx warp-group products and
16-byte loads.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringspan.kernels.flash_triton import CONFIGS, _flash_kernel
from ringspan.kernels.merge_triton import _merge_kernel
from ringspan.kernels.planes_triton import COLUMNS, _copy_planes_kernel, _sum_planes_kernel
from ringspan.kernels.rms_norm_triton import _rms_norm_kernel, num_warps
from ringspan.kernels.rope_triton import _rope_kernel
from ringspan.kernels.sum64_triton import _sum64_kernel
from ringspan.kernels.swiglu_triton import _swiglu_kernel

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
        {"q": dtype, "k": dtype, "v": dtype, "out": dtype, "lse": "fp32", "sinks": "fp32"},
        {
            "GROUP": 4,
            "D": dim,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "CAUSAL": causal,
            "WINDOWED": windowed,
            "SOFTCAP": softcap,
            "INTO": False,
            "SINKS": False,
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        },
        floats=("scale", "softcap"),
        unaligned=("lse_p", "lse_t", "lse_h", "split_keys"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def all_kernels():
    yield "flash bf16 D64 full", flash("bf16", 64, CONFIGS[64][0], False)
    yield "flash bf16 D128 causal", flash("bf16", 128, CONFIGS[128][0], True)
    for count in (2, 16):
        yield f"merge bf16 P{count}", merge("bf16", count)
    yield from row_kernels("bf16")
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
    planes = {"TABLE_COLUMNS": COLUMNS, "BLOCK": 1024, "BLOCKS": 8}
    pointers = {"table": "i64", "payloads": "i64", "sums": "i64"}
    yield (
        "planes copy",
        compile_kernel(
            _copy_planes_kernel, pointers, planes, unaligned=("page_words", "first_page")
        ),
    )
    yield (
        "planes sum",
        compile_kernel(
            _sum_planes_kernel, pointers, planes, unaligned=("num_layers", "first_page")
        ),
    )


def merge(dtype, count):
    """Tuples of tensors and strides, whose paths in the signature have two places."""
    blocks = {"BLOCK_T": 8, "BLOCK_H": 1, "BLOCK_D": 128}
    constants = {"D": 128, "HAS_LSE": True, "HAS_SINKS": True, **blocks}
    tuples = {
        "outs": (f"*{dtype}",) * count,
        "lses": ("*fp32",) * count,
        "strides": ("i32", "i32", "i32", "constexpr") * count,  # lse's heads lie side by side
    }
    pointers = {"out": f"*{dtype}", "lse": "*fp32", "sinks": "*fp32"}
    names = _merge_kernel.arg_names
    signature, attrs, constexprs = {}, {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
        elif name in tuples:
            signature[name] = tuples[name]
            for j, kind in enumerate(tuples[name]):
                if kind == "constexpr":
                    constexprs[(i, j)] = 1
                else:
                    attrs[(i, j)] = STRIDE_16
        else:
            signature[name] = pointers.get(name, "i32")
            if not name.startswith("num_"):
                attrs[(i,)] = STRIDE_16
    source = ASTSource(fn=_merge_kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def row_kernels(dtype):
    yield (
        f"rms_norm {dtype}",
        compile_kernel(
            _rms_norm_kernel,
            {"x": dtype, "weight": dtype, "out": dtype},
            {"H": 4096, "UNIT_OFFSET": False, "BLOCK_R": 1, "BLOCK_H": 4096},
            floats=("eps",),
            unaligned=("num_rows", "num_b"),
            num_warps=num_warps(4096),
            enable_fp_fusion=False,
        ),
    )
    yield (
        f"rope {dtype}",
        compile_kernel(
            _rope_kernel,
            dict.fromkeys(("q", "k", "cos", "sin", "q_out", "k_out"), dtype),
            {"HALF": 64, "BLOCK_R": 32, "BLOCK_D": 64},
            unaligned=("num_tokens", "num_q_heads", "num_kv_heads", "q_blocks"),
            num_warps=4,
            enable_fp_fusion=False,
        ),
    )
    for gelu in (False, True):
        yield (
            f"swiglu {dtype} {'gelu_tanh' if gelu else 'silu'}",
            compile_kernel(
                _swiglu_kernel,
                {"gate": dtype, "up": dtype, "out": dtype},
                {"F": 14336, "GELU": gelu, "BLOCK_F": 2048},
                unaligned=("num_blocks",),
                num_warps=4,
                enable_fp_fusion=False,
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
                "wide_loads": ptx.count("ld.global.v4"),
                "cubin_bytes": len(compiled.asm["cubin"]),
            }
        )
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
