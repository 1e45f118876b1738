"""`ringspan status`, `ringspan trace`, and the files that a prefill leaves for onlookers."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from ringspan.cluster.board import ContextStatus, PrefillStatus, Report, Seen
from ringspan.deploy.cli import run
from ringspan.deploy.commands.status import drawn
from ringspan.errors import BadInput

PREFILL = PrefillStatus(
    context_id="c" * 16,
    tokens_done=8192,
    num_tokens=12288,
    chunk_index=1,
    num_chunks=3,
    tokens_per_s=402.4,
    left_s=21.0,
    kv_bytes=377_000_000,
    elapsed_s=20.0,
)
REPORT = Report(
    source="host:17",
    command="ringspan prefill",
    model="random:tiny",
    ranks=("cuda:0 of host", "cuda:1 of host"),
    transport="nccl",
    contexts=(
        ContextStatus(
            context_id="d" * 16, num_tokens=5000, codec="int8", kv_bytes=10, fidelity="8-bit"
        ),
    ),
    prefill=PREFILL,
    tiers={"host": 2_000_000},
    pages={"verified": {"disk": 9}, "quarantined": {"disk": 1}},
    waiting=4,
    faults=1,
    last_fault="rank 1 died",
)


def text_of(seen: tuple[Seen, ...]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(drawn(seen))
    return out.getvalue()


def test_a_controller_is_drawn_with_all_it_is_at() -> None:
    text = text_of((Seen(report=REPORT, age_s=30.0),))
    for part in (
        "ringspan prefill  (host:17, heard 0:30 ago)",
        "2 ranks of random:tiny by nccl on cuda:0 of host, cuda:1 of host",
        "################--------  8,192 of 12,288 tokens, chunk 2 of 3, 402 tokens/s, 0:21 left",
        "KV 377 MB",
        "waiting   4 requests",
        "tiers     host 2 MB",
        "pages     1 quarantined",
        "faults    1, the last: rank 1 died",
        "5,000",
    ):
        assert part in text, f"{part!r} not in\n{text}"
    assert "verified" not in text


def test_a_pause_and_an_empty_cluster_are_said() -> None:
    paused = msgspec.structs.replace(PREFILL, paused="rank 1 died")
    report = msgspec.structs.replace(REPORT, prefill=paused)
    assert "paused: rank 1 died" in text_of((Seen(report=report, age_s=0.0),))
    assert "nothing of ringspan runs on this cluster" in text_of(())


def test_status_without_a_cluster_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run(["status"]) == BadInput.exit_status
    assert "set RAY_ADDRESS" in capsys.readouterr().err
    assert run(["status", "--every", "0"]) == BadInput.exit_status
    assert "--every 0: wanted" in capsys.readouterr().err


def _prefill(tmp_path: Path, *more: str) -> list[str]:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(1).integers(0, 256, size=1500, dtype=np.int32))
    return [
        "prefill", "--model", "random:tiny", "--input", str(ids), "--plain",
        "--store", str(tmp_path / "store"), "--ranks", "2", "--device", "cpu",
        "--chunk-tokens", "512", *more,
    ]  # fmt: skip


def test_a_prefill_leaves_a_trace_metrics_and_its_decisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("run.trace", "run.prom", "log.jsonl", "run.json")]
    options = [
        part
        for option, path in zip(
            ("--trace", "--metrics", "--decisions", "--json"), files, strict=True
        )
        for part in (option, str(path))
    ]
    assert run(_prefill(tmp_path, "--local", *options)) == 0
    trace = msgspec.json.decode(files[0].read_bytes())["traceEvents"]
    chunks = [e for e in trace if e.get("cat") == "compute"]
    assert {(e["pid"], e["name"]) for e in chunks} == {
        (rank, name)
        for rank in (0, 1)
        for name in ("chunk 0 [0, 512)", "chunk 1 [512, 1024)", "chunk 2 [1024, 1500)")
    }
    assert all(e["dur"] > 0 for e in chunks)
    assert {e["pid"] for e in trace if e.get("cat") == "write"} == {0, 1}
    metrics = files[1].read_text()
    assert 'ringspan_prefill_tokens_total{source="computed"} 1500.0' in metrics
    assert "ringspan_prefill_chunks_total 3.0" in metrics
    assert "ringspan_prefills_running 0.0" in metrics
    (line,) = files[2].read_bytes().splitlines()
    decision: dict[str, Any] = msgspec.json.decode(line)
    assert (decision["kind"], decision["decision"]["chunk_tokens"]) == ("plan", 512)
    capsys.readouterr()

    assert run(["trace", str(files[3]), str(tmp_path / "again.trace")]) == 0
    again = msgspec.json.decode((tmp_path / "again.trace").read_bytes())["traceEvents"]
    assert [e["name"] for e in again if e.get("tid") == 1] == [
        "chunk 0 [0, 512)", "chunk 1 [512, 1024)", "chunk 2 [1024, 1500)",
    ]  # fmt: skip
    assert {"read", "start", "prefill", "save"} <= {e["name"] for e in again}


@pytest.mark.parametrize("option", ["--trace", "--metrics", "--decisions"])
def test_a_file_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    for path, why in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "there is no folder")):
        assert run(_prefill(tmp_path, "--local", option, str(path))) == BadInput.exit_status
        error = capsys.readouterr().err
        assert f"{option} {path}" in error
        assert why in error
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("contexts/*"))


def test_trace_refuses_what_is_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "x.trace")
    assert run(["trace", str(tmp_path / "none.json"), out]) == BadInput.exit_status
    assert "cannot read the record" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"a": 1}')
    assert run(["trace", str(tmp_path / "bad.json"), out]) == BadInput.exit_status
    assert "is no record of a run" in capsys.readouterr().err
    assert not Path(out).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_status_sees_a_prefill_that_runs_on_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ringspan.cluster.board_actor import look
    from ringspan.cluster.ray_cluster import connect

    with connect(num_cpus=4):
        assert look() == ()
        seen: list[Seen] = []
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                seen.extend(look())
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert run(_prefill(tmp_path)) == 0
        finally:
            done.set()
            watcher.join()
        running = [one.report for one in seen if one.report.prefill is not None]
        assert running, "nobody reported"
        assert running[-1].model == "random:tiny"
        assert len(running[-1].ranks) == 2
        assert any(r.prefill and r.prefill.num_tokens == 1500 for r in running)
        capsys.readouterr()
        monkeypatch.setenv("RAY_ADDRESS", "this one is joined already")
        assert run(["status", "--json"]) == 0
        assert msgspec.json.decode(capsys.readouterr().out) == []  # the command has ended
        assert run(["status", "--once"]) == 0
        assert "nothing of ringspan runs" in capsys.readouterr().out
