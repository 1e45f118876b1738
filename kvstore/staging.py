"""Folders of contexts that are being written: who writes them, and which nobody writes any more."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

STALE_S = 24 * 3600.0
"""Age beyond which a staging folder of an unknown or remote process is taken for abandoned."""

_OWNER = "owner.json"


def new_folder(parent: Path, name: str) -> Path:
    """`parent`/`name`-<nonce>, marked as this process's. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{name}-{secrets.token_hex(4)}"
    folder.mkdir()
    (folder / _OWNER).write_text(json.dumps(_identity(os.getpid())))
    return folder


def disown(folder: Path) -> None:
    """Take the mark away: the folder has become a context."""
    (folder / _OWNER).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Names in the folder are on the disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_stale(parent: Path, stale_s: float = STALE_S) -> list[Path]:
    """Remove the folders in `parent` that no living process writes; gives back which."""
    removed: list[Path] = []
    try:
        folders = [folder for folder in parent.iterdir() if folder.is_dir()]
    except OSError:
        return removed
    for folder in folders:
        if _is_stale(folder, stale_s):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _is_stale(folder: Path, stale_s: float) -> bool:
    try:
        owner = json.loads((folder / _OWNER).read_text())
        here = owner["host"] == _host()
        if here:
            return bool(owner != _identity(int(owner["pid"])))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no mark that can be read: only its age can tell
    return time.time() - _newest(folder) > stale_s


def _newest(folder: Path) -> float:
    newest = 0.0
    for path in (folder, *folder.glob("*")):
        try:
            newest = max(newest, path.stat().st_mtime)
        except OSError:
            continue
    return newest


def _identity(pid: int) -> dict[str, object]:
    """A process that no later one can be mistaken for: pids are used again, start times are not."""
    return {"host": _host(), "pid": pid, "started": _started(pid)}


def _host() -> str:
    """This kernel and pid namespace: only here does a pid say anything."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """Start time in clock ticks, None when no such process lives (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
