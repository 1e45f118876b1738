"""Waiting for processes of this host to be gone."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterable


def wait_gone(pids: Iterable[int], timeout_s: float) -> bool:
    """True once no process of these runs any more; False if some still do after timeout_s.

    They need not be children of ours. Linux: a pidfd becomes readable when its process ends.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        waiting = set()
        for pid in set(pids):
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
            waiting.add(descriptor)
        while waiting:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            for descriptor, _ in poll.poll(left_s * 1000):
                poll.unregister(descriptor)
                waiting.discard(descriptor)
    return True
