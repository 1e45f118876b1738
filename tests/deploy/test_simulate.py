"""`ringspan simulate`: the table, the rows, the plot; what is refused, and how."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ringspan.cluster.simulate_runs import SimulateRow
from ringspan.deploy import cli

SMALL = ("simulate", "--nodes", "2", "--requests", "200", "--rate", "1", "--policies",
         "planner,fixed:2,remote:1")  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_every_policy_has_a_line_and_a_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    outputs = ("--json", "rows.jsonl", "--markdown", "table.md", "--plots", "plots")
    assert cli.run([*SMALL, *outputs, "--fault-hours", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    rows = [
        msgspec.json.decode(line, type=SimulateRow)
        for line in (tmp_path / "rows.jsonl").read_bytes().splitlines()
    ]
    assert [row.policy for row in rows] == ["planner", "fixed:2", "remote:1"]
    assert [line.split()[0] for line in table[:4]] == ["policy", "planner", "fixed:2", "remote:1"]
    assert all(row.figures.done + row.figures.refused == 200 for row in rows)
    assert all(row.broken == () and row.speeds.startswith("assumed") for row in rows)
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    assert (tmp_path / "plots" / "simulate_goodput.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policies", "best"), "unknown policy 'best'; known: fixed:N, planner, remote:N"),
        (("--policies", "fixed:3"), "policy fixed:3: wanted a power of two"),
        (("--policies", ","), "--policies is empty"),
        (("--nodes", "1"), "policy remote:1 wants a node for prefill and one for decode"),
        (("--nodes", "0"), "--nodes 0, --node-devices 8: wanted at least 1 node"),
        (("--node-devices", "6"), "--node-devices 6: wanted at least 1 node, and a power of two"),
        (("--rate", "0"), "--rate 0: wanted more than 0"),
        (("--requests", "0"), "--requests 0"),
        (("--device-name", "abacus"), "unknown device 'abacus'"),
        (("--model", "gpt-9"), "unknown model 'gpt-9'"),
        (("--trace", "none.jsonl"), "none.jsonl: No such file"),
        (("--json", "no/rows.jsonl"), "cannot write no/rows.jsonl"),
    ],
)
def test_bad_questions_are_refused_in_one_line(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*SMALL, *arguments]) != 0
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("ringspan: ")
    ]
    assert says in line
