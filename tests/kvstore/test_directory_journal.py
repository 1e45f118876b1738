"""A directory's journal: what was answered is there after a crash, whatever the crash left."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.errors import RingspanError, StoreError
from ringspan.kvstore import directory as directory_module
from ringspan.kvstore.catalog import Catalog
from ringspan.kvstore.directory import Directory, open_directory
from ringspan.kvstore.journal import MAGIC, Journal
from ringspan.kvstore.leases import LONGEST_S, InUse, StaleHandle
from ringspan.kvstore.records import Joined, PageEntry, Shelf, Tier

HOLDERS = ("gang", "disk")
TEXTS = ("a", "ab", "abc", "abd", "xy")
SPACES = ("one", "two")


def keys_of(text: str) -> list[str]:
    return [text[: end + 1].ljust(64, "0") for end in range(len(text))]


def shelf(holder: str, text: str) -> Shelf:
    return Shelf(Tier.GPU, text, "raw", 9) if holder == "gang" else Shelf(Tier.DISK, "", "int8", 8)


def declared(directory: Directory, holder: str, epoch: int, space: str, text: str) -> None:
    ref = f"write {space} {text}"
    keys = keys_of(text)
    directory.declare(space, text, keys, len(text), owner=holder, epoch=epoch, ref=ref)
    pages = [PageEntry(key, 7, "sum") for key in keys]
    directory.stage(holder, epoch, ref, space, shelf(holder, text), pages)


Step = tuple[str, str, str, str, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "join",
                "leave",
                "stage",
                "publish",
                "abort",
                "withdraw",
                "some",
                "discard",
                "refer",
                "release",
                "forget",
                "lost",
                "lease",
                "compact",
                "stage",
                "publish",
                "stage",
                "publish",
            ]
        ),
        st.sampled_from(HOLDERS),
        st.sampled_from(SPACES),
        st.sampled_from(TEXTS),
        st.integers(0, 2),
    ),
    max_size=40,
)
"""(what, holder, namespace, context, a number)."""


def take(directory: Directory, epochs: dict[str, int], step: Step) -> None:
    """One step; a refusal is an answer as good as any."""
    what, holder, space, text, number = step
    epoch = epochs[holder]
    at, ref = shelf(holder, text), f"write {space} {text}"
    with contextlib.suppress(RingspanError):
        match what:
            case "join":
                epochs[holder] = directory.join(holder)
            case "leave":
                directory.leave(holder, epoch - number)
            case "stage":
                declared(directory, holder, epoch, space, text)
            case "publish":
                directory.publish(holder, epoch, ref, len(text))
            case "abort":
                directory.abort(holder, epoch, ref)
            case "withdraw":
                directory.withdraw(holder, epoch, space, at)
            case "some":
                directory.withdraw(holder, epoch, space, at, keys_of(text)[:number])
            case "discard":
                directory.discard(holder, epoch, space, at, keys_of(text)[number:], "damaged")
            case "refer":
                directory.refer(holder, epoch, f"session {number}", space, text)
            case "release":
                directory.release(holder, epoch, f"session {number}" if number else ref)
            case "forget":
                directory.forget(space, text)
            case "lost":
                directory.forget_lost(space)
            case "lease":
                directory.lease(space, text, holder, epoch, at, ttl_s=0.001)
            case "compact":
                directory.compact()


def check_sound(directory: Directory) -> None:
    """What must hold in every state: no page without a context, no copy without a page, sums."""
    catalog: Catalog = directory._catalog
    for name, space in catalog.spaces.items():
        assert space.contexts or space.used_bytes or space.pages
        uses: dict[str, int] = {}
        for known in space.contexts.values():
            for index, key in enumerate(known.keys):
                uses[key] = uses.get(key, 0) + 1
                assert space.pages[key].index == index
        assert {key: page.uses for key, page in space.pages.items()} == uses
        used: dict[Tier, int] = {}
        for holder in catalog.holders.values():
            for (space_name, at), held in holder.shelves.items():
                if space_name == name:
                    assert held.epoch == holder.epoch
                    assert held.pages
                    assert all(held in space.pages[key].at for key in held.pages)
                    used[at.tier] = used.get(at.tier, 0) + 7 * len(held.pages)
            for slots in holder.staged.values():
                for (space_name, at), pages in slots.items():
                    if space_name == name:
                        used[at.tier] = used.get(at.tier, 0) + 7 * len(pages)
        assert space.used_bytes == used
        on_shelves = {
            id(held) for holder in catalog.holders.values() for held in holder.shelves.values()
        }
        assert all(id(held) in on_shelves for page in space.pages.values() for held in page.at)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_a_replay_and_a_snapshot_give_the_same_directory(taken: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "journal")
        directory = Directory(Journal(path, sync="os"))
        epochs = {holder: directory.join(holder) for holder in HOLDERS}
        for step in taken:
            take(directory, epochs, step)
            check_sound(directory)
        state = directory.records()
        directory.close()
        again = open_directory(path)
        assert again.records() == state
        check_sound(again)
        again.compact()
        assert again.records() == state
        again.close()
        third = open_directory(path)
        assert third.records() == state
        third.close()


@settings(max_examples=8, deadline=None)
@given(steps)
def test_a_crash_at_any_byte_leaves_what_was_answered_before(taken: list[Step]) -> None:
    """The journal is cut at each byte behind what stood before the last command that wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        journal = Journal(path, sync="os")
        directory = Directory(journal)
        epochs = {holder: directory.join(holder) for holder in HOLDERS}
        states = {journal.size_bytes: directory.records()}
        for step in [s for s in taken if s[0] != "compact"]:
            take(directory, epochs, step)
            if step[0] not in ("stage", "lost"):  # those write more than one record
                states[journal.size_bytes] = directory.records()
        directory.close()
        data = path.read_bytes()
        at = sorted(size for size in states if size <= len(data))[-2:]
        for size in range(at[0], len(data) + 1):
            path.write_bytes(data[:size])
            found = open_directory(str(path))
            found.close()
            if size in states:
                assert found.records() == states[size]
            check_sound(found)
            assert path.stat().st_size <= size


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "journal"


