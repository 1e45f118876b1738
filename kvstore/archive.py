"""A context in one file (`*.rsctx`): records behind each other, so that it can be streamed.

    0   magic 8 bytes | version u32 | zero u32                                (little-endian)
    16  records:  kind 4 bytes | zero u32 | body bytes u64 | checksum 16 bytes | body

    HEAD   JSON of `ArchiveHead`: the manifest without its pages, and how pages are stored
    TOKN   token ids, int32; of an encrypted context a file as `encryption` makes it
    PAGE   a page's frame without the zeros behind its payload, or a packed frame; in page order
    ENDS   msgpack of `ArchiveEnd`: counts, BLAKE3 of every byte before this record

checksum = xxh3-128 of the 16 bytes before it and the body. Nothing follows ENDS. Page keys follow
from model, namespace and tokens, so that the file needs no index and names no other file. A length
is compared with what is left of the file before anything of it is read or allocated. A tenant's
namespace does not stand in the file: HEAD has its digest, and whoever takes it in must know it.
"""

from __future__ import annotations

import os
import secrets
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash
from blake3 import blake3

from ringspan.errors import BadInput, StoreError
from ringspan.kvstore import staging
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.segment import store_error

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"RSPANCX\n"
VERSION = 1
HEAD, TOKENS, PAGE, END = b"HEAD", b"TOKN", b"PAGE", b"ENDS"
FRAMES = "frames"
"""`ArchiveHead.stored`: pages are frames as on disk."""

MAX_HEAD_BYTES = 16 << 20
MAX_END_BYTES = 4096

_START = struct.Struct("<8sII")
_RECORD = struct.Struct("<4sIQ")
_CHECKSUM_BYTES = 16


class BadArchive(StoreError):
    """A file that is no context's export, or not whole; nothing of it was kept."""


class ArchiveHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands before the pages."""

    stored: str
    """`frames`, or the name of the archive codec that packed them."""
    manifest: Manifest
    """Without pages and payload_bytes: they are counted as they come."""


class ArchiveEnd(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands behind the pages."""

    num_pages: int
    payload_bytes: int
    """Of all pages, as they are once they are unpacked."""
    stored_bytes: int
    """Of the bodies of all PAGE records."""
    digest: str
    """Hex BLAKE3 of every byte of the file before this record."""


class Record(NamedTuple):
    kind: bytes
    body: memoryview
    where: str
    """How messages name it: file and byte."""


class ArchiveWriter:
    """Writes one file, which appears whole under its name in one step or not at all.

    Raises BadInput where the name is taken and `replace` is not set, `StoreError` with numbers when
    the disk is full and so on.
    """

    def __init__(self, path: Path, replace: bool = False) -> None:
        if path.exists() and not (replace and path.is_file()):
            raise BadInput(
                f"{path} exists already: name another file"
                + (", or pass --force to replace it" if path.is_file() else "")
            )
        self.path = path
        self.written_bytes = 0
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._replace = replace
        self._digest = blake3(max_threads=blake3.AUTO)
        try:
            self._file = open(self._part, "xb", buffering=0)  # noqa: SIM115  __exit__ does
        except OSError as error:
            raise store_error(error, "cannot write", path) from None
        self._write(_START.pack(MAGIC, VERSION, 0))

    def add(self, kind: bytes, *parts: bytes | memoryview) -> int:
        """One record whose body is these parts; the body's bytes."""
        size = sum(memoryview(part).nbytes for part in parts)
        prefix = _RECORD.pack(kind, 0, size)
        checksum = xxhash.xxh3_128(prefix)
        for part in parts:
            checksum.update(part)
        for part in (prefix, checksum.digest(), *parts):
            self._write(part)
        return size

    def end(self, num_pages: int, payload_bytes: int, stored_bytes: int) -> None:
        """The last record."""
        end = ArchiveEnd(
            num_pages=num_pages,
            payload_bytes=payload_bytes,
            stored_bytes=stored_bytes,
            digest=self._digest.hexdigest(),
        )
        self.add(END, msgspec.msgpack.encode(end))

    def _write(self, data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        self._digest.update(left)
        try:
            while left:
                done = self._file.write(left)
                self.written_bytes += done
                left = left[done:]
        except OSError as error:
            raise store_error(error, "cannot write", self.path, self.written_bytes) from None

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                if self.path.exists() and not self._replace:
                    raise BadInput(f"{self.path} was made by someone else meanwhile")
                os.replace(self._part, self.path)
                staging.sync_folder(self.path.parent)
        except OSError as error:
            raise store_error(error, "cannot write", self.path, self.written_bytes) from None
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)


