"""Shared memory that a GPU copies out of: files mapped and pinned once a process.

Pinning takes longer than copying once, so what was pinned stays so until its file is gone: a
context that is opened again comes at the link's speed from its first byte. Pinned memory is memory
of the host store, which holds it anyway; nothing is taken in addition.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading

import torch

log = logging.getLogger("ringspan.pinned")

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
        self.lock = threading.Lock()

    def pin(self) -> bool:
        with self.lock:
            if not (self.is_pinned or self.refused):
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


def mapped_file(fd: int, pinned: bool) -> torch.Tensor | None:
    """uint8 of a whole file that is open for reading and writing, mapped once a process; None where
    it was to be pinned and cannot be. Raises OSError, ValueError (an empty file).

    What lies in files that are gone is unmapped here.
    """
    stat = os.fstat(fd)
    key = stat.st_dev, stat.st_ino
    with _lock:
        for old in [old for old, file in _files.items() if file.gone]:
            _files.pop(old).close()
        file = _files.get(key)
        if file is None:
            file = _files[key] = _Mapped(fd)
    return file.data if not pinned or file.pin() else None
