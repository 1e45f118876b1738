"""The kernels become sm_90 machine code on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ringspan

SHARED_LIMIT_BYTES = 227 << 10


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """name -> row, from a process of its own: this one may run the interpreter."""
    cache = tmp_path_factory.mktemp("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(ringspan.__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])]
        ),
    }
    script = Path(__file__).with_name("compile_for_sm90.py")
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_products_are_the_warp_group_products_of_hopper(compiled):
    rows = [row for name, row in compiled.items() if name.split()[0] == "flash"]
    assert len(rows) == 2
    assert all(row["wgmma"] > 0 for row in rows)


def test_every_kernel_fits_the_shared_memory_of_a_hopper_multiprocessor(compiled):
    assert all(row["cubin_bytes"] > 0 for row in compiled.values())
    assert max(row["shared_bytes"] for row in compiled.values()) <= SHARED_LIMIT_BYTES


def test_every_kernel_file_was_compiled(compiled):
    kinds = {name.split()[0] for name in compiled}
    rows = {"rms_norm", "rope", "swiglu"}
    assert kinds == {"flash", "merge", "sum64"} | rows


@pytest.mark.parametrize(("kernel", "loads"), [("merge", 2), ("rms_norm", 4), ("swiglu", 4)])
def test_memory_bound_kernels_load_16_bytes_at_a_time(compiled, kernel, loads):
    rows = [row for name, row in compiled.items() if name.split()[0] == kernel]
    assert rows
    assert min(row["wide_loads"] for row in rows) >= loads
