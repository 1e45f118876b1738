"""What a server and its ranks hold, each second: memory, files, threads, shared memory."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

PERIOD_S = 1.0
SHM = Path("/dev/shm")
RANK = "RayRankHost"
"""Within the name of a rank's process."""
_SHM_PATH = re.compile(r"/dev/shm/([^\s/]+)")


def ranks_of(server: psutil.Process) -> list[psutil.Process]:
    """The processes of its ranks, the oldest first."""
    found = []
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if RANK in child.name() or RANK in " ".join(child.cmdline()):
                found.append(child)
    return sorted(found, key=lambda one: one.create_time())


class Watch(threading.Thread):
    """Samples until `close`."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="watch", daemon=True)
        self._server, self._stop_it = psutil.Process(pid), threading.Event()
        self.rows: list[dict[str, Any]] = []
        self._shm: set[str] = set()
        """Names that processes of the server have ever had mapped."""

    def run(self) -> None:
        while not self._stop_it.wait(PERIOD_S):
            with contextlib.suppress(psutil.Error):
                self.rows.append(self.sample())

    def sample(self) -> dict[str, Any]:
        """One row, now."""
        ranks = ranks_of(self._server)
        known = {self._server.pid, *(rank.pid for rank in ranks)}
        others = [p for p in self._server.children(recursive=True) if p.pid not in known]
        held = [one for one in (_held(process) for process in [self._server, *ranks]) if one]
        for process in (self._server, *ranks):
            self._shm |= _mapped(process.pid)
        return {
            "at_s": time.time(),
            "processes": held,
            "ranks": len(ranks),
            "others": len(others),
            "others_rss_bytes": sum(_rss(process) for process in others),
            "shm": len(self.shm_left()),
        }

    def shm_left(self) -> list[str]:
        """Those of the server's that are still there."""
        return sorted(self._shm & {entry.name for entry in SHM.iterdir()})

    def close(self) -> None:
        self._stop_it.set()
        self.join()


def _held(process: psutil.Process) -> dict[str, Any] | None:
    """None for one that has just ended."""
    with contextlib.suppress(psutil.Error), process.oneshot():
        return {
            "pid": process.pid,
            "rss_bytes": process.memory_info().rss,
            "fds": process.num_fds(),
            "threads": process.num_threads(),
        }
    return None


def _rss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _mapped(pid: int) -> set[str]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {
            match[1]
            for line in lines
            if not line.endswith("(deleted)") and (match := _SHM_PATH.search(line))
        }
    return set()


def growth(
    rows: Sequence[dict[str, Any]], pid: int, begin_s: float, end_s: float
) -> tuple[float, float]:
    """Of a straight line through a process's memory between two times: MiB a minute, and its
    value in the middle in MiB. Zeros for fewer than three samples."""
    times, sizes = [], []
    for row in rows:
        for process in row["processes"]:
            if process["pid"] == pid and begin_s <= row["at_s"] <= end_s:
                times.append((row["at_s"] - (begin_s + end_s) / 2) / 60)
                sizes.append(process["rss_bytes"] / 2**20)
    if len(times) < 3:
        return 0.0, 0.0
    slope, middle = np.polyfit(np.asarray(times), np.asarray(sizes), 1)
    return float(slope), float(middle)
