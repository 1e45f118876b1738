"""An append-only file of the directory's records, which survives a crash at any byte.

    file    MAGIC  entry  entry  ...
    entry   length (4 bytes)  sum (8 bytes)  record (msgpack, `length` bytes)      little-endian
    sum     xxh3-64 of length and record, seeded with the entry's number

Reading stops at the first entry that is not whole or whose sum differs, and the file is cut there:
a crash leaves at most one such, the one that nobody was told of. The number in the sum refuses an
entry that lies where another one belongs. A journal that has grown is written anew as a snapshot
beside it, synced and renamed over it, so that at all times one whole journal has its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import xxhash

from ringspan.errors import StoreError
from ringspan.kvstore.records import AnyRecord, decode_record, encode_record

MAGIC = b"ringspan journal v1\n"
_HEAD = struct.Struct("<IQ")
_LENGTH = struct.Struct("<I")

Sync = Literal["always", "os"]
"""When a record is on the disk: `always`: before its command is answered (a power cut loses
nothing that was answered). `os`: when the operating system writes it (the process may die and lose
nothing, the machine may not)."""

log = logging.getLogger(__name__)


class Journal:
    """One file, one writer: the file is locked while it is open. Raises `StoreError`."""

    def __init__(self, path: Path | str, sync: Sync = "always") -> None:
        if sync not in ("always", "os"):
            raise ValueError(f"sync {sync!r}: wanted 'always' or 'os'")
        self.path = Path(path)
        self.size_bytes = 0
        self.num_records = 0
        self._sync = sync
        self._broken = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._error(error, "cannot open") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except BlockingIOError:
            os.close(self._lock)
            raise StoreError(
                f"journal {self.path} is in use by another process: a directory has one process"
            ) from None
        except OSError as error:
            os.close(self._lock)
            raise self._error(error, "cannot open") from None

    def replay(self) -> list[AnyRecord]:
        """All whole records; what lies behind them is cut off, and said. Once, before `append`."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise self._error(error, "cannot read") from None
        whole_magic = data.startswith(MAGIC)
        if not whole_magic and not MAGIC.startswith(data):
            raise StoreError(f"{self.path} is no journal of this version: move it away")
        records: list[AnyRecord] = []
        at, why = len(MAGIC), "the header is torn"
        if whole_magic:
            at, why = _read(data, records)
        try:
            if not whole_magic:
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, MAGIC, 0)
                os.fsync(self._fd)
                _sync_folder(self.path.parent)
            else:
                if at < len(data):
                    os.ftruncate(self._fd, at)
                os.fsync(self._fd)  # a process that died before its sync has left a whole entry
        except OSError as error:
            raise self._error(error, "cannot mend") from None
        if data and at < len(data):
            log.warning(
                "journal=%s cut_at=%d cut_bytes=%d records=%d why=%r",
                self.path, at, len(data) - at, len(records), why,
            )  # fmt: skip
        self.size_bytes, self.num_records = at, len(records)
        return records

    def append(self, record: AnyRecord) -> None:
        """Written (and synced, by the policy) when this returns. On an error the file is as it
        was; if even that fails, all further writing is refused."""
        if self._broken:
            raise StoreError(self._broken)
        data = _entry(record, self.num_records)
        try:
            _write_all(self._fd, data, self.size_bytes)
            if self._sync == "always":
                os.fdatasync(self._fd)
        except OSError as error:
            try:
                os.ftruncate(self._fd, self.size_bytes)
            except OSError:
                self._broken = f"journal {self.path} could not be mended after {error}: restart"
            raise self._error(error, "cannot write to") from None
        self.size_bytes += len(data)
        self.num_records += 1

    def compact(self, records: Iterable[AnyRecord]) -> None:
        """Begin anew with `records`, which say all that the file said, in one step."""
        beside = self.path.with_name(self.path.name + ".new")
        data = bytearray(MAGIC)
        count = 0
        for record in records:
            data += _entry(record, count)
            count += 1
        fd = -1
        try:
            fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            _write_all(fd, data, 0)
            os.fsync(fd)
            os.rename(beside, self.path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            with contextlib.suppress(OSError):
                beside.unlink()
            raise self._error(error, "cannot compact") from None
        before, self._fd = self._fd, fd
        self.size_bytes, self.num_records, self._broken = len(data), count, ""
        os.close(before)
        _sync_folder(self.path.parent)

    def close(self) -> None:
        """May be repeated."""
        fds, self._fd, self._lock = (self._fd, self._lock), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        self._broken = self._broken or f"journal {self.path} is closed"

    def _error(self, error: OSError, what: str) -> StoreError:
        return StoreError(
            f"{what} journal {self.path}: {error.strerror or error}; free space or give it "
            "another folder"
        )


def journal_problems(path: Path) -> list[str]:
    """A line if a journal's end cannot be read; nothing is changed or cut for it, and what its
    writer, if there is one, is just writing is not taken for damage."""
    try:
        written = _is_written(path)
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"cannot read journal {path}: {error.strerror or error}"]
    if not data.startswith(MAGIC):
        return [] if MAGIC.startswith(data) else [f"{path} is no journal of this version"]
    records: list[AnyRecord] = []
    at, why = _read(data, records)
    if not why or (written and why.endswith("torn")):
        return []
    return [
        f"journal {path}: {why} at byte {at}, behind {len(records)} records; the {len(data) - at} "
        "bytes from there on are dropped when a directory opens it next"
    ]


def _is_written(path: Path) -> bool:
    """A process has it open."""
    try:
        fd = os.open(f"{path}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _read(data: bytes, records: list[AnyRecord]) -> tuple[int, str]:
    """Fills `records`; gives back where the first entry begins that is no good, and why."""
    at = len(MAGIC)
    while at < len(data):
        body = at + _HEAD.size
        if body > len(data):
            return at, "an entry's head is torn"
        length, wanted = _HEAD.unpack_from(data, at)
        stop = body + length
        if stop > len(data):
            return at, "an entry is torn"
        if _sum(length, data[body:stop], len(records)) != wanted:
            return at, "an entry's checksum differs"
        try:
            records.append(decode_record(data[body:stop]))
        except msgspec.DecodeError as error:
            return at, f"an entry says nothing: {error}"
        at = stop
    return at, ""


def _entry(record: AnyRecord, number: int) -> bytes:
    body = encode_record(record)
    return _HEAD.pack(len(body), _sum(len(body), body, number)) + body


def _sum(length: int, body: bytes, number: int) -> int:
    found: int = xxhash.xxh3_64_intdigest(_LENGTH.pack(length) + body, seed=number)
    return found


def _write_all(fd: int, data: bytes | bytearray, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
