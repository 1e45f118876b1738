"""Entries of the cache folder appear whole, once."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ringspan.attention.models.cache import cache_folder, file_sha256, published
from ringspan.errors import PeerTimeout, StoreError


def test_of_many_who_ask_at_once_one_makes_it(tmp_path: Path) -> None:
    made: list[int] = []
    barrier = threading.Barrier(4)

    def make(folder: Path) -> None:
        made.append(1)
        (folder / "a").write_text("whole")

    def ask() -> str:
        barrier.wait(timeout=10)
        return (published(tmp_path / "deep" / "entry", make, 20.0) / "a").read_text()

    with ThreadPoolExecutor(4) as pool:
        answers = [future.result(timeout=30) for future in [pool.submit(ask) for _ in range(4)]]
    assert answers == ["whole"] * 4
    assert len(made) == 1


def test_a_failed_making_leaves_nothing_and_a_later_one_starts_afresh(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyError("no")

    with pytest.raises(KeyError):
        published(tmp_path / "entry", fail, 5.0)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]
    (tmp_path / "entry.partial").mkdir()  # what a killed process leaves
    (tmp_path / "entry.partial" / "old").write_text("x")
    entry = published(tmp_path / "entry", lambda folder: None, 5.0)
    assert list(entry.iterdir()) == []


def test_waiting_for_another_has_an_end(tmp_path: Path) -> None:
    def make(_: Path) -> None:
        with pytest.raises(PeerTimeout, match="another process has held"):
            published(tmp_path / "entry", lambda folder: None, 0.1)

    published(tmp_path / "entry", make, 5.0)


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="RINGSPAN_CACHE"):
        published(tmp_path / "file" / "entry", lambda folder: None, 5.0)


def test_a_files_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, notes = tmp_path / "f", tmp_path / "notes"
    path.write_bytes(b"one")
    first = file_sha256(path, notes)
    assert first == hashlib.sha256(b"one").hexdigest() == file_sha256(path, notes)
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file_sha256(path, notes) == hashlib.sha256(b"two").hexdigest()
    for note in notes.iterdir():
        note.write_text("junk")
    assert file_sha256(path, notes) == hashlib.sha256(b"two").hexdigest()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    monkeypatch.delenv("RINGSPAN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "ringspan"
