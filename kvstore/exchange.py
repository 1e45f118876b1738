"""Replace a folder by another in one step, where the file system can."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def swap(new: Path, target: Path, old: Path) -> None:
    """`new` becomes `target`, what was there becomes `old`. Raises OSError.

    With renameat2(RENAME_EXCHANGE) there is at no time no `target`. File systems without it (NFS)
    get two renames; a crash between them leaves the context in `old` only.
    """
    if not _exchange(new, target):
        os.rename(target, old)
        os.rename(new, target)
        return
    os.rename(new, old)  # after the exchange `new` is the name of the old folder


def _exchange(a: Path, b: Path) -> bool:
    """False when this libc or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(a))
