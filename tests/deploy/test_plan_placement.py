"""`ringspan plan --nodes`: the controller's placement of a hypothetical request, told."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringspan.deploy import cli

PLAN = ("plan", "--model", "random:llama-3.1-8b", "--tokens", "262144", "--ranks", "1",
        "--device-name", "h200", "--scheme", "ring", "--chunk-tokens", "65536")  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("limit", "where"), [("100", "n0 device 0"), ("8", "n0 devices 0-7")])
def test_a_tighter_limit_takes_more_ranks(
    limit: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*PLAN, "--nodes", "4", "--ttft", limit]) == 0
    said = capsys.readouterr().out
    (chosen,) = (line for line in said.splitlines() if line.startswith("* ") and " n0 " in line)
    assert where in chosen
    assert "quoted     first token after" in said


def test_cached_tokens_keep_the_work_where_they_lie(capsys: pytest.CaptureFixture[str]) -> None:
    short = [word if word != "262144" else "1024" for word in PLAN]
    assert cli.run([*short, "--cached", "131072", "--nodes", "2"]) == 0
    said = capsys.readouterr().out
    assert any(line.startswith("* ") and "in place" in line for line in said.splitlines())


@pytest.mark.parametrize("wrong", [("--nodes", "0"), ("--nodes", "2", "--ttft", "0")])
def test_impossible_clusters_are_refused(
    wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*PLAN, *wrong]) == 2
    assert "wanted at least 1 node of a known machine" in capsys.readouterr().err
