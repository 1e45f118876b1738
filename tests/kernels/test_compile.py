"""The kernels become sm_90 machine code on a machine without a GPU."""

from pathlib import Path

import pytest

SHARED_LIMIT_BYTES = 227 << 10


@pytest.fixture(scope="module")
def compiled(compiled_by):
    """name -> row, from a process of its own: this one may run the interpreter."""
    script = Path(__file__).with_name("compile_for_sm90.py")
    return compiled_by(script, timeout_s=240)


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
    assert kinds == {"flash", "merge", "planes", "sum64"} | rows


@pytest.mark.parametrize(("kernel", "loads"), [("merge", 2), ("rms_norm", 4), ("swiglu", 4)])
def test_memory_bound_kernels_load_16_bytes_at_a_time(compiled, kernel, loads):
    rows = [row for name, row in compiled.items() if name.split()[0] == kernel]
    assert rows
    assert min(row["wide_loads"] for row in rows) >= loads
