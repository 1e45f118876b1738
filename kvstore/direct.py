"""Reading files past the page cache, where the cache does not have the bytes anyway.

A read through the page cache takes half a second of a core a GB, in which nothing is verified; a
direct read (O_DIRECT) lets the disk write where the bytes are wanted. It wants place, size and
memory at multiples of 4 KiB: `aligned_room` makes such memory, and frames lie so. What is still in
the cache, since it was written or read a moment ago, is taken from there (`mincore` tells), and so
is everything that a file system cannot read directly.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from ringspan.errors import CorruptPage
from ringspan.kvstore.frame import ALIGN
from ringspan.kvstore.segment_reader import read_into

if TYPE_CHECKING:
    from pathlib import Path

DIRECT_BYTES = 1 << 19
"""A smaller read is not worth it: the cache's reading ahead then does more."""
CACHED_SHARE = 0.5
"""Of a read that must be in the page cache for it to be taken from there."""

_libc = ctypes.CDLL(None, use_errno=True)


def aligned_room(size_bytes: int) -> memoryview:
    """Zeros at a multiple of 4 KiB, as direct reads want their memory."""
    return memoryview(mmap.mmap(-1, max(size_bytes, 1)))[:size_bytes]


class DirectFile:
    """A file that does not change, open for reading; any number of threads may read.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct_fd = -1
        self._refused = False
        """The file system takes no direct reads, or wants other alignments."""
        self._residence: _Residence | None = None
        self._lock = threading.Lock()
        self.direct_bytes = 0
        """Read past the page cache so far."""

    def read(self, room: memoryview, offset: int, where: str) -> None:
        """Fill `room` from byte `offset` on. Raises `CorruptPage` naming `where` if the file ends
        before, OSError."""
        done = self._read_direct(room, offset, where) if self._suits(room, offset) else 0
        if done < room.nbytes:
            read_into(self._fd, [room[done:]], offset + done, where)

    def _suits(self, room: memoryview, offset: int) -> bool:
        if self._refused or room.nbytes < DIRECT_BYTES:
            return False
        if (offset | room.nbytes | address(room)) % ALIGN:
            return False
        return not self._is_cached(offset, room.nbytes)

    def _read_direct(self, room: memoryview, offset: int, where: str) -> int:
        """Bytes read: all, or fewer where the file system would not go on."""
        done = 0
        while done < room.nbytes:
            try:
                count = os.preadv(self._direct(), [room[done:]], offset + done)
            except OSError:
                self._refused = True  # a fault of the disk shows again in the plain read
                break
            if not count:
                raise CorruptPage(f"{where}: the segment ends in the middle of the frame")
            done += count
            if count % ALIGN:
                break  # the file's end, or a signal: what is left is no direct read any more
        with self._lock:
            self.direct_bytes += done
        return done

    def _direct(self) -> int:
        with self._lock:
            if self._direct_fd < 0:
                self._direct_fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            return self._direct_fd

    def _is_cached(self, offset: int, size: int) -> bool:
        with self._lock:
            if self._residence is None:
                self._residence = _Residence(self._fd)
        return self._residence.share(offset, size) >= CACHED_SHARE

    def close(self) -> None:
        """No thread may read any more. May be repeated."""
        if self._residence is not None:
            self._residence.close()
            self._residence = None
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1


class _Residence:
    """Which parts of a file the page cache has. The mapping is never read."""

    def __init__(self, fd: int) -> None:
        self._bytes: np.ndarray | None = None
        with contextlib.suppress(OSError, ValueError):  # a file of no bytes, or no such mappings
            self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)

    def share(self, offset: int, size: int) -> float:
        """Of these bytes, which begin at a multiple of 4 KiB; 1 where the system does not tell."""
        if self._bytes is None or offset + size > self._bytes.size:
            return 1.0
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        failed = _libc.mincore(
            ctypes.c_void_p(self._bytes.ctypes.data + begin),
            ctypes.c_size_t(size),
            ctypes.c_void_p(pages.ctypes.data),
        )
        return 1.0 if failed else float((pages & 1).mean())

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes = None
            self._map.close()


def address(room: memoryview) -> int:
    """Where its bytes begin."""
    return int(np.frombuffer(room, np.uint8).ctypes.data)