@pytest.fixture
def filled(path: Path) -> tuple[Path, Any]:
    directory = open_directory(str(path))
    epoch = directory.join("gang")
    declared(directory, "gang", epoch, "one", "abc")
    directory.publish("gang", epoch, "write one abc", 3)
    directory.close()
    return path, directory.records()


def test_every_torn_tail_is_cut_and_said(
    filled: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path, state = filled
    data = path.read_bytes()
    for garbage in (b"\0", b"\0" * 11, b"\0" * 12, b"\0" * 500, data[-40:], data[len(MAGIC) :]):
        path.write_bytes(data + garbage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = open_directory(str(path))
        found.close()
        assert found.records() == state
        assert f"cut_at={len(data)} cut_bytes={len(garbage)} records=5 why=" in caplog.text
        assert path.read_bytes() == data


def test_every_flipped_bit_cuts_there_and_never_reads_as_something_else(
    filled: tuple[Path, Any],
) -> None:
    path, _ = filled
    data = path.read_bytes()
    whole = Journal(path)
    records = whole.replay()
    whole.close()
    for at in range(len(MAGIC), len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        journal = Journal(path)
        found = journal.replay()
        journal.close()
        assert found == records[: len(found)]
        assert len(found) < len(records)


def test_a_crash_while_the_file_is_begun_leaves_an_empty_directory(path: Path) -> None:
    path.parent.mkdir()
    for size in range(len(MAGIC) + 1):
        path.write_bytes(MAGIC[:size])
        found = open_directory(str(path))
        assert found.join("gang") == 1
        found.close()
        again = open_directory(str(path))
        assert again.join("gang") == 2
        again.close()


def test_another_file_is_not_taken_for_a_journal(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"a letter to my aunt")
    with pytest.raises(StoreError, match="is no journal of this version: move it away"):
        open_directory(str(path))
    assert path.read_bytes() == b"a letter to my aunt"


def test_after_a_crash_nothing_goes_until_old_leases_have_ended(
    filled: tuple[Path, Any],
) -> None:
    path, _ = filled
    now_s = [50.0]
    directory = open_directory(str(path), clock=lambda: now_s[0])
    (epoch,) = {held.epoch for held in directory._catalog.holders.values()}
    at = shelf("gang", "abc")
    directory.release("gang", epoch, "write one abc")
    lease = directory.lease("one", "abc", "gang", epoch, at)
    directory.end_lease(lease)
    with pytest.raises(InUse, match="leases from before the directory was started anew"):
        directory.withdraw("gang", epoch, "one", at)
    with pytest.raises(InUse, match=r"60\.0 s more"):
        directory.forget("one", "abc")
    directory.close()
    again = open_directory(str(path), clock=lambda: now_s[0])
    with pytest.raises(StaleHandle, match="the directory was started anew"):
        again.check(lease)
    now_s[0] += LONGEST_S
    assert again.withdraw("gang", epoch, "one", at) == 3
    assert again.forget("one", "abc")
    again.close()


def test_a_full_disk_refuses_and_leaves_file_and_directory_as_they_were(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = open_directory(str(path))
    epoch = directory.join("gang")
    state, data = directory.records(), path.read_bytes()
    write = os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:16], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"cannot write to journal .*: No space left on device"):
        directory.join("disk")
    with pytest.raises(StoreError, match="cannot compact"):
        directory.compact()
    assert directory.records() == state
    assert path.read_bytes() == data
    assert sorted(p.name for p in path.parent.iterdir()) == ["journal", "journal.lock"]
    monkeypatch.undo()
    assert directory.join("disk") == epoch + 1
    state = directory.records()
    directory.close()
    again = open_directory(str(path))
    assert again.records() == state
    again.close()


def test_a_journal_that_cannot_be_mended_takes_nothing_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path)
    journal.replay()

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        journal.append(Joined("gang", 1))
    monkeypatch.undo()
    with pytest.raises(StoreError, match="could not be mended"):
        journal.append(Joined("gang", 1))
    journal.close()
    journal.close()


def test_a_crash_while_compacting_leaves_the_old_journal(
    filled: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = filled
    path.with_name("journal.new").write_bytes(MAGIC + b"half of a snap")
    directory = open_directory(str(path))
    assert directory.records() == state
    directory.compact()
    directory.close()
    again = open_directory(str(path))
    assert again.records() == state
    again.close()
    assert sorted(p.name for p in path.parent.iterdir()) == ["journal", "journal.lock"]


def test_a_journal_that_grows_is_compacted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "COMPACT_BYTES", 2000)
    journal = Journal(path, sync="os")
    directory = Directory(journal)
    for _ in range(500):
        epoch = directory.join("gang")
        directory.leave("gang", epoch)
    assert journal.size_bytes < 2100
    directory.close()
    again = open_directory(str(path))
    assert again.join("gang") == 501
    again.close()


def test_two_processes_cannot_write_one_journal(path: Path) -> None:
    first = Journal(path)
    with pytest.raises(StoreError, match="is in use by another process"):
        Journal(path)
    first.close()
    Journal(path).close()
    with pytest.raises(ValueError, match="wanted 'always' or 'os'"):
        Journal(path, sync="never")  # type: ignore[arg-type]
