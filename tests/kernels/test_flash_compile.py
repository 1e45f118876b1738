"""Every variant of the flash kernels becomes sm_90 machine code on a machine without a GPU.

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

SHARED_LIMIT_BYTES = 227 << 10

SPILL_LIMIT_BYTES = 1 << 10
"""Of stack a thread: carried accumulators spill their addresses, outside of the loop over keys."""

CAUSAL = {"CAUSAL": True, "WINDOWED": False, "SOFTCAP": False, "INTO": False, "SINKS": False}
MASKS = {
    "causal into": CAUSAL | {"INTO": True},
    "full into sinks": CAUSAL | {"CAUSAL": False, "INTO": True, "SINKS": True},
    "window softcap sinks": CAUSAL | {"WINDOWED": True, "SOFTCAP": True, "SINKS": True},
}


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, compiled_by):
    """name -> row; 5 s a variant, so that the quick tests have two."""
    return compiled_by(__file__, request.param)


def test_products_are_the_warp_group_products_of_hopper(compiled):
    assert all(row["wgmma"] > 0 for row in compiled.values())


def test_hopper_kernels_copy_with_the_engine_and_share_out_registers(compiled):
    rows = [row for name, row in compiled.items() if name.startswith("hopper")]
    assert rows
    assert all(row["tma"] > 0 and row["setmaxnreg"] > 0 for row in rows)


def test_exponentials_run_beside_the_products(compiled):
    """Between a block's last two waits, in machine code: else ptxas has undone the schedule."""
    for name, row in compiled.items():
        if name.startswith("hopper"):
            assert row["overlapped"] >= 2, name  # the loop of each consumer


def test_every_variant_fits_a_hopper_multiprocessor(compiled):
    assert max(row["shared_bytes"] for row in compiled.values()) <= SHARED_LIMIT_BYTES
    assert max(row["stack_bytes"] for row in compiled.values()) <= SPILL_LIMIT_BYTES


def hopper(dtype, dim, config, flags):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from ringspan.kernels.flash_hopper import WG_ROWS, _flash_hopper_kernel

    names = _flash_hopper_kernel.arg_names
    constants = {"GROUP": 4, "STAGES": config.stages, "TURNS": config.turns, **flags}
    out = "*fp32" if flags["INTO"] else f"*{dtype}"
    signature = {"out": out, "lse": "*fp32", "sinks": "*fp32", "scale": "fp32", "softcap": "fp32"}
    for name, rows in (("q_desc", WG_ROWS), ("k_desc", config.block_n), ("v_desc", config.block_n)):
        block = [1, rows, dim]
        layout = gl.NVMMASharedLayout.get_default_for(
            block, {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
        )
        signature[name] = f"tensordesc<{dtype}{block},{layout!r}>"
    signature |= dict.fromkeys(constants, "constexpr")
    return GluonASTSource(
        fn=_flash_hopper_kernel,
        signature={name: signature.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in ("out", "lse", "sinks", "out_t", "out_h")
        },
    ), {"num_warps": 4}


def plain(dtype, dim, config, flags):
    from triton.compiler import ASTSource

    from ringspan.kernels.flash_triton import _flash_kernel

    names = _flash_kernel.arg_names
    constants = {
        "GROUP": 4,
        "D": dim,
        "BLOCK_D": dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "tf32",
        **flags,
    }
    out = "*fp32" if flags["INTO"] else f"*{dtype}"
    signature = dict.fromkeys("qkv", f"*{dtype}") | {"out": out, "lse": "*fp32", "sinks": "*fp32"}
    signature |= {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = (
        "q",
        "k",
        "v",
        "out",
        "lse",
        "q_t",
        "q_h",
        "k_s",
        "k_h",
        "v_s",
        "v_h",
        "out_t",
        "out_h",
    )
    return ASTSource(
        fn=_flash_kernel,
        signature={name: signature.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    ), {"num_warps": config.num_warps, "num_stages": config.num_stages}


def variants(which):
    from ringspan.kernels.flash_hopper import HOPPER_CONFIGS
    from ringspan.kernels.flash_triton import CONFIGS

    yield (
        "hopper D128 causal into",
        *hopper("bf16", 128, HOPPER_CONFIGS[128][0], MASKS["causal into"]),
    )
    yield "triton D128 causal into", *plain("bf16", 128, CONFIGS[128][0], MASKS["causal into"])
    if which == "some":
        return
    for dim, configs in HOPPER_CONFIGS.items():
        for mask, flags in MASKS.items():
            yield f"hopper D{dim} {mask} bf16", *hopper("bf16", dim, configs[0], flags)
        for config in configs[1:]:
            yield f"hopper D{dim} {config}", *hopper("fp16", dim, config, MASKS["causal into"])
    for dim, configs in CONFIGS.items():
        for mask, flags in MASKS.items():
            yield f"triton D{dim} {mask} bf16", *plain("bf16", dim, configs[0], flags)
        for config in configs[1:]:
            if config.block_m < 64:
                continue  # for GPUs with less shared memory; too small a tile for a warp group
            yield f"triton D{dim} {config}", *plain("fp16", dim, config, MASKS["causal into"])


def row(name, source, options):
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget

    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(nvidia.__file__).parent / "bin"
    usage = _cuobjdump(tools, "-res-usage", compiled.asm["cubin"])
    sass = _cuobjdump(tools, "-sass", compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return {
        "name": name,
        "shared_bytes": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "setmaxnreg": ptx.count("setmaxnreg"),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "overlapped": overlapped(sass),
    }


def overlapped(sass):
    """Stretches between two waits for products that hold exponentials, but no new product."""
    kinds = re.findall(r"(HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2)", sass)
    pieces = " ".join(kinds).split("WARPGROUP.DEPBAR")[1:-1]
    return sum(piece.count("MUFU.EX2") >= 32 and "HGMMA" not in piece for piece in pieces)


def _cuobjdump(tools, what, cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tools / "cuobjdump", what, file.name], capture_output=True, text=True, check=True
        ).stdout


if __name__ == "__main__":
    json.dump([row(*variant) for variant in variants(sys.argv[1])], sys.stdout)
