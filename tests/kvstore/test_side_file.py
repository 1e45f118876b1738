"""`tiers.json` and `parity.json`: what is not whole is refused, and comes back from its copy."""

from __future__ import annotations

import random

import msgspec
import pytest

from ringspan.errors import StoreError
from ringspan.kvstore import parity
from ringspan.kvstore.audit import verify
from ringspan.kvstore.parity import ParityRows, mend_parity_rows, parity_rows, write_parity_rows
from ringspan.kvstore.repair import mend_parity
from ringspan.kvstore.side_file import mend_side_file, read_side_file, side_file_problems
from ringspan.kvstore.testing import make_context
from ringspan.kvstore.tiers import placement
from ringspan.kvstore.tiers.disk import DISK
from ringspan.kvstore.tiers.placement import (
    Placement,
    TierName,
    mend_placement,
    read_placement,
    write_placement,
)

SAID = Placement((TierName(DISK), TierName("remote", "file:///somewhere")), pinned=True)
MUTATIONS = 2000


@pytest.fixture
def folder(tmp_path):
    write_placement(tmp_path, SAID)
    return tmp_path


def both(folder):
    path = folder / placement.FILE
    return path, path.with_name(path.name + ".copy")


def mutated(data, dice):
    out = bytearray(data)
    at = dice.randrange(len(out))
    match dice.randrange(6):
        case 0:
            out[at] ^= 1 << dice.randrange(8)
        case 1:
            del out[at:]
        case 2:
            out[at : at + dice.randrange(1, 9)] = dice.randbytes(4)
        case 3:
            out += dice.randbytes(3)
        case 4:
            del out[at : at + dice.randrange(1, 30)]
        case _:
            out[at:at] = out[: dice.randrange(1, len(out))]
    return bytes(out)


def placed_or_said(folder):
    try:
        return read_placement(folder)
    except StoreError as error:
        return str(error)


def test_mutated_files_are_refused_or_their_copy_is_read(folder):
    path, copy = both(folder)
    whole, dice = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(MUTATIONS):
        spoilt = mutated(whole, dice)
        if spoilt == whole:
            continue
        path.write_bytes(spoilt)
        copy.write_bytes(whole)
        assert read_placement(folder) == SAID
        copy.write_bytes(spoilt)
        said = placed_or_said(folder)
        if said != SAID:
            assert isinstance(said, str), f"{spoilt!r} was taken for another placement"
            assert "\n" not in said
            assert path.name in said
            refused += 1
    assert refused > MUTATIONS * 0.9


def test_a_lost_or_damaged_file_is_told_and_mended(folder):
    path, copy = both(folder)
    for spoil in (
        lambda: path.unlink(),
        lambda: copy.unlink(),
        lambda: path.write_bytes(b""),
        lambda: copy.write_bytes(path.read_bytes()[:-1]),
        lambda: path.write_bytes(path.read_bytes().replace(b"true", b"false")),
    ):
        assert side_file_problems(path, Placement) == []
        spoil()
        assert len(side_file_problems(path, Placement)) == 1
        assert read_placement(folder) == SAID
        assert mend_side_file(path, Placement) == (path.name,)
    assert mend_side_file(path, Placement) == ()
    path.write_bytes(path.read_bytes().replace(b"true", b"false"))
    copy.write_bytes(b"{}")
    copy.unlink()
    with pytest.raises(StoreError, match=r"tiers\.json is damaged: its checksum differs"):
        read_placement(folder)


def test_a_copy_of_another_time_is_told(folder):
    path, copy = both(folder)
    old = copy.read_bytes()
    write_placement(folder, Placement())
    copy.write_bytes(old)
    assert side_file_problems(path, Placement) == [
        f"context {folder.name}: tiers.json and its copy differ"
    ]


def test_files_of_before_are_read(tmp_path):
    path = tmp_path / placement.FILE
    path.write_bytes(msgspec.json.encode(SAID))
    assert read_placement(tmp_path) == SAID
    assert side_file_problems(path, Placement) == []
    assert read_side_file(tmp_path / "none.json", Placement) is None
    assert side_file_problems(tmp_path / "none.json", Placement) == []


def test_rows_that_cannot_be_are_refused(tmp_path):
    (tmp_path / parity.FILE).write_bytes(b'{"rows": 7}')
    with pytest.raises(StoreError, match="7 rows of parity"):
        parity_rows(tmp_path)


def test_verify_tells_and_a_repair_mends_what_lies_beside_the_pages(tmp_path):
    made = make_context(tmp_path)
    folder = made.store.folder(made.manifest)
    mend_parity(made.store, made.manifest, 2)
    write_placement(folder, Placement(pinned=True))
    assert verify(folder).ok
    rows = folder / parity.FILE
    for path in (rows, rows.with_name(rows.name + ".copy")):
        path.write_bytes(b"\0" * 40)
    report = verify(folder)
    assert not report.ok
    assert not report.problems
    assert len(report.side_problems) == 2
    assert all("parity.json" in line for line in report.side_problems)
    assert mend_parity_rows(folder) == (parity.FILE,)
    assert parity_rows(folder) == 2
    assert verify(folder).ok
    for path in both(folder):
        path.unlink()
    (folder / placement.FILE).write_bytes(b"[]")
    with pytest.raises(StoreError, match=r"tiers\.json cannot be read"):
        read_placement(folder)
    report = verify(folder)
    assert "tiers.json cannot be read" in report.problems[0]
    assert mend_placement(folder) == (placement.FILE,)
    assert read_placement(folder) == Placement()
    assert verify(folder).ok
    for path in folder.glob("parity.json*"):
        path.unlink()
    assert verify(folder).bad_parity == (
        f"context {folder.name}: parity.json is missing, and there is parity",
    )
    (folder / "index.copy").write_bytes(b"rot")
    assert any("index.copy is missing or damaged" in line for line in verify(folder).side_problems)


def test_a_copy_of_another_manifest_is_told(tmp_path):
    made, other = make_context(tmp_path), make_context(tmp_path, seed=1)
    a, b = (m.store.folder(m.manifest) for m in (made, other))
    (a / "index.copy").write_bytes((b / "index.copy").read_bytes())
    assert "index.copy is not that of its manifest.json" in verify(a).side_problems[0]


def test_what_lies_nowhere_is_not_guessed(tmp_path):
    (tmp_path / placement.FILE).write_bytes(b"rot")
    with pytest.raises(StoreError, match=r"tiers\.json cannot be read"):
        mend_placement(tmp_path)
    write_parity_rows(tmp_path, 1)
    assert mend_parity_rows(tmp_path) == ()
    assert read_side_file(tmp_path / parity.FILE, ParityRows) == ParityRows(1)
