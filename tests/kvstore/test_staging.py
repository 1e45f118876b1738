"""Staging folders that a dead process left: kept while they can be gone on with, claimed once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringspan.errors import StoreError
from ringspan.kvstore import staging
from ringspan.kvstore.folder import Store

NAME = "0123456789abcdef"


def left(root: Path, lines: int = 2) -> Path:
    """A folder of a process that has ended, with a journal of so many lines."""
    folder = staging.new_folder(root / "staging", NAME)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = json.loads((folder / "owner.json").read_text())
    (folder / "owner.json").write_text(json.dumps({**owner, "pid": dead.pid, "started": "1"}))
    written = b"".join(staging.journal_line(n, b'{"n": %d}' % n) for n in range(lines))
    (folder / staging.JOURNAL).write_bytes(written)
    return folder


def test_a_folder_with_a_journal_is_kept_for_a_day(tmp_path: Path) -> None:
    folder = left(tmp_path)
    Store(tmp_path)
    assert staging.abandoned(tmp_path / "staging", NAME) == [folder]
    old = time.time() - staging.STALE_S - 60
    for path in (*folder.iterdir(), folder):
        os.utime(path, (old, old))
    Store(tmp_path)
    assert not folder.exists()


def test_a_folder_whose_journal_cannot_be_read_is_removed_at_once(tmp_path: Path) -> None:
    folder = left(tmp_path)
    journal = folder / staging.JOURNAL
    journal.write_bytes(b"0" + journal.read_bytes()[1:].replace(b"0", b"1"))
    Store(tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_ends_the_journal(cut: int, tmp_path: Path) -> None:
    folder = left(tmp_path, lines=3)
    journal = folder / staging.JOURNAL
    os.truncate(journal, journal.stat().st_size - cut)
    assert staging.journal_lines(folder) == [b'{"n": 0}', b'{"n": 1}']


def test_a_line_in_another_ones_place_is_refused(tmp_path: Path) -> None:
    folder = left(tmp_path, lines=3)
    journal = folder / staging.JOURNAL
    first, second, third = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + third + second)
    assert staging.journal_lines(folder) == [b'{"n": 0}']


def test_only_one_claimant_gets_a_folder_and_the_old_name_is_gone(tmp_path: Path) -> None:
    folder = left(tmp_path)
    mine = staging.claim(folder, NAME)
    assert mine is not None
    assert not folder.exists()
    assert staging.owner_pid(mine) == os.getpid()
    assert staging.claim(folder, NAME) is None
    assert staging.claim(mine, NAME) is None  # its writer lives now
    assert staging.abandoned(tmp_path / "staging", NAME) == []


def test_a_folder_that_another_is_claiming_is_neither_claimed_nor_removed(tmp_path: Path) -> None:
    folder = left(tmp_path)
    with staging._locked(folder) as alone:
        assert alone
        assert staging.claim(folder, NAME) is None
        assert staging.remove_abandoned(tmp_path / "staging") == []
    assert staging.claim(folder, NAME) is not None


def test_what_was_left_makes_room_for_what_is_wanted_now(tmp_path: Path) -> None:
    folder = left(tmp_path)
    (folder / "rank-0.seg").write_bytes(bytes(10_000))
    store = Store(tmp_path, quota_bytes=12_000)
    store.check_room(1000)
    assert folder.exists()
    store.check_room(11_000)
    assert not folder.exists()


def test_the_bytes_that_are_gone_on_with_are_not_counted_twice(tmp_path: Path) -> None:
    folder = left(tmp_path)
    (folder / "rank-0.seg").write_bytes(bytes(10_000))
    there = staging.size_bytes(folder)
    store = Store(tmp_path, quota_bytes=2 * there + 5000)
    store.check_room(2 * there + 5000, folder)  # as much more as is there, and 5000
    with pytest.raises(StoreError, match="of a quota of"):
        store.check_room(2 * there + 5001, folder)
    assert folder.exists()
