"""The kernels of pages become sm_90 machine code on a machine without a GPU.

As a program it compiles them and prints one JSON row each; the tests run it in a process of its
own, since this one may run Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ringspan.kernels import pages

SHARED_LIMIT_BYTES = 227 << 10

SPILL_LIMIT_BYTES = 160
"""int4 encode k spills 144 in 4 warps, and is faster so on an H200 than without any in 8."""
SIZES = {
    "some": ((128, 128),),
    "all": ((32, 128), (64, 128), (128, 64), (128, 128), (256, 64)),
}
"""head_dim and page_tokens."""


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, compiled_by):
    """name -> row; 1 to 2 s each, so that the quick tests have those that rotate at D 128."""
    return compiled_by(__file__, request.param)


def test_every_kernel_fits_a_hopper_multiprocessor(compiled):
    assert max(row["shared_bytes"] for row in compiled.values()) <= SHARED_LIMIT_BYTES
    at_256 = [row["shared_bytes"] for name, row in compiled.items() if name.endswith("D256")]
    assert max(at_256, default=0) <= pages._KERNEL_256_SHARED_BYTES
    assert max(row["stack_bytes"] for row in compiled.values()) <= SPILL_LIMIT_BYTES


def test_rotations_are_the_warp_group_products_of_hopper(compiled):
    for name, row in compiled.items():
        if "fp8" not in name and row["product_rows"] >= 64:
            assert row["wgmma"] > 0, name


def test_codes_and_values_are_stored_in_pieces_of_16_bytes(compiled):
    """K's codes and V's turned ones alike, so that memory is written in whole sectors."""
    narrow = [name for name, row in compiled.items() if not row["wide_stores"]]
    # a row of 32 dimensions leaves a thread fewer than 16 bytes, 64 codes of 2 bits too
    few = ("k4v2 encode v D64", "int2 encode k D64")
    assert not [name for name in narrow if not name.endswith("D32") and name not in few]


def kernels(dim, page_tokens):
    """name, kernel, dtypes of pointers, constants, options, rows of a product."""
    from ringspan.kernels import page_int2_triton as int2
    from ringspan.kernels import page_int4_triton as int4
    from ringspan.kernels import page_k4v2_triton as k4v2
    from ringspan.kernels import page_scaled_triton as scaled

    for launcher, codes in ((scaled.INT8, "i8"), (scaled.FP8, "fp8e4nv")):
        kind = launcher.kind.name
        shape = launcher.shape(dim, page_tokens)
        for side in "kv":
            last = {"TOKEN_LAST": side == "v"}
            pointers = {"codes": codes, "scale": "fp32"}
            name = f"{kind} encode {side}"
            options = scaled.CONFIGS[name].options(dim)
            more = shape | last | {"INTEGER": kind == "int8"}
            yield name, scaled._encode_kernel, pointers | {"x": "bf16"}, more, options, page_tokens
            name = f"{kind} decode {side}"
            options = scaled.CONFIGS[name].options(dim)
            more = shape | last
            out = {"out": "bf16"}
            yield name, scaled._decode_kernel, pointers | out, more, options, page_tokens
    shape = int4.shape(dim, page_tokens)
    pointers = {"codes": "u8", "scale": "fp16", "zero": "fp16"}
    k_pointers = pointers | {"mean": "fp16"}
    for name, kernel, x, rows in (
        ("int4 encode k", int4._encode_k_kernel, k_pointers | {"x": "bf16"}, page_tokens),
        ("int4 encode v", int4._encode_v_kernel, pointers | {"x": "bf16"}, page_tokens // 2),
        ("int4 decode k", int4._decode_k_kernel, k_pointers | {"out": "bf16"}, page_tokens),
        ("int4 decode v", int4._decode_v_kernel, pointers | {"out": "bf16"}, page_tokens // 2),
    ):
        yield name, kernel, x, shape, int4.CONFIGS[name].options(dim), rows
    shape = {"HALF": dim // 2, "P": page_tokens}
    pointers = {"codes": "u8", "scale": "fp16", "dims": "u8"}
    for name, kernel, x in (
        ("k4v2 encode v", k4v2._encode_v_kernel, {"x": "bf16"}),
        ("k4v2 decode v", k4v2._decode_v_kernel, {"out": "bf16"}),
    ):
        options = k4v2.CONFIGS[name].options(dim)
        yield name, kernel, pointers | x, shape, options, page_tokens
    pointers = {"codes": "u8", "scale": "fp16", "mean": "fp16"}
    for name, kernel, x in (
        ("int2 encode k", int2._encode_k_kernel, {"x": "bf16"}),
        ("int2 decode k", int2._decode_k_kernel, {"out": "bf16"}),
    ):
        options = k4v2.CONFIGS[name].options(dim)
        yield name, kernel, pointers | x, shape, options, page_tokens


def row(name, kernel, pointers, constants, options, product_rows):
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    floats = ("norm", "half_norm", "step_norm", "largest", "tiny")
    signature = {
        arg: "constexpr"
        if arg in constants
        else f"*{pointers[arg]}"
        if arg in pointers
        else "fp32"
        if arg in floats
        else "i32"
        for arg in names
    }
    aligned = (*pointers, "x_t", "x_h", "out_t", "out_h")
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(arg),): value for arg, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if arg in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = _cuobjdump(Path(nvidia.__file__).parent / "bin", compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        "name": name,
        "product_rows": product_rows,
        "shared_bytes": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "wide_stores": ptx.count("st.global.v4.b32"),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
    }


def _cuobjdump(tools, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


if __name__ == "__main__":
    rows = []
    for dim, page_tokens in SIZES[sys.argv[1]]:
        for name, *rest in kernels(dim, page_tokens):
            if sys.argv[1] == "some" and name.startswith("fp8"):
                continue
            rows.append(row(f"{name} D{dim}", *rest))
    json.dump(rows, sys.stdout)
