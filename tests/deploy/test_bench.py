"""`bench prefill` with the real transformers model in a process beside it."""

from pathlib import Path

import msgspec
import pytest

from ringspan.deploy.bench.prefill import Row
from ringspan.deploy.cli import run

SMALL = ["bench", "prefill", "--model", "random:tiny", "--device", "cpu", "--local"]


def test_a_row_has_times_of_both_and_their_ratio(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = ["--tokens", "300", "--repeats", "2", "--ranks", "2", "--json", str(rows)]
    assert run([*SMALL, *asked]) == 0
    row = msgspec.json.decode(rows.read_bytes(), type=Row)
    assert len(row.all_s) == len(row.baseline_s) == 2
    assert row.median_ratio is not None
    assert row.tokens == 300
    assert "transformers in one process" in capfd.readouterr().out


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--repeats", "0"]], ids=str)
def test_nothing_to_measure_is_refused(wrong: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, *wrong]) == 2
    assert "wanted at least 1 of each" in capfd.readouterr().err
