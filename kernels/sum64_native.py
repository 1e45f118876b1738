"""`sum64` on a CPU in machine code: its inner loop, made by the system's C compiler.

numpy takes ten passes over a tile where a compiled loop takes one: 2.5 against 6 GB/s a core, and
it needs neither the interpreter between passes nor the cache that the tiles take. The loop is
compiled anew in each process that sums much (0.1 s), in a folder of its own that is gone at once,
so that no library made by anybody else is ever loaded; before it is used it must give what the
definition gives. Where there is no compiler (`cc`, or what $CC names), numpy stays.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Loop = Callable[[int, int, int], int]
"""(address, bytes, start) -> the terms of all words, as unsigned 64 bits."""

WORTH_BYTES = 16 << 20
"""Summed by the process so far: then the compiler is worth starting."""
COMPILE_S = 30.0

_SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t mix(uint64_t x) {
    x ^= x >> 30; x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27; x *= UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

uint64_t ringspan_sum64(const unsigned char *bytes, size_t size, uint64_t start) {
    uint64_t sum = 0, key = start, word;
    for (size_t at = 0; at + 8 <= size; at += 8) {
        memcpy(&word, bytes + at, 8);
        sum += mix(word ^ (key += UINT64_C(0x9e3779b97f4a7c15)));
    }
    if (size % 8) {
        word = 0;
        memcpy(&word, bytes + size / 8 * 8, size % 8);
        sum += mix(word ^ (key + UINT64_C(0x9e3779b97f4a7c15)));
    }
    return sum;
}
"""
"""Words are little-endian, as the definition has them: a machine of the other kind fails the check
before the loop is used."""

_lock = threading.Lock()
_made: list[Loop | None] = []
"""What the first `loop` found; empty before it."""
_asked_bytes = [0]
"""Of all sums before it; no matter if threads lose some."""


def sums_of_rows(rows: np.ndarray, start: int) -> np.ndarray | None:
    """rows [N, n] uint8, each contiguous -> [N] uint64, the terms of all words but the length.

    None where numpy should do it: as long as few bytes were summed, and without a compiler.
    """
    if not _made:
        _asked_bytes[0] += rows.nbytes
        if _asked_bytes[0] < WORTH_BYTES:
            return None
    found = loop()
    if found is None:
        return None
    count, size = rows.shape
    address, stride = rows.ctypes.data, rows.strides[0]
    values = (found(address + row * stride, size, start) for row in range(count))
    return np.fromiter(values, np.uint64, count)


def sum64_bytes(data: np.ndarray, seed: int = 0) -> int:
    """What `sum64` gives for these bytes (uint8 [n], contiguous), as unsigned 64 bits."""
    from ringspan.kernels.sum64 import MASK, mix, sum64_rows  # which imports this module

    if not data.size or (native := sums_of_rows(data[None], mix(seed))) is None:
        return int(sum64_rows(torch.from_numpy(data)[None], seed)[0]) & MASK
    return (mix(data.size ^ mix(seed)) + int(native[0])) & MASK


def loop() -> Loop | None:
    """The compiled loop; None without a compiler, or where it does not give what it must."""
    with _lock:
        if not _made:
            _made.append(_compiled())
        return _made[0]


def _compiled() -> Loop | None:
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="ringspan-sum64-") as folder:
            source, library = Path(folder, "sum64.c"), Path(folder, "sum64.so")
            source.write_text(_SOURCE)
            subprocess.run(
                [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)],
                check=True,
                capture_output=True,
                timeout=COMPILE_S,
            )
            function = ctypes.CDLL(str(library)).ringspan_sum64
    except (OSError, subprocess.SubprocessError):
        return None
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64]
    return function if _is_right(function) else None


def _is_right(function: Loop) -> bool:
    """Against the definition, whole words and a part of one."""
    from ringspan.kernels.sum64 import MASK, mix, sum64_ref  # which imports this module

    data = np.arange(1, 1020, dtype=np.uint32).view(np.uint8)[:-1]
    for size in (1, 8, 13, data.size):
        length_term = mix(size ^ mix(3))
        wanted = (sum64_ref(data[:size].tobytes(), 3) - length_term) & MASK
        if function(data.ctypes.data, size, mix(3)) != wanted:
            return False
    return True
