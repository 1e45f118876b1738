"""The kernels of decode become sm_90 machine code on a machine without a GPU.

As a program it compiles them and prints one JSON row each; the tests run it in a process of its
own, since this one may run Triton's interpreter.
"""

from __future__ import annotations

import json
import sys

import pytest

SHARED_LIMIT_BYTES = 227 << 10


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, compiled_by):
    """name -> row; about 2 s a variant, so that the quick tests have a few."""
    return compiled_by(__file__, request.param)


def test_every_kernel_fits_the_shared_memory_of_a_hopper_multiprocessor(compiled):
    assert all(row["cubin_bytes"] > 0 for row in compiled.values())
    assert max(row["shared_bytes"] for row in compiled.values()) <= SHARED_LIMIT_BYTES


def test_codes_go_to_the_tensor_cores_as_they_are(compiled):
    """8-bit products, and no code of K or V is made a float."""
    swept = {
        name: row
        for name, row in compiled.items()
        if name.startswith(("int8", "int4", "k4v2")) and "wide" not in name
    }
    assert swept
    assert all(row["products8"] > 0 for row in swept.values())
    assert all(row["converts8"] == 0 for row in swept.values())


def test_codes_are_copied_ahead_of_their_use(compiled):
    swept = [row for name, row in compiled.items() if name.startswith(("int8", "fp8", "int4"))]
    assert min(row["copies"] for row in swept) > 0


def test_nibbles_are_unpacked_four_at_a_time(compiled):
    swept = [row for name, row in compiled.items() if name.startswith("int4")]
    assert min(row["unpacked4"] for row in swept) > 0


def test_wide_sweeps_are_products_of_warp_groups(compiled):
    """Of fp16, whose conversion from codes goes through no fp32."""
    swept = [row for name, row in compiled.items() if "wide" in name]
    assert swept
    assert min(row["products16"] for row in swept) > 0
    assert max(row["converts8"] for row in swept) == 0


def main(which: str) -> None:
    rows = []
    for name, done in variants(which):
        ptx = done.asm["ptx"]
        rows.append(
            {
                "name": name,
                "shared_bytes": done.metadata.shared,
                "cubin_bytes": len(done.asm["cubin"]),
                "products8": ptx.count(".s32.s8.s8") + ptx.count(".e4m3"),
                "converts8": ptx.count("cvt.rn.f32.s8") + ptx.count("cvt.rn.f32.u8"),
                "products16": ptx.count("k16.f32.f16.f16"),
                "copies": ptx.count("cp.async.c"),
                "unpacked4": ptx.count("0xF0F0F0F0, 0x80808080, 0x6A") + ptx.count("0xf0f0f0f0"),
            }
        )
    json.dump(rows, sys.stdout)


