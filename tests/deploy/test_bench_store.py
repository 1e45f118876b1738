"""`ringspan bench store`: what it times is right, and what it compares is told apart."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ringspan.deploy.bench import store_peers, store_report, store_roads
from ringspan.deploy.bench.attention import Spread
from ringspan.deploy.bench.peers_environment import check_environment
from ringspan.deploy.bench.store import Asked, StoreRow, bench_store, missed
from ringspan.deploy.bench.store_case import (
    StoreCase,
    host_store,
    make_stored,
    new_shard,
    random_shard,
)
from ringspan.deploy.commands.bench import app
from ringspan.deploy.machine import Hardware
from ringspan.errors import BadInput, RingspanError

CASE = StoreCase(pages=3, num_layers=2, num_kv_heads=2, head_dim=32, repeats=1)


def asked(folder: Path, *parts: str) -> Asked:
    return Asked(case=CASE, parts=parts, folder=folder, memory=folder, command="ringspan bench")


def rows_of(folder: Path, *parts: str) -> list[StoreRow]:
    return list(bench_store(asked(folder, *parts)))


def test_every_tier_gives_a_row_that_can_be_read_back(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "host", "remote", "device")
    assert [(row.what, row.against) for row in rows] == [
        ("put host", "copy"),
        ("get host", "copy"),
        ("put remote", "plain files"),
        ("get remote", "plain files"),
        ("restore host", "memory copy"),
    ]
    for row in rows:
        assert row.payload_bytes == 3 * row.page_bytes == 3 * 2 * 2 * 128 * 2 * 32 * 2
        assert row.seconds.min > 0
        assert msgspec.json.decode(msgspec.json.encode(row), type=StoreRow) == row
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_without_fio_a_loop_reads_and_the_rows_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_peers.shutil, "which", lambda name: None)
    rows = rows_of(tmp_path, "disk")
    restored = [row for row in rows if row.what == "restore disk"]
    assert [row.against for row in restored] == ["preadv", "preadv, direct"]
    assert all("no fio" in row.note for row in restored)


def test_a_prefill_is_saved_and_timed_beside_one_that_is_not(tmp_path: Path) -> None:
    few = msgspec.structs.replace(asked(tmp_path, "prefill"), tokens=200, ranks=2)
    [row] = bench_store(few)
    assert (row.what, row.against) == ("saved prefill", "without a store")
    assert row.payload_bytes > row.page_bytes > 0


def test_other_bytes_from_a_tier_end_the_benchmark(tmp_path: Path) -> None:
    stored = make_stored(CASE, tmp_path / "store")
    with host_store(1 << 30, tmp_path) as tier:
        road = store_roads.TierRoad(stored, tier)
        road.put()
        next(iter(road._pages)).payload[5] ^= 1
        with pytest.raises(RingspanError, match="gave other bytes back"):
            road.get()


def test_a_restored_shard_that_differs_ends_the_benchmark() -> None:
    shard = random_shard(CASE)
    other = new_shard(shard, "cpu")
    other.reserve(shard.spans)
    for page in range(CASE.pages):
        payload = torch.zeros((1, shard.page_bytes), dtype=torch.uint8)
        other.fill(page * shard.page_tokens, shard.page_tokens, payload)
    other.mark_filled()
    with pytest.raises(RingspanError, match="layer 0 came back"):
        store_roads.check_same(shard, other)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_pages_of_every_codec_go_the_same_way(tmp_path: Path, codec: str) -> None:
    case = msgspec.structs.replace(CASE, codec=codec, head_dim=64)
    stored = make_stored(case, tmp_path / "store")
    road = store_roads.DiskRoad(stored, tmp_path)
    assert road.restore() > 0
    assert road.save() > 0


def row(ratio: float, target: float | None) -> StoreRow:
    spread = Spread.of([1.0])
    return StoreRow(
        command="ringspan bench store",
        what="get host",
        against="Mooncake",
        case=CASE,
        page_bytes=1 << 20,
        payload_bytes=3 << 20,
        seconds=spread,
        against_seconds=Spread.of([ratio]),
        ratio=Spread.of([ratio]),
        target=target,
        device="cpu",
        hardware=Hardware(host="h", cpu="a cpu", cores=2, memory_bytes=1, gpus=()),
        versions={"ringspan": "0"},
    )


def test_missed_names_the_rows_beneath_their_target() -> None:
    good, bad, free = row(2.1, 2.0), row(1.9, 2.0), row(0.1, None)
    assert missed([good, bad, free]) == [bad]


def test_the_table_has_a_row_each_and_the_machine(tmp_path: Path) -> None:
    text = store_report.markdown([row(2.5, 2.0)])
    assert "| get host | 0.00 |" in text
    assert "| Mooncake | 0.00 | 2.50 | 2.50 to 2.50 | 2 |" in text
    assert "a cpu, 2 cores" in text
    store_report.append(row(2.5, 2.0), tmp_path / "rows")
    assert msgspec.json.decode((tmp_path / "rows").read_bytes(), type=StoreRow).target == 2.0


# the peer's process


def fake_python(folder: Path, body: str) -> Path:
    """An interpreter that runs `body` whatever it is told to run."""
    script = folder / "fake.py"
    script.write_text(body)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_what_the_peers_libraries_print_is_passed_over(tmp_path: Path) -> None:
    python = fake_python(
        tmp_path,
        "import sys\n"
        "input(); print('I0000 starting'); print('ready', flush=True)\n"
        "for line in sys.stdin: print('some words'); print(0.25, flush=True)\n",
    )
    np.save(tmp_path / "pages.npy", np.zeros((1, 8), np.uint8))
    with store_peers.Mooncake(python, "Mooncake", tmp_path / "pages.npy", tmp_path) as peer:
        assert peer.put() == 0.25
        assert peer.get() == 0.25


def test_a_peer_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "import sys; input(); sys.exit('no memory for a segment')\n")
    with pytest.raises(RingspanError, match=r"Mooncake ended at .*: no memory for a segment"):
        store_peers.Mooncake(python, "Mooncake", tmp_path / "pages.npy", tmp_path)


def test_an_environment_without_mooncake_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--make-peers"):
        check_environment(
            fake_python(tmp_path, "import no_such_package_at_all\n"), store_peers.MODULES
        )
    with pytest.raises(BadInput, match="wanted a Python"):
        check_environment(tmp_path / "nothing", store_peers.MODULES)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--parts", "host,tape"], "part 'tape'"),
        (["--pages", "0"], "--pages 0"),
        (["--pages", "99999999"], "must fit"),
        (["--folder", "/no/such/folder"], "is no folder"),
        (["--codec", "gzip"], "codec 'gzip'"),
    ],
    ids=["part", "no-pages", "too-many", "no-folder", "codec"],
)
def test_bad_input_is_one_line_before_anything_is_written(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(app, ["store", "--device", "cpu", *arguments])
    assert isinstance(done.exception, BadInput | ValueError | RingspanError)
    assert text in str(done.exception)
