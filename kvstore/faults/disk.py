"""A disk that fails: the edge between the store and the operating system's calls.

Files are real ones below a folder (in memory, where there is such a file system), so that whatever
reads them reads files. What a power cut leaves is computed from this:

    data      of a file: what its last fsync covered; of later writes each block of 4 KiB, or none
    names     one order of changes, as a journaling file system keeps it; a cut leaves some first
              part of it, at least all up to the last fsync of a folder (ext4, XFS)

A killed process leaves all it wrote; a power cut leaves the above. Both take the picture where they
strike, and `restore` brings it back once the dead process's cleaning up has run its course, for
that never happened.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from ringspan.kvstore.faults.chance import Chance, Killed, flipped

BLOCK = 4096
FRAMES = (".seg", ".par")
NAMELESS = "/quarantine/"
"""Files there have inode numbers in their names, which differ from run to run."""
CALL_S, BYTES_PER_S = 50e-6, 2e9
"""Of simulated time that a call takes, and what it moves."""

Inode = tuple[int, int]


class Picture(NamedTuple):
    """A tree of files as it shall be."""

    files: dict[str, tuple[bytes, Inode | None]]
    """By path: content, and the inode that had it."""
    folders: frozenset[str]
    power: bool
    """All of it is on the disk, nothing in a cache."""


class SimDisk:
    """`os` for the store's modules: everything else than the calls here is the real one."""

    def __init__(self, root: Path, chance: Chance) -> None:
        self.root, self._chance = root, chance
        self._device = root.stat().st_dev
        self.pid = 1
        """Of the simulated process that makes the calls."""
        self.mortal = False
        """The calling process can be killed here."""
        self.picture: Picture | None = None
        """Taken when the process died; None: it lives."""
        self._synced: dict[Inode, bytes] = {}
        self._names: list[dict[str, Inode | None]] = [self._tree()]
        """States that a power cut may leave, oldest first; None: a folder."""
        self.forget_syncs = ""
        """For a test that the simulator sees it: fsync below this folder does nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # calls

    def statvfs(self, path: Any) -> SimpleNamespace:
        """4 GiB are free: it is calls that find no room."""
        os.statvfs(path)
        return SimpleNamespace(f_bavail=1 << 20, f_frsize=4096)

    def getpid(self) -> int:
        return self.pid

    def open(self, path: Any, flags: int, mode: int = 0o777, **kwargs: Any) -> int:
        draw = self._enter("open", path)
        if flags & os.O_CREAT:
            self._fail(draw, "disk full", errno.ENOSPC, path)
        self._fail(draw, "disk error", errno.EIO, path)
        fd = os.open(path, flags, mode, **kwargs)
        if flags & os.O_CREAT:
            self._note_names()
        return fd

    def open_file(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        """The builtin `open`."""
        draw = self._enter("open", path)
        if mode[0] != "r":
            self._fail(draw, "disk full", errno.ENOSPC, path)
        self._fail(draw, "disk error", errno.EIO, path)
        file: IO[Any] = open(path, mode, *args, **kwargs)  # noqa: SIM115
        if mode[0] != "r":
            self._note_names()
        return file

    def pwritev(self, fd: int, parts: Sequence[Any], offset: int) -> int:
        data = b"".join(bytes(part) for part in parts)
        return self._write(fd, data, offset)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return self._write(fd, bytes(data), offset)

    def _write(self, fd: int, data: bytes, offset: int) -> int:
        path = self._path(fd)
        draw = self._enter("write", path, len(data))
        some = draw.randrange(len(data)) if data else 0
        if self._chance.strikes(draw, "disk full"):
            self._chance.count("disk full", f"{some} of {len(data)} bytes of {path}")
            os.pwrite(fd, data[:some], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fail(draw, "disk error", errno.EIO, path)
        if some and self._chance.strikes(draw, "short write"):
            self._chance.count("short write", f"{some} of {len(data)} bytes of {path}")
            return os.pwrite(fd, data[:some], offset)
        if self.mortal and self._chance.strikes(draw, "kill"):
            os.pwrite(fd, data[:some], offset)
            self._kill(draw, f"{some} of {len(data)} bytes into a write to {path}")
        frames = bool(data) and (path.endswith(FRAMES) or "slab-" in path)
        if frames and self._chance.strikes(draw, "flip in flight"):
            self._chance.count("flip in flight", f"on the way to {path} at byte {offset}")
            data = flipped(data, draw)
        return os.pwrite(fd, data, offset)

    def preadv(self, fd: int, parts: Sequence[Any], offset: int) -> int:
        size = sum(memoryview(part).nbytes for part in parts)
        data = self.pread(fd, size, offset)
        at = 0
        for part in parts:
            room = memoryview(part).cast("B")
            some = data[at : at + room.nbytes]
            room[: len(some)] = some
            at += len(some)
        return len(data)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        path = self._path(fd)
        draw = self._enter("read", path, size)
        self._fail(draw, "disk error", errno.EIO, path)
        data = os.pread(fd, size, offset)
        if len(data) > 1 and self._chance.strikes(draw, "short read"):
            data = data[: draw.randrange(1, len(data))]
            self._chance.count("short read", f"{len(data)} of {size} bytes of {path}")
        if data and self._chance.strikes(draw, "flip in flight"):
            self._chance.count("flip in flight", f"{path} at byte {offset}")
            data = flipped(data, draw)
        return data

    def fsync(self, fd: int) -> None:
        path = self._path(fd)
        draw = self._enter("fsync", path)
        self._fail(draw, "disk full", errno.ENOSPC, path)  # blocks are found when they are written
        self._fail(draw, "disk error", errno.EIO, path)
        if self.forget_syncs and path.startswith(self.forget_syncs):
            return
        found = os.fstat(fd)
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            self._names = [self._tree()]
        else:
            with open(f"/proc/self/fd/{fd}", "rb") as file:  # fd may be for writing only
                self._synced[found.st_dev, found.st_ino] = file.read()

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def rename(self, old: Any, new: Any) -> None:
        self._change("rename", old, lambda: os.rename(old, new))

    def replace(self, old: Any, new: Any) -> None:
        self._change("rename", old, lambda: os.replace(old, new))

    def unlink(self, path: Any) -> None:
        self._change("unlink", path, lambda: os.unlink(path))

    def ftruncate(self, fd: int, size: int) -> None:
        draw = self._enter("truncate", self._path(fd))
        self._fail(draw, "disk error", errno.EIO, self._path(fd))
        os.ftruncate(fd, size)

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        path = self._path(fd)
        self._fail(self._enter("allocate", path, size), "disk full", errno.ENOSPC, path)
        os.posix_fallocate(fd, offset, size)

    def _change(self, operation: str, path: Any, change: Any) -> None:
        draw = self._enter(operation, path)
        self._fail(draw, "disk error", errno.EIO, path)
        self._note_names()
        change()
        self._note_names()
        if self.mortal and self._chance.strikes(draw, "kill"):
            self._kill(draw, f"after {operation} of {self._short(path)}")

    def point(self, what: str) -> random.Random:
        """A place between calls of a process, where it can be killed too."""
        draw = self._chance.keyed("point", what)
        if self.picture is not None:
            raise Killed
        if self.mortal and self._chance.strikes(draw, "kill"):
            self._kill(draw, what)
        return draw

    def _enter(self, operation: str, path: Any, size: int = 0) -> random.Random:
        self._chance.spend(CALL_S + size / BYTES_PER_S)
        if self.picture is not None:
            raise Killed
        name = self._short(path)
        draw = self._chance.keyed(operation, name)
        if self.mortal and self._chance.strikes(draw, "kill"):
            self._kill(draw, f"before {operation} of {name}")
        return draw

    def _fail(self, draw: random.Random, kind: str, code: int, path: Any) -> None:
        if self._chance.strikes(draw, kind):
            self._chance.count(kind, self._short(path))
            raise OSError(code, os.strerror(code))

    # death

    def _kill(self, draw: random.Random, where: str) -> None:
        power = draw.random() < self._chance.rates.get("power", 0.0)
        self._chance.count("power cut" if power else "kill", where)
        self.picture = self.after_power_cut(draw) if power else self._now()
        raise Killed

    def cut_power(self) -> None:
        """Now, between two operations."""
        draw = self._chance.keyed("power cut")
        self._chance.count("power cut", "between operations")
        self.picture = self.after_power_cut(draw)

    def keep(self) -> None:
        """A process ends here: what it wrote stays."""
        if self.picture is None:
            self.picture = self._now()

    def _now(self) -> Picture:
        names = self._tree()
        files: dict[str, tuple[bytes, Inode | None]] = {
            path: ((self.root / path).read_bytes(), inode)
            for path, inode in names.items()
            if inode is not None
        }
        return Picture(files, frozenset(p for p, i in names.items() if i is None), False)

    def after_power_cut(self, draw: random.Random) -> Picture:
        """What the disk then holds; one of the many things that it may."""
        self._note_names()
        names = draw.choice(self._names)
        here = {inode: path for path, inode in self._tree().items() if inode is not None}
        files: dict[str, tuple[bytes, Inode | None]] = {}
        for path, inode in sorted(names.items()):
            if inode is None:
                continue
            synced = self._synced.get(inode)
            held = (self.root / here[inode]).read_bytes() if inode in here else None
            if held is None or NAMELESS in path:
                data = synced or b""
            else:
                data = _torn(held, synced, self._chance.keyed("torn", path))
                if data != held:
                    self._chance.count("lost write", path)
            files[path] = (data, inode)
        return Picture(files, frozenset(p for p, i in names.items() if i is None), True)

    def restore(self) -> bool:
        """The picture becomes the disk; whether it was a power cut's."""
        picture, self.picture = self.picture, None
        assert picture is not None
        now = self._tree()
        for path in sorted(now, reverse=True):
            place = self.root / path
            if now[path] is None and path not in picture.folders:
                place.rmdir()
            elif now[path] is not None and path not in picture.files:
                place.unlink()
        for path in sorted(picture.folders):
            (self.root / path).mkdir(exist_ok=True)
        moved: dict[Inode, Inode] = {}
        for path, (data, inode) in picture.files.items():
            place = self.root / path
            if now.get(path) == inode and place.exists() and place.read_bytes() == data:
                continue
            place.unlink(missing_ok=True)
            place.write_bytes(data)
            if inode is not None:
                moved[inode] = _inode(place)
        self._settle(moved, picture.power)
        return picture.power

    def _settle(self, moved: dict[Inode, Inode], power: bool) -> None:
        if power:
            tree = self._tree()
            self._names = [tree]
            self._synced = {
                inode: (self.root / path).read_bytes()
                for path, inode in tree.items()
                if inode is not None
            }
            return
        for old, new in moved.items():
            if old in self._synced:
                self._synced[new] = self._synced.pop(old)
        self._names = [
            {
                path: inode if inode is None else moved.get(inode, inode)
                for path, inode in at.items()
            }
            for at in self._names
        ]

    # at rest

    def files(self) -> list[str]:
        """Paths below the root, in order."""
        return sorted(path for path, inode in self._tree().items() if inode is not None)

    def flip(self, path: str, draw: random.Random) -> bool:
        """A bit of a file at rest turns over, on disk and in the cache; no time of it is kept."""
        place = self.root / path
        data = place.read_bytes()
        if not data:
            return False
        at = draw.randrange(8 * len(data))
        found = place.stat()
        with open(place, "r+b") as file:
            file.seek(at // 8)
            file.write(bytes([data[at // 8] ^ 1 << at % 8]))
        os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))
        synced = bytearray(self._synced.get(_inode(place), b""))
        if at // 8 < len(synced):
            synced[at // 8] ^= 1 << at % 8
            self._synced[_inode(place)] = bytes(synced)
        self._chance.count("flip at rest", f"{path} at byte {at // 8}")
        return True

    # names

    def _note_names(self) -> None:
        tree = self._tree()
        if tree != self._names[-1]:
            before = self._names[-1].values()
            for inode in set(tree.values()) - set(before):
                if inode is not None and all(inode not in at.values() for at in self._names):
                    self._synced.pop(inode, None)  # a new file with an old number
            self._names.append(tree)

    def _tree(self) -> dict[str, Inode | None]:
        found: dict[str, Inode | None] = {}
        todo = [""]
        while todo:
            folder = todo.pop()
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        found[path] = None
                        todo.append(path)
                    else:
                        found[path] = (self._device, entry.inode())
        return found

    def _path(self, fd: int) -> str:
        return self._short(os.readlink(f"/proc/self/fd/{fd}"))

    def _short(self, path: Any) -> str:
        text = os.fspath(path)
        base = f"{self.root}/"
        if NAMELESS in text:
            return NAMELESS
        return text[len(base) :] if text.startswith(base) else os.path.basename(text)


def _inode(path: Path) -> Inode:
    found = path.stat()
    return found.st_dev, found.st_ino


def _torn(held: bytes, synced: bytes | None, draw: random.Random) -> bytes:
    """A file that was not synced since it had the content `synced` (None: since it was made)."""
    if held == synced:
        return held
    old = synced or b""
    least, most = sorted((len(old), len(held)))
    size = draw.choice((least, most, draw.randint(least, most)))
    mixed = bytearray(old[:size].ljust(size, b"\0"))
    for at in range(0, size, BLOCK):
        if draw.random() < 0.5:
            mixed[at : at + BLOCK] = held[at : min(at + BLOCK, size)].ljust(
                min(BLOCK, size - at), b"\0"
            )
    return bytes(mixed)
