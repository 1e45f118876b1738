"""The folder for what is made once from downloaded weights: `$RINGSPAN_CACHE`.

Entries are folders named by the content they were made from. They appear whole or not at all: one
process makes an entry under a file lock and renames it into place; the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ringspan.errors import PeerTimeout, StoreError


def cache_folder() -> Path:
    """`$RINGSPAN_CACHE`, else ~/.cache/ringspan. Not created."""
    return Path(os.environ.get("RINGSPAN_CACHE") or "~/.cache/ringspan").expanduser()


def keep_whole(path: Path, data: bytes) -> None:
    """What can be measured again: written whole or not at all; a folder that cannot be written is
    no error, it costs the measurement next time."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def published(entry: Path, make: Callable[[Path], None], timeout_s: float) -> Path:
    """`entry`, made by `make(partial_folder)` if it does not exist yet.

    Any number of processes may ask at once; one makes it. Raises PeerTimeout if another process
    holds the lock for longer than `timeout_s`, StoreError if the folder cannot be written.
    """
    if entry.is_dir():
        return entry
    partial = entry.with_name(entry.name + ".partial")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_name(entry.name + ".lock"), timeout_s):
            if entry.is_dir():
                return entry
            # Only the lock's holder touches `partial`, so what lies there is a dead process's.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                partial.rename(entry)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise StoreError(
            f"cannot write the cache folder {entry.parent}: {error.strerror or error}; "
            "make room there or set RINGSPAN_CACHE to another folder"
        ) from error
    return entry


def file_sha256(path: Path, hashes: Path) -> str:
    """Hex sha256 of a file's bytes; remembered in the folder `hashes` by size and mtime."""
    stat = path.stat()
    whole_path = str(path.resolve())
    identity = [whole_path, stat.st_size, stat.st_mtime_ns]
    note = hashes / f"{hashlib.sha256(whole_path.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        remembered = json.loads(note.read_text())
        if remembered["identity"] == identity:
            return str(remembered["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A cache that cannot be written only costs time here; `published` reports it.
    with contextlib.suppress(OSError):
        hashes.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"identity": identity, "sha256": digest}))
        partial.replace(note)
    return digest


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PeerTimeout(
                        f"another process has held {path} for {timeout_s:.0f} s; "
                        "end it or set RINGSPAN_CACHE to another folder"
                    ) from None
                time.sleep(0.05)
        yield
