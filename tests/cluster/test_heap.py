"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

from ringspan.cluster import heap

FRAGMENTED = """
import os
import torch
from ringspan.cluster.heap import trim

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

torch.ones(1)
trim(0.0)
before = resident_mb()
held = [torch.ones(15_000) for _ in range(4000)]  # 60 KB each, below the size that is mapped alone
held = held[::40]  # what lives lies between what was freed
fragmented = resident_mb()
assert trim(0.0)
print(before, fragmented, resident_mb())
"""


def test_what_lies_between_living_tensors_is_given_back():
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRAGMENTED], capture_output=True, text=True, check=True
    )
    before, fragmented, trimmed = map(float, done.stdout.split())
    assert fragmented > before + 100  # MiB: freed, and kept by the allocator
    assert trimmed < before + 40


def test_it_trims_again_only_after_a_while(monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr(heap, "_last_s", 90.0)
    now = [0.0]

    def at(seconds):
        now[0] = seconds
        return heap.trim(5.0, lambda: now[0])

    assert [at(94.0), at(95.0), at(99.0), at(100.0)] == [False, True, False, True]
    assert calls == [0, 0]


def test_a_c_library_without_it_is_no_error(monkeypatch):
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    assert not heap.trim(0.0)
