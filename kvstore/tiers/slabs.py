"""Slabs of the host store: files of shared memory with slots of one size.

    0     magic 8 | version u32 | slots u32 | slot bytes u64 | crc32 u32        (little-endian)
    64    an entry of 128 bytes per slot, zeros up to a multiple of 4 KiB:
          crc32 u32 of what follows | state u32 | frame bytes u64 | generation u64 | key 32 B
          | form 16 B
    ..    slots

The store's process alone writes entries; ranks write frames into slots that were reserved for them.
A slot's entry is written when its page is published and cleared when it is deleted, so that a store
that starts again finds every published page and no other. Entries say where pages are, not that
they are whole: readers verify the frames.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from ringspan.kvstore.tiers.ids import PageId

MAGIC = b"RSPANSL\n"
VERSION = 1
ALIGN = 4096
SLAB_BYTES = 256 << 20
"""Of a slab's slots, unless one slot is larger."""

_HEAD = struct.Struct("<8sIIQ")
_CRC = struct.Struct("<I")
_ENTRY = struct.Struct("<IQQ32s16s")
_ENTRIES_AT, _ENTRY_BYTES = 64, 128
_FREE, _PUBLISHED = 0, 1
_FORM_CHARS = 16


class Entry(NamedTuple):
    """A published page of a slab."""

    slot: int
    page: PageId
    frame_bytes: int
    generation: int


class BadSlab(Exception):
    """A file that no store of ours wrote whole."""


class Slab:
    """One slab file, mapped. Made by `new` or `adopt`."""

    def __init__(self, path: Path, slots: int, slot_bytes: int) -> None:
        self.path, self.slots, self.slot_bytes = path, slots, slot_bytes
        self._first = first_slot(slots)
        size = slab_bytes(slots, slot_bytes)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != size:
                raise BadSlab(f"{path.name}: {os.fstat(fd).st_size} bytes, wanted {size}")
            self._map = mmap.mmap(fd, self._first)  # entries only: frames are the ranks' matter
        finally:
            os.close(fd)

    @classmethod
    def new(cls, folder: Path, slots: int, slot_bytes: int) -> Slab:
        """Raises OSError (ENOSPC where the memory is not there: it is taken now)."""
        path = folder / f"slab-{secrets.token_hex(6)}"
        head = _HEAD.pack(MAGIC, VERSION, slots, slot_bytes)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, slab_bytes(slots, slot_bytes))
            os.pwrite(fd, head + _CRC.pack(zlib.crc32(head)), 0)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        return cls(path, slots, slot_bytes)

    @classmethod
    def adopt(cls, path: Path) -> Slab:
        """A slab that an earlier store left. Raises `BadSlab`, OSError."""
        with open(path, "rb") as file:
            data = file.read(_HEAD.size + _CRC.size)
        if len(data) < _HEAD.size + _CRC.size:
            raise BadSlab(f"{path.name}: too short for a slab")
        head, (crc,) = data[: _HEAD.size], _CRC.unpack(data[_HEAD.size :])
        magic, version, slots, slot_bytes = _HEAD.unpack(head)
        if magic != MAGIC or version != VERSION or crc != zlib.crc32(head):
            raise BadSlab(f"{path.name}: not a slab of version {VERSION}")
        return cls(path, slots, slot_bytes)

    @property
    def size_bytes(self) -> int:
        """Memory that the slab takes."""
        return slab_bytes(self.slots, self.slot_bytes)

    def offset(self, slot: int) -> int:
        return self._first + slot * self.slot_bytes

    def slot(self, offset: int) -> int:
        return (offset - self._first) // self.slot_bytes

    def publish(self, entry: Entry) -> None:
        key, form = bytes.fromhex(entry.page.key), entry.page.form.encode()
        body = _ENTRY.pack(_PUBLISHED, entry.frame_bytes, entry.generation, key, form)
        self._write(entry.slot, body)

    def clear(self, slot: int) -> None:
        self._write(slot, _ENTRY.pack(_FREE, 0, 0, bytes(32), bytes(16)))

    def entries(self) -> list[Entry]:
        """Those published and undamaged."""
        found = []
        for slot in range(self.slots):
            at = _ENTRIES_AT + slot * _ENTRY_BYTES
            (crc,) = _CRC.unpack_from(self._map, at)
            body = self._map[at + _CRC.size : at + _CRC.size + _ENTRY.size]
            state, frame_bytes, generation, key, form = _ENTRY.unpack(body)
            if state == _PUBLISHED and crc == zlib.crc32(body) and frame_bytes <= self.slot_bytes:
                page = PageId(key.hex(), form.decode("ascii", "replace"))
                found.append(Entry(slot, page, frame_bytes, generation))
        return found

    def remove(self) -> None:
        self._map.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self._map.close()

    def _write(self, slot: int, body: bytes) -> None:
        at = _ENTRIES_AT + slot * _ENTRY_BYTES
        self._map[at : at + _CRC.size + len(body)] = _CRC.pack(zlib.crc32(body)) + body


def slab_bytes(slots: int, slot_bytes: int) -> int:
    """Memory that a slab takes."""
    return first_slot(slots) + slots * slot_bytes


def first_slot(slots: int) -> int:
    """Offset of slot 0."""
    size = _ENTRIES_AT + slots * _ENTRY_BYTES
    return -(-size // ALIGN) * ALIGN


def is_page_id(page: PageId) -> bool:
    """Fits an entry: 64 hex characters and a form of 16."""
    hexadecimal = set("0123456789abcdef")
    return (
        len(page.key) == 64
        and len(page.form) == _FORM_CHARS
        and hexadecimal.issuperset(page.key)
        and hexadecimal.issuperset(page.form)
    )
