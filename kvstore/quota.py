"""What the files of a store may take: reservations, and contexts that go so that others find room.

    ROOT/quota.lock             held (flock) while room is counted, reserved or made
    ROOT/reserved/NAME-NONCE/   of a writer that has room but no staging folder yet: `room`
    ROOT/staging/*/room         the same, once the writer has its folder

`room` holds the bytes that its context will take at most. A folder in staging counts with its size
or its reservation, whichever is more, so that two writers at once do not overshoot. Reservations of
dead processes go as their folders do (`kvstore.staging`).

Where room is short, whole contexts go in the order of `kvstore.evict`: their copy on this disk, if
another tier has all their pages, else the context. Pinned ones stay, those in use (a directory
says), and those that a rank has open on this host: it holds a shared lock on the context's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ringspan.errors import StoreError, TooLarge
from ringspan.kvstore import staging
from ringspan.kvstore.segment import store_error
from ringspan.kvstore.tiers.disk import DISK
from ringspan.kvstore.tiers.evicting import Evicted, InUse, Limits, make_room
from ringspan.kvstore.tiers.placement import TierName, read_placement

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ringspan.kvstore.folder import Store

LOCK = "quota.lock"
ROOM = "room"
LOCK_TIMEOUT_S = 60.0
"""Whoever holds the lock longer makes room in a tier that does not answer."""


@contextlib.contextmanager
def locked(root: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Nobody else counts or makes room in the store meanwhile. Raises `StoreError`."""
    try:
        fd = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise store_error(error, "cannot lock", root) from None
    try:
        _wait_for(fd, fcntl.LOCK_EX, root, timeout_s)
        yield
    finally:
        os.close(fd)


def _wait_for(fd: int, kind: int, root: Path, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise StoreError(
                    f"{root / LOCK} was held for {timeout_s:g} s: another process makes room in "
                    "the store; try again"
                ) from None
            time.sleep(0.01)
        except OSError as error:
            raise store_error(error, "cannot lock", root) from None


class OpenMark:
    """Keeps a stored context from being evicted on this host, until `close` or the process ends.

    Where the store cannot be locked (a read-only file system) it keeps nothing, and nothing can be
    evicted from there either.
    """

    def __init__(self, root: Path, context_id: str, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Raises StoreError where room is being made for longer than `timeout_s`."""
        self._fd: int | None = None
        folder = root / "contexts" / context_id
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(FileNotFoundError):  # without the file nobody makes room
                try:
                    fd = os.open(root / LOCK, os.O_RDONLY)
                except PermissionError:
                    return
                stack.callback(os.close, fd)
                _wait_for(fd, fcntl.LOCK_SH, root, timeout_s)
            with contextlib.suppress(OSError):
                mark = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    os.close(mark)
                else:
                    self._fd = mark

    def close(self) -> None:
        """May be repeated."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def is_open(folder: Path) -> bool:
    """Whether somebody on this host has an `OpenMark` on the context in `folder`; also where that
    cannot be told."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


class Reservations:
    """Of one `Store`. A thread has one at most that no staging folder carries yet: who asks for
    room again before he stages has thought better of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pending: dict[int, Path] = {}

    def used_bytes(self) -> int:
        """Of all files of contexts, and of what is still to come of those that are written."""
        used = _tree_bytes(self._root / "contexts")
        for folder in _folders(self._root / "staging"):
            used += max(_tree_bytes(folder), _reserved_bytes(folder))
        return used + sum(map(_reserved_bytes, _folders(self._root / "reserved")))

    def reserve(self, need_bytes: int) -> None:
        """For this thread's next staging folder; under the lock."""
        self.release()
        try:
            folder = staging.new_folder(self._root / "reserved", "room")
            (folder / ROOM).write_text(str(need_bytes))
        except OSError as error:
            raise store_error(error, "cannot reserve room in", self._root) from None
        self._pending[threading.get_ident()] = folder

    def attach(self, folder: Path) -> None:
        """The thread's reservation is the staging folder's from now on. Raises OSError."""
        pending = self._pending.pop(threading.get_ident(), None)
        if pending is not None:
            (folder / ROOM).write_bytes((pending / ROOM).read_bytes())
            shutil.rmtree(pending, ignore_errors=True)

    def release(self) -> None:
        """This thread's, if it has one."""
        pending = self._pending.pop(threading.get_ident(), None)
        if pending is not None:
            shutil.rmtree(pending, ignore_errors=True)


def evict_contexts(
    store: Store, excess_bytes: int, keep: Collection[str], in_use: InUse
) -> Evicted:
    """So many bytes at least of contexts that the store shows; under the lock. Raises `TooLarge`
    where all that may go is not enough: then nothing went."""
    opened: set[str] = set()
    held_bytes = 0
    for manifest in store.contexts()[0]:
        folder = store.folder(manifest)
        try:
            tiers = read_placement(folder).tiers
        except StoreError:
            continue  # `make_room` leaves it alone too
        if TierName(DISK) not in tiers:
            continue
        held_bytes += sum(page.frame_bytes for page in manifest.pages)
        if is_open(folder):
            opened.add(manifest.context_id)
    if excess_bytes > held_bytes:
        raise TooLarge(f"{excess_bytes} bytes are to be freed, contexts have {held_bytes}")
    limits = Limits(capacity_bytes=held_bytes - excess_bytes)
    return make_room(
        store, TierName(DISK), {}, limits, keep={*keep, *opened}, only_copies=True, in_use=in_use
    )


def _folders(parent: Path) -> list[Path]:
    try:
        return [folder for folder in parent.iterdir() if folder.is_dir()]
    except OSError:
        return []


def _reserved_bytes(folder: Path) -> int:
    try:
        return int((folder / ROOM).read_text())
    except (OSError, ValueError):
        return 0  # none, or published since it was listed


def _tree_bytes(top: Path) -> int:
    used = 0
    for folder, _, names in os.walk(top):
        for name in names:
            try:
                used += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue  # removed or published since it was listed
    return used
