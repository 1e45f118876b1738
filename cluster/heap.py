"""Memory that the C allocator kept, back to the system.

Answers come and go, each with tensors of other sizes, and glibc keeps what was freed between two
that live: a CPU rank grew by one to three MiB a request, though it held no tensor more. Trimming
gives back whole pages that hold nothing; it takes 4 to 8 ms of a heap of 1 GB.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import lru_cache

EVERY_S = 5.0

_lock = threading.Lock()
_last_s = -EVERY_S


def trim(every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> bool:
    """Called when something large went: trims, unless that was done less than `every_s` ago.

    Returns whether it trimmed; never where the C library has no malloc_trim.
    """
    global _last_s
    found = _malloc_trim()
    with _lock:
        if found is None or clock() - _last_s < every_s:
            return False
        _last_s = clock()
    found(0)
    return True


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_size_t,), ctypes.c_int
    call: Callable[[int], int] = function
    return call
