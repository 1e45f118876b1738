"""The host store of this node: started once, outlives the ranks, found again by its folder."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ringspan
from ringspan.errors import StoreError
from ringspan.kvstore.tiers.host import HostTier

START_TIMEOUT_S = 30.0
CAPACITY_FRACTION = 0.5
"""Of the shared memory that is free when the store is started."""
LOG = "store.log"


def host_folder() -> Path:
    """Of this user on this node; RINGSPAN_HOST_STORE names another."""
    return Path(os.environ.get("RINGSPAN_HOST_STORE") or f"/dev/shm/ringspan-{os.getuid()}")


def host_tier(folder: Path | None = None, capacity_bytes: int | None = None) -> HostTier:
    """The node's store, started if it does not run. Raises `StoreError` when it does not start.

    capacity_bytes: of a store that is started here; None: half of what is free in shared memory.
    """
    folder = folder or host_folder()
    tier = HostTier(folder)
    if is_running(folder):
        return tier
    pid = start(folder, capacity_bytes)
    until = time.monotonic() + START_TIMEOUT_S
    while not is_running(folder):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended and not is_running(folder):  # another may have been first: then it serves
            code = os.waitstatus_to_exitcode(status)
            raise StoreError(
                f"the host store in {folder} ended with status {code}: {_last_line(folder)}"
            )
        if ended:
            break
        if time.monotonic() > until:
            raise StoreError(f"the host store in {folder} did not answer in {START_TIMEOUT_S} s")
        time.sleep(0.02)
    return tier


def start(folder: Path, capacity_bytes: int | None = None) -> int:
    """A store in a session of its own, which does not end with this process; its pid."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise StoreError(f"{folder} belongs to another user: name one with RINGSPAN_HOST_STORE")
        found = os.statvfs(folder)
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"cannot start a host store in {folder}: {error.strerror}") from None
    if capacity_bytes is None:
        capacity_bytes = int(found.f_bavail * found.f_frsize * CAPACITY_FRACTION)
    source = str(Path(ringspan.__file__).parent.parent)
    paths = filter(None, [source, os.environ.get("PYTHONPATH", "")])
    module = "ringspan.kvstore.tiers.host_server"
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", module, str(folder), str(capacity_bytes)],
            {**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(log)


def is_running(folder: Path) -> bool:
    tier = HostTier(folder, timeout_s=5.0)
    try:
        tier.stat()
    except StoreError:
        return False
    finally:
        tier.close()
    return True


def _last_line(folder: Path) -> str:
    try:
        lines = (folder / LOG).read_text().strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"
