"""Shared memory that a GPU copies out of: files mapped and pinned once a process.

Pinning takes as long as two to four copies of the same bytes by threads, so a file is pinned when
it was copied out of twice, and stays so until it is gone: a context that is opened again and again
comes at the link's speed, one that is opened once is not held up. Pinned memory is memory of the
host store, which holds it anyway; nothing is taken in addition.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading

import torch

log = logging.getLogger("ringspan.pinned")

PATIENCE = 2
"""How often a file is copied out of before it is pinned."""
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of the process."""


def pin(address: int, size_bytes: int) -> bool:
    """Memory of this process, pinned in place for all GPUs; whether it could be."""
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, size_bytes, _PORTABLE)) == 0:
        return True
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # takes the runtime's last error: the next launch must not
    return False


def unpin(address: int) -> None:
    """What `pin` pinned."""
    torch.cuda.cudart().cudaHostUnregister(address)


class _Mapped:
    """One file, mapped; perhaps pinned."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        try:
            self.data = torch.frombuffer(mmap.mmap(self.fd, 0), dtype=torch.uint8)
        except BaseException:
            os.close(self.fd)
            raise
        self.is_pinned = False
        self.refused = False
        self.copies = 0
        self.lock = threading.Lock()

    def pin(self, patience: int) -> bool:
        with self.lock:
            if not self.is_pinned and self.copies < patience:
                self.copies += 1
            elif not (self.is_pinned or self.refused):
                self.is_pinned = pin(self.data.data_ptr(), self.data.numel())
                self.refused = not self.is_pinned
                if self.refused:
                    log.warning(
                        "%.3f GB of shared memory cannot be pinned: restored through a copy",
                        self.data.numel() / 1e9,
                    )
        return self.is_pinned

    @property
    def gone(self) -> bool:
        """The file was removed: what lay in it is no context's any more."""
        return os.fstat(self.fd).st_nlink == 0

    def close(self) -> None:
        """The map goes with the last tensor that looks into it."""
        if self.is_pinned:
            unpin(self.data.data_ptr())
            self.is_pinned = False
        os.close(self.fd)


_files: dict[tuple[int, int], _Mapped] = {}
_lock = threading.Lock()


def mapped_file(fd: int, pinned: bool, patience: int = 0) -> torch.Tensor | None:
    """uint8 of a whole file that is open for reading and writing, mapped once a process.

    pinned: None is given where it is not pinned: it cannot be, or was asked for no more than
    `patience` times yet. Raises OSError, ValueError (an empty file).
    """
    stat = os.fstat(fd)
    key = stat.st_dev, stat.st_ino
    with _lock:
        file = _files.get(key)
        if file is None:
            file = _files[key] = _Mapped(fd)
    return file.data if not pinned or file.pin(patience) else None


def unmap_gone() -> None:
    """Of files that were removed."""
    with _lock:
        for old in [old for old, file in _files.items() if file.gone]:
            _files.pop(old).close()
