"""`ringspan bench serve` against real servers, and against what is none."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from ringspan.deploy.cli import run


def test_endpoints_are_measured_side_by_side(
    smollm2: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    asked = ["bench", "serve", smollm2.url, "--against", f"again={smollm2.url}", "--chars", "1500"]
    how = ["--streams", "1,2", "--answer-tokens", "4", "--repeats", "2"]
    assert run([*asked, *how, "--json", str(rows), "--markdown", str(table)]) == 0
    first, second = map(json.loads, rows.read_text().splitlines())
    assert (first["endpoint"], second["endpoint"]) == ("ringspan", "again")
    for row in (first, second):
        assert row["model"] == "smollm2"
        assert row["answer_tokens"] == 4
        # every round has a copy of its own: what is warm was cached by that round's first question
        assert 0.5 * row["prompt_tokens"] < row["cached_tokens"] < row["prompt_tokens"]
        assert row["warm_first_token_s"]["max"] < row["cold_first_token_s"]["min"]
        assert set(row["tokens_per_s"]) == {"1", "2"}
        assert all(0 < spread["min"] <= spread["max"] for spread in row["tokens_per_s"].values())
    assert table.read_text() == capsys.readouterr().out[: -len("\n")]
    assert table.read_text().startswith("| endpoint | prompt tokens |")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--streams", "0"], "--streams 0: wanted numbers from 1 to"),
        (["--against", "nameless"], "--against nameless: wanted NAME=URL"),
        (["--input", "no-such-file"], "--input no-such-file: "),
        (["--repeats", "0"], "wanted at least 1 of each"),
    ],
)
def test_bad_options_are_one_line(
    smollm2: Any, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "serve", smollm2.url, *options]) == 2
    heard = capsys.readouterr().err.strip()
    assert said in heard
    assert "\n" not in heard


def test_what_is_no_endpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler
    ) as other:
        threading.Thread(target=other.serve_forever).start()
        url = f"http://127.0.0.1:{other.server_port}"
        assert run(["bench", "serve", url]) == 2
        assert f"{url}/v1/models answered 404 and names no model" in capsys.readouterr().err
        other.shutdown()
    assert run(["bench", "serve", url]) == 2
    assert "does not answer" in capsys.readouterr().err
