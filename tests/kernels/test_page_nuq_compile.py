"""The kernels of page_nuq_triton.py become sm_90 machine code on a machine without a GPU.

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

pytestmark = pytest.mark.slow  # 45 s; the other formats' kernels compile in every run
SHARED_LIMIT_BYTES = 227 << 10
SPILL_LIMIT_BYTES = {"": 64, "D256": 320}
"""Of a kernel's name; at 256 dimensions the encoders' two halves do not fit the registers."""
SIZES = {
    "some": ((128, 128),),
    "all": ((32, 128), (64, 128), (128, 64), (128, 128), (256, 64)),
}
"""head_dim and page_tokens."""


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def compiled(request, compiled_by):
    """name -> row; the quick tests have those of 4 bits at D 128."""
    return compiled_by(__file__, request.param)


def test_every_kernel_fits_a_hopper_multiprocessor(compiled):
    assert max(row["shared_bytes"] for row in compiled.values()) <= SHARED_LIMIT_BYTES
    spilling = {
        name: row["stack_bytes"]
        for name, row in compiled.items()
        if row["stack_bytes"] > SPILL_LIMIT_BYTES["D256" if "D256" in name else ""]
    }
    assert not spilling


def test_rotations_are_the_warp_group_products_of_hopper(compiled):
    assert not [name for name, row in compiled.items() if not row["wgmma"]]


def kernels(dim, page_tokens):
    """name, kernel, dtypes of pointers, constants, options."""
    from ringspan.kernels import page_nuq_triton as nuq
    from ringspan.kernels.page_nuq import NUQ3, NUQ4, ROUNDS, WIDENED
    from ringspan.kernels.page_turn import BASES

    pages = {"codes": "u8", "scale": "fp16", "kept": "u8", "row": "bf16"}
    turned = {"mean": "fp16", "cos": "fp32", "sin": "fp32"}
    for levels in (NUQ4, NUQ3):
        made = nuq.shape(levels, dim, page_tokens)
        fit = made | {"ROUNDS": ROUNDS}
        yield (
            f"nuq{levels.bits} encode k",
            nuq._encode_k_kernel,
            pages | turned | {"x": "bf16"},
            fit | {"NUM_BASES": len(BASES), "WIDENED": WIDENED},
            nuq.CONFIGS["nuq encode k"].options(dim),
        )
        options = nuq.CONFIGS["nuq encode v"].options(dim)
        yield (
            f"nuq{levels.bits} encode v",
            nuq._encode_v_kernel,
            pages | {"x": "bf16"},
            fit,
            options,
        )
        for turns in (True, False):
            yield (
                f"nuq{levels.bits} decode {'k' if turns else 'v'}",
                nuq._decode_kernel,
                pages | turned | {"out": "bf16"},
                made | {"TURN": turns},
                nuq.CONFIGS["nuq decode"].options(dim),
            )


def row(name, kernel, pointers, constants, options):
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = dict.fromkeys(constants, "constexpr")
    kinds |= {arg: f"*{kind}" for arg, kind in pointers.items()}
    kinds |= {"norm": "fp32", "deviation": "fp32"}
    aligned = (*pointers, "x_t", "x_h", "out_t", "out_h")
    source = ASTSource(
        fn=kernel,
        signature={arg: kinds.get(arg, "i32") for arg in names},
        constexprs={(names.index(arg),): value for arg, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if arg in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = _cuobjdump(Path(nvidia.__file__).parent / "bin", compiled.asm["cubin"])
    return {
        "name": name,
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
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
            if sys.argv[1] == "some" and name.startswith("nuq3"):
                continue
            rows.append(row(f"{name} D{dim} P{page_tokens}", *rest))
    json.dump(rows, sys.stdout)