class ArchiveReader:
    """Reads a file record by record; all it promises is that the bytes are those that were written.

    `records` ends after ENDS, compared with what was read. Raises `BadArchive` naming the place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise store_error(error, "cannot read", path) from None
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._fd)
            raise BadInput(f"{path} is not a plain file: name one that `contexts export` wrote")
        self.size_bytes = found.st_size
        self.payload_bytes = 0
        """Of all pages, as ENDS says; known once it was read."""
        self._at = 0
        self._digest = blake3(max_threads=blake3.AUTO)

    def records(self) -> Iterator[Record]:
        """HEAD, TOKN, PAGE ..., in this order; ENDS is checked and not given."""
        self._start()
        wanted, pages, stored_bytes = HEAD, 0, 0
        while True:
            digest = self._digest.hexdigest() if wanted == PAGE else ""
            record = self._record()
            ends = wanted == PAGE and record.kind == END
            if record.kind != wanted and not ends:
                raise BadArchive(
                    f"{record.where}: a record {_shown(record.kind)}, wanted {_shown(wanted)}"
                )
            if ends:
                self._check_end(record, digest, pages, stored_bytes)
                return
            if wanted == PAGE:
                pages, stored_bytes = pages + 1, stored_bytes + record.body.nbytes
            yield record
            wanted = TOKENS if wanted == HEAD else PAGE

    def _start(self) -> None:
        where = f"{self.name} at byte 0"
        magic, version, zero = _START.unpack(self._read(_START.size, where))
        if magic != MAGIC:
            raise BadArchive(f"{where}: not an exported context (it begins with {magic.hex()})")
        if version != VERSION or zero:
            raise BadArchive(f"{where}: version {version}, this version reads {VERSION}")

    def _record(self) -> Record:
        where = f"{self.name} at byte {self._at}"
        prefix = self._read(_RECORD.size, where)
        kind, zero, size = _RECORD.unpack(prefix)
        checksum = self._read(_CHECKSUM_BYTES, where)
        if kind not in (HEAD, TOKENS, PAGE, END) or zero:
            raise BadArchive(f"{where}: no record begins here ({bytes(prefix[:8]).hex()})")
        most = {HEAD: MAX_HEAD_BYTES, END: MAX_END_BYTES}.get(kind, self.size_bytes)
        if size > most:
            raise BadArchive(f"{where}: a record {_shown(kind)} of {size} bytes, at most {most}")
        body = self._read(size, where)
        found = xxhash.xxh3_128(prefix)
        found.update(body)
        if found.digest() != bytes(checksum):
            raise BadArchive(f"{where}: the record's checksum differs: the file is damaged")
        return Record(kind, body, where)

    def _check_end(self, record: Record, digest: str, pages: int, stored_bytes: int) -> None:
        try:
            end = msgspec.msgpack.decode(record.body, type=ArchiveEnd)
        except (msgspec.DecodeError, ValueError) as error:
            raise BadArchive(f"{record.where}: the last record cannot be read: {error}") from None
        if (end.num_pages, end.stored_bytes) != (pages, stored_bytes):
            raise BadArchive(
                f"{record.where}: {pages} pages of {stored_bytes} bytes came, "
                f"{end.num_pages} of {end.stored_bytes} were written"
            )
        if end.digest != digest:
            raise BadArchive(f"{record.where}: the digest over the whole file differs")
        if self._at != self.size_bytes:
            raise BadArchive(
                f"{self.name}: {self.size_bytes - self._at} bytes behind the last record"
            )
        self.payload_bytes = end.payload_bytes

    def _read(self, size: int, where: str) -> memoryview:
        """The next bytes, after a look at whether the file has so many."""
        left = self.size_bytes - self._at
        if size > left:
            raise BadArchive(f"{where}: {size} bytes wanted, the file ends after {left}")
        data = memoryview(bytearray(size))
        done = 0
        while done < size:
            try:
                count = os.preadv(self._fd, [data[done:]], self._at + done)
            except OSError as error:
                raise store_error(error, "cannot read", self.path) from None
            if not count:
                raise BadArchive(f"{where}: the file was cut while it was read")
            done += count
        self._at += size
        self._digest.update(data)
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _shown(kind: bytes) -> str:
    return kind.decode("ascii", "replace")
