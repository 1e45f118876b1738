"""`ringspan contexts verify --deep` and `contexts repair`, as a person types them."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ringspan.deploy import cli
from ringspan.kvstore.folder import Store
from ringspan.kvstore.testing import make_context
from ringspan.kvstore.tiers.moving import move
from ringspan.kvstore.tiers.placement import TierName, read_placement

PREFILL = ("prefill", "--model", "random:tiny", "--input", "ids.npy", "--local", "--ranks", "2")
GANG = ("--local", "--ranks", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two stores of one context: `store`, and `parity` that has parity."""
    folder = tmp_path_factory.mktemp("made")
    np.save(folder / "ids.npy", np.random.default_rng(3).integers(0, 1000, 900, dtype=np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for store, more in (("store", ()), ("parity", ("--parity", "1"))):
            assert cli.run([*PREFILL, "--store", store, "--chunk-tokens", "512", *more]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def name_in(store: str) -> str:
    return Store(store).ids()[0]


def damage(store: str, *indexes: int) -> None:
    opened = Store(store)
    manifest = opened.manifest(name_in(store))
    for index in indexes:
        record = manifest.pages[index]
        with open(opened.folder(manifest) / record.segment, "r+b") as file:
            file.seek(record.offset + record.frame_bytes // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 8]))


def run(store: str, command: str, *more: str) -> int:
    return cli.run(["contexts", command, name_in(store), "--store", store, *more])


def test_verify_deep_computes_pages_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store", "verify", "--deep", "--sample", "3", *GANG) == 0
    said = capsys.readouterr().out
    assert said.count("computed again, off by") == 3
    assert "3 pages computed again agree" in said
    assert run("store", "verify", "--deep", "--sample", "0") == 2


def test_parity_repairs_without_a_gang(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage("parity", 2, 7)
    assert run("parity", "verify") == 1
    assert "ringspan contexts repair" in capsys.readouterr().err
    assert run("parity", "repair", "--ranks", "0") == 0  # no gang is started
    said = capsys.readouterr().out
    assert "repaired 2 pages by road parity" in said
    assert "pages [256, 384): parity," in said
    assert "is whole again: 8 pages" in said
    assert run("parity", "verify") == 0
    assert "1 of parity to a stripe, all whole" in capsys.readouterr().out


def test_what_parity_cannot_bring_back_is_computed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage("store", 0, 3, 7)
    assert run("store", "repair", "--parity", "1", *GANG) == 0
    said = capsys.readouterr().out
    assert "computed 3 pages again" in said
    assert "wrote parity of 4 stripes" in said
    assert run("store", "verify", "--deep", *GANG) == 0
    (Path("store") / "contexts" / name_in("store") / "rank-0.seg").unlink()
    assert run("store", "repair", "--ranks", "0") == 0
    assert "by road parity" in capsys.readouterr().out


def test_a_member_and_its_parity_that_are_both_damaged(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("parity") / "contexts" / name_in("parity")
    for path in folder.glob("*.par"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert run("parity", "verify") == 1
    assert "with its parity" in capsys.readouterr().err
    damage("parity", 1)
    assert run("parity", "repair", *GANG) == 0
    assert run("parity", "verify") == 0


def test_what_cannot_be_repaired_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage("store", 4)
    folder = Path("store") / "contexts" / name_in("store")
    (folder / "tokens.npy").unlink()
    (folder / "index.copy").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run("store", "repair", *GANG) == 1
    assert "nothing can be repaired without it" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_lost_tokens_come_back_from_their_copy(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("store") / "contexts" / name_in("store")
    before = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(before[:-9])
    assert run("store", "verify") == 1
    assert run("store", "repair") == 0
    assert "tokens.npy was restored from its copy" in capsys.readouterr().out
    assert (folder / "tokens.npy").read_bytes() == before
    assert run("store", "verify") == 0


def test_a_whole_context_stays_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("store") / "contexts" / name_in("store")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run("store", "repair") == 0
    assert "is whole: 8 pages" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def damage_remote(url: str) -> None:
    """A bit in the middle of the largest object, which lies in a page's payload."""
    files = fsspec.filesystem("memory")
    name = max(files.find(url.removeprefix("memory:/")), key=files.size)
    data = bytearray(files.cat_file(name))
    data[len(data) // 2] ^= 1
    files.pipe_file(name, bytes(data))


def test_a_damaged_copy_in_another_tier_is_replaced_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_context(tmp_path / "s", 75)
    name = made.manifest.context_id
    move(made.store, name, TierName("remote", "memory://repair-copy"), keep=True)
    damage_remote("memory://repair-copy")
    assert len(made.store.verify(name).bad_pages) == 1
    assert run(str(tmp_path / "s"), "repair") == 0
    assert "repaired 1 pages by road disk" in capsys.readouterr().out
    assert made.store.manifest(name) == made.manifest


def test_pages_that_only_a_remote_tier_had_are_computed_and_go_back_there(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, name = Store("store"), name_in("store")
    move(store, name, TierName("remote", "memory://repair-only"))
    damage_remote("memory://repair-only")
    assert run("store", "repair", *GANG) == 0
    assert "computed 1 pages again" in capsys.readouterr().out
    folder = store.folder(store.manifest(name))
    assert [str(tier) for tier in read_placement(folder).tiers] == ["remote:memory://repair-only"]
    assert not list(folder.glob("*.seg"))
    assert run("store", "verify", "--deep", *GANG) == 0


def test_a_copy_in_another_tier_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_context(tmp_path / "s", 75)
    move(made.store, made.manifest.context_id, TierName("remote", "memory://repair"), keep=True)
    damage(str(tmp_path / "s"), 1)
    assert run(str(tmp_path / "s"), "repair") == 0
    assert "repaired 1 pages by road remote" in capsys.readouterr().out
    assert made.store.verify(made.manifest.context_id).ok
