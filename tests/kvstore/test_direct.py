"""Direct reads give the bytes of the file, or leave them to the page cache; never other bytes."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from ringspan.errors import CorruptPage
from ringspan.kvstore import direct
from ringspan.kvstore.direct import DirectFile, address, aligned_room
from ringspan.kvstore.testing import make_context, open_shard
from ringspan.kvstore.tiers import disk

SIZE = 3 << 20


@pytest.fixture
def path(tmp_path):
    """A file of random bytes."""
    found = tmp_path / "file"
    found.write_bytes(np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8).tobytes())
    return found


def forget(path):
    """The page cache drops it; skips where files are always in memory, or never read directly."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    with DirectTry(path) as works:
        if not works:
            pytest.skip(f"{path.parent} is on a file system without direct reads, or in memory")


class DirectTry:
    """Whether a cold file here can be read directly."""

    def __init__(self, path):
        self._file = DirectFile(path)

    def __enter__(self):
        room = aligned_room(direct.DIRECT_BYTES)
        self._file.read(room, 0, "a try")
        return self._file.direct_bytes > 0

    def __exit__(self, *exc_info):
        self._file.close()


@pytest.fixture
def opened(path):
    file = DirectFile(path)
    yield file
    file.close()


def test_what_the_page_cache_lacks_is_read_past_it(path, opened):
    forget(path)
    room = aligned_room(1 << 20)
    opened.read(room, 8192, "here")
    assert room.tobytes() == path.read_bytes()[8192 : 8192 + (1 << 20)]
    assert opened.direct_bytes == 1 << 20


def test_what_the_page_cache_has_is_taken_from_there(path, opened):
    path.read_bytes()
    room = aligned_room(1 << 20)
    opened.read(room, 0, "here")
    assert room.tobytes() == path.read_bytes()[: 1 << 20]
    assert opened.direct_bytes == 0


@pytest.mark.parametrize(
    ("offset", "size", "skip"), [(1, 1 << 20, 0), (0, (1 << 20) - 8, 0), (0, 1 << 20, 8)], ids=str
)
def test_what_is_not_aligned_is_read_all_the_same(path, opened, offset, size, skip):
    forget(path)
    room = aligned_room(SIZE)[skip : skip + size]
    opened.read(room, offset, "here")
    assert room.tobytes() == path.read_bytes()[offset : offset + size]
    assert opened.direct_bytes == 0


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_system_that_refuses_is_read_plainly(monkeypatch, path, opened, call):
    forget(path)

    class Refusing:
        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, path, flags):
            if call == "open" and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no")
            return os.open(path, flags)

        def preadv(self, fd, parts, offset):
            raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(direct, "os", Refusing())
    room = aligned_room(1 << 20)
    opened.read(room, 4096, "here")
    assert opened.direct_bytes == 0
    assert room.tobytes() == path.read_bytes()[4096 : 4096 + (1 << 20)]


@pytest.mark.parametrize("cut", [SIZE - (1 << 20), SIZE - (1 << 20) + 100])
def test_a_file_that_ends_early_is_said_by_name(path, opened, cut):
    os.truncate(path, cut)
    forget(path)
    with pytest.raises(CorruptPage, match="here: the segment ends"):
        opened.read(aligned_room(2 << 20), 1 << 20, "here")


def test_rooms_are_aligned():
    for size in (1, 4096, 5000):
        room = aligned_room(size)
        assert (room.nbytes, address(room) % 4096) == (size, 0)


def test_a_cold_context_opens_by_direct_reads_and_a_changed_byte_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "DIRECT_BYTES", 4096)
    read: list[DirectFile] = []

    class Noted(DirectFile):
        def __init__(self, path):
            super().__init__(path)
            read.append(self)

    monkeypatch.setattr(disk, "DirectFile", Noted)
    made = make_context(tmp_path, 3000, 1, page_tokens=1024)  # reading ahead of a header is less
    segments = sorted(made.store.folder(made.manifest).glob("*.seg"))
    for segment in segments:
        forget(segment)
    read.clear()
    shard = open_shard(made, made.manifest.pages)
    assert shard.num_tokens == 3000
    assert sum(file.direct_bytes for file in read) >= made.manifest.payload_bytes * 0.6
    record = made.manifest.pages[2]
    segment = segments[0].parent / record.segment
    data = bytearray(segment.read_bytes())
    data[record.offset + 4096 + 77] ^= 1
    segment.write_bytes(data)
    forget(segment)
    with pytest.raises(CorruptPage, match="xxh3-128"):
        open_shard(made, made.manifest.pages)
