"""The compiled loop gives the definition's sums, and nothing breaks where there is none."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ringspan.kernels import sum64_native
from ringspan.kernels.sum64 import MASK, _sum64_rows_numpy, mix, sum64_ref

wants_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="wants a C compiler, cc")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(sum64_native, "_made", [])
    monkeypatch.setattr(sum64_native, "_asked_bytes", [0])
    monkeypatch.delenv("CC", raising=False)


@wants_a_compiler
@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 131_072 * 8 + 3])
def test_the_compiled_loop_sums_rows_as_numpy_does(monkeypatch, size):
    monkeypatch.setattr(sum64_native, "WORTH_BYTES", 0)
    rows = np.random.default_rng(size).integers(0, 256, (3, size + 5), dtype=np.uint8)[:, 2:-3]
    sums = sum64_native.sums_of_rows(rows, mix(9))
    assert sums is not None
    assert sums.tolist() == _sum64_rows_numpy(np.ascontiguousarray(rows), mix(9)).tolist()


@wants_a_compiler
def test_few_bytes_start_no_compiler_and_many_small_sums_do(monkeypatch):
    monkeypatch.setattr(sum64_native, "WORTH_BYTES", 300)
    rows = np.ones((2, 64), np.uint8)
    found = [sum64_native.sums_of_rows(rows, mix(1)) for _ in range(4)]
    assert [sums is not None for sums in found] == [False, False, True, True]


def test_without_a_compiler_there_is_no_loop(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setattr(sum64_native, "WORTH_BYTES", 0)
    assert sum64_native.loop() is None
    assert sum64_native.sums_of_rows(np.ones((2, 64), np.uint8), mix(1)) is None


def test_a_compiler_that_fails_is_no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert sum64_native.loop() is None


@wants_a_compiler
def test_a_loop_that_sums_wrongly_is_not_used(monkeypatch):
    wrong = sum64_native._SOURCE.replace("x >> 27", "x >> 28")
    assert wrong != sum64_native._SOURCE
    monkeypatch.setattr(sum64_native, "_SOURCE", wrong)
    assert sum64_native.loop() is None


@pytest.mark.parametrize("worth", [0, 1 << 40], ids=["compiled", "numpy"])
@pytest.mark.parametrize("size", [0, 1, 8, 4099])
def test_bytes_of_the_host_have_the_defined_sum(monkeypatch, size, worth):
    monkeypatch.setattr(sum64_native, "WORTH_BYTES", worth)
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert sum64_native.sum64_bytes(data, 2) == sum64_ref(data.tobytes(), 2) & MASK
