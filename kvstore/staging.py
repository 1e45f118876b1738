"""Folders of contexts that are being written: who writes them, and which nobody writes any more.

What a process left when it died is removed by the next one that looks, unless it kept a journal in
which the next can read how to go on: such a folder is kept for a day, or until its room is wanted,
and goes to whoever claims it first. Only on the writer's own host can it be known that it is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

STALE_S = 24 * 3600.0
"""Age beyond which a staging folder of an unknown or remote process is taken for abandoned, and
beyond which what could be gone on with is given up."""

JOURNAL = "prefill.journal"
"""Lines of `journal_line`, in a folder that another process could go on with."""

_OWNER = "owner.json"


def new_folder(parent: Path, name: str) -> Path:
    """`parent`/`name`-<nonce>, marked as this process's. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{name}-{secrets.token_hex(4)}"
    folder.mkdir()
    (folder / _OWNER).write_text(json.dumps(_identity(os.getpid())))
    return folder


def disown(folder: Path) -> None:
    """Take the marks away: the folder has become a context."""
    (folder / _OWNER).unlink(missing_ok=True)
    (folder / JOURNAL).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Names in the folder are on the disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def journal_line(number: int, data: bytes) -> bytes:
    """One line of a journal, with its sum: data (JSON, no newline) as its `number`-th, from 0."""
    return b"%016x %s\n" % (xxhash.xxh3_64_intdigest(data, seed=number), data)


def journal_lines(folder: Path) -> list[bytes]:
    """What was given to `journal_line`, up to the first line that is torn or damaged."""
    found: list[bytes] = []
    try:
        lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    except OSError:
        return found
    for number, line in enumerate(lines):
        data = line[17:-1]
        if journal_line(number, data) != line:
            break
        found.append(data)
    return found


def abandoned(parent: Path, name: str) -> list[Path]:
    """`parent`/`name`-*, left by dead processes of this host with a journal that can be read."""
    return [
        folder
        for folder in sorted(parent.glob(f"{name}-*"))
        if _is_dead(folder) and journal_lines(folder)
    ]


def owner_pid(folder: Path) -> int | None:
    """Of the process that writes, or wrote, the folder; None where that cannot be read."""
    try:
        return int(json.loads((folder / _OWNER).read_text())["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def claim(folder: Path, name: str) -> Path | None:
    """Make an abandoned folder this process's, under a new nonce; None where another process was
    quicker, or its writer lives.

    The new nonce keeps those out who served the dead one and do not know yet: what they still
    write by its name fails.
    """
    with _locked(folder) as alone:
        if not alone or not _is_dead(folder):
            return None
        mine = folder.with_name(f"{name}-{secrets.token_hex(4)}")
        mark = folder / f"{_OWNER}.new"
        try:
            mark.write_text(json.dumps(_identity(os.getpid())))
            os.replace(mark, folder / _OWNER)
            os.rename(folder, mine)
        except OSError:
            return None
        return mine


def size_bytes(folder: Path) -> int:
    """Of the files in a folder."""
    sizes = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size
    return sizes


def remove_stale(parent: Path, stale_s: float = STALE_S) -> list[Path]:
    """Remove the folders in `parent` that no living process writes and none will go on with; gives
    back which."""

    def is_stale(folder: Path) -> bool:
        dead = _is_dead(folder)
        if dead and not journal_lines(folder):
            return True
        return dead is not False and time.time() - _newest(folder) > stale_s

    return _remove(parent, is_stale)


def remove_abandoned(parent: Path, but: Path | None = None) -> list[Path]:
    """Remove what dead processes of this host left, except `but`, though it could be gone on
    with; gives back which."""
    return _remove(parent, lambda folder: folder != but and bool(_is_dead(folder)))


def _remove(parent: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    removed: list[Path] = []
    try:
        folders = [folder for folder in parent.iterdir() if folder.is_dir()]
    except OSError:
        return removed
    for folder in folders:
        if not wanted(folder):
            continue
        with _locked(folder) as alone:
            if alone and wanted(folder):  # or it was claimed meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether no other process of this host is claiming or removing the folder."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(fd)


def _is_dead(folder: Path) -> bool | None:
    """Whether the process that wrote the folder is; None where that cannot be told from here."""
    try:
        owner = json.loads((folder / _OWNER).read_text())
        if owner["host"] == _host():
            return bool(owner != _identity(int(owner["pid"])))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no mark that can be read: only its age can tell
    return None


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