def variants(which: str):
    """Every kind at D 64 and 128, M 16 and 64; a part of them for the quick tests."""
    from compile_for_sm90 import compile_kernel

    from ringspan.kernels.decode4_triton import sweep4_kernel
    from ringspan.kernels.decode8_triton import sweep8_kernel
    from ringspan.kernels.decode_ends_triton import join_kernel, means_kernel, prepare_kernel
    from ringspan.kernels.decode_k4v2_triton import sweep_k4v2_kernel
    from ringspan.kernels.decode_plain_triton import sweep_plain_kernel
    from ringspan.kernels.decode_triton import DEFAULTS, WIDE
    from ringspan.kernels.decode_wide_triton import sweep4_wide_kernel, sweep8_wide_kernel

    codes = {"int8": "i8", "fp8": "fp8e4nv", "int4": "i8", "k4v2": "i8"}
    few_bits = ("int4", "k4v2")
    indices = {"page_table": "i32", "cu_rows": "i32", "lengths": "i32"}
    parts = {"part_out": "fp32", "part_lse": "fp32"}
    sizes = (
        "num_tokens", "num_sequences", "num_heads", "table_b", "num_pages", "num_rows", "first"
    )  # fmt: skip
    flags = {"SOFTCAP": False, "HAS_TABLE": True, "HAS_ROWS": True, "HAS_LENGTHS": True}
    some = {
        ("int8", 128, 8), ("int8", 128, 64), ("fp8", 64, 16), ("int4", 128, 16), ("int4", 128, 64),
        ("k4v2", 128, 8),
    }  # fmt: skip
    for kind in codes:
        for dim in (64, 128):
            for rows in (8, 16, 64):
                if which == "some" and (kind, dim, rows) not in some:
                    continue
                config = DEFAULTS[kind][rows > 16]
                index = {
                    "GROUP": 4, "D": dim, "BLOCK_R": rows, "BLOCK_B": 4, "PAIRED": rows == 8,
                }  # fmt: skip
                built = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                terms = {"Q_TERMS": config.q_terms, "P_TERMS": config.p_terms}
                queries = {"high": codes[kind], "low": codes[kind], "row_scale": "fp32"}
                pages = {
                    "k_codes": "u8" if kind in few_bits else codes[kind],
                    "v_codes": "u8" if kind in few_bits else codes[kind],
                    **dict.fromkeys(("k_scale", "v_scale"), "fp16" if kind in few_bits else "fp32"),
                }
                if kind in few_bits:
                    pages |= {"k_zero": "fp16"}
                    pages |= {"v_zero": "fp16"} if kind == "int4" else {"v_dims": "u8"}
                    queries |= {"sums": "fp32", "means": "fp32"}
                    only = {"ASM": True, "STEPS": config.steps}
                else:
                    only = {"INTEGER": kind == "int8"}
                kernel = {"int4": sweep4_kernel, "k4v2": sweep_k4v2_kernel}.get(kind, sweep8_kernel)
                wide = rows > 16 and kind in WIDE
                if wide:
                    kernel = sweep4_wide_kernel if kind == "int4" else sweep8_wide_kernel
                    queries = {"q": "fp16", "row_scale": "fp32"}
                    pages |= {"k_mean": "fp16"} if kind == "int4" else {}
                    del index["PAIRED"]
                    terms, only = {}, {"ASM": True, "STEPS": config.steps}
                yield (
                    f"{kind} D{dim} R{rows}" + " wide" * wide,
                    compile_kernel(
                        kernel,
                        queries | pages | indices | parts,
                        index | terms | flags | only | {"P": 128},
                        floats=("cap",),
                        unaligned=sizes,
                        **built,
                    ),
                )
    for dim in (64, 128):
        if which == "some" and dim == 64:
            continue
        yield (
            f"plain D{dim}",
            compile_kernel(
                sweep_plain_kernel,
                {**dict.fromkeys("qkv", "bf16"), **indices, "first": "i32", **parts},
                {
                    "GROUP": 4, "D": dim, "BLOCK_N": 64, "BLOCK_R": 8, "BLOCK_B": 4,
                    "SOFTCAP": False, "HAS_FIRST": True, "HAS_ROWS": True, "HAS_LENGTHS": True,
                },
                floats=("factor", "cap"),
                unaligned=sizes,
                num_warps=4,
                num_stages=2,
            ),
        )  # fmt: skip
        yield (
            f"prepare D{dim}",
            compile_kernel(
                prepare_kernel,
                {"q": "bf16", "high": "i8", "low": "i8", "row_scale": "fp32", "sums": "fp32"},
                {"D": dim, "GROUPS": dim // 64, "ROTATE": True, "CODES": "int8", "BLOCK_R": 16},
                floats=("factor", "norm"),
                unaligned=sizes,
                num_warps=4,
            ),
        )
        yield (
            f"means D{dim}",
            compile_kernel(
                means_kernel,
                {"high": "i8", "low": "i8", "k_mean": "fp16", "means": "fp32", **indices},
                {
                    "GROUP": 4, "D": dim, "BLOCK_R": 8, "BLOCK_B": 4, "PAIRED": True,
                    "HAS_TABLE": True, "HAS_ROWS": True, "BLOCK_P": 64,
                },
                unaligned=sizes,
                num_warps=4,
            ),
        )  # fmt: skip
        yield (
            f"join D{dim}",
            compile_kernel(
                join_kernel,
                {**parts, "out": "bf16", "lse": "fp32"},
                {"D": dim, "ROTATE": True, "BLOCK_S": 64, "TILE_S": 16, "DIMS": 32},
                floats=("norm",),
                unaligned=(*sizes, "splits"),
                num_warps=4,
            ),
        )


if __name__ == "__main__":
    main(sys.argv[1])
