"""`ringspan plan`: the table, the choice, the record; what is refused, and how."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from ringspan.deploy import cli
from ringspan.deploy.commands.plan import PlanRecord

PLAN = ("plan", "--model", "random:llama-3.1-8b", "--tokens", "262144", "--ranks", "4")
H200 = (*PLAN, "--device-name", "h200")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_table_has_every_way_and_the_choice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loaded = "ray" in sys.modules
    assert cli.run([*H200, "--link-gbs", "350", "--json", "plan.json"]) == 0
    assert loaded or "ray" not in sys.modules  # it plans without a cluster
    said = capsys.readouterr().out
    made = msgspec.json.decode((tmp_path / "plan.json").read_bytes(), type=PlanRecord)
    assert made.link.bytes_per_s == 350e9
    assert made.speeds.source.startswith("assumed")
    assert "assumed" in said
    schemes = {one.scheme for one in made.candidates}
    assert schemes == {"ring", "ring-direct", "all-gather", "pass-q", "gather-q", "ulysses",
                       "ulysses-ring"}  # fmt: skip
    chunks = {one.chunk_tokens for one in made.candidates}
    assert chunks == {8192, 16_384, 32_768, 65_536, 131_072, 262_144}
    lines = said.splitlines()
    rows = [line for line in lines if line[:2] in ("  ", "* ") and "zigzag" in line]
    assert len(rows) == len(made.candidates) == 42
    assert made.chosen is not None
    (chosen,) = (line for line in rows if line.startswith("*"))
    assert chosen.split()[1] == made.chosen.scheme
    assert f"choice     {made.chosen.scheme}" in said
    for word in ("runner-up", "worst", "TFLOP/s", "exposed s", "fits"):
        assert word in said
    assert made.chosen.predicted_s == pytest.approx(sum(made.chosen.predicted_chunk_s))
    ideal_s = made.flops / 4 / 665e12
    assert ideal_s < made.chosen.predicted_s < 1.15 * ideal_s


def test_what_is_named_is_not_varied(capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--scheme", "pass-q", "--chunk-tokens", "65536", "--codec", "int8")
    assert cli.run([*H200, *named, "--cached", "1048576"]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if "zigzag" in line and line[:2] in ("  ", "* ")]
    assert len(rows) == 1
    assert "pass-q" in rows[0]
    assert "behind 1048576 cached" in said.replace(",", "")


def test_a_slow_link_changes_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    turn = ("plan", "--model", "random:llama-3.1-8b", "--tokens", "4096", "--cached", "1048576",
            "--ranks", "8", "--device-name", "h100", "--codec", "int8")  # fmt: skip
    assert cli.run([*turn, "--link-gbs", "3", "--link-latency-us", "100"]) == 0
    said = capsys.readouterr().out
    assert any(f"choice     {name}" in said for name in ("gather-q", "pass-q"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*PLAN, "--device-name", "abacus"), "unknown device 'abacus'; known: a100, h100, h200"),
        (PLAN, "--ranks 4: wanted the link between them too, --link-gbs"),
        ((*PLAN, "--link-gbs", "10"), "the speeds of this machine were not measured"),
        ((*H200, "--link-gbs", "0"), "--link-gbs 0: wanted more than 0"),
        ((*H200, "--tokens", "0"), "--tokens 0"),
        ((*H200, "--cached", "100"), "--cached 100: wanted whole pages of 128 tokens"),
        ((*H200, "--ranks", "3", "--scheme", "ulysses"), "scheme ulysses over 3 ranks: 32 q and 8"),
        ((*H200, "--scheme", "star"), "unknown scheme 'star'; known: "),
        ((*H200, "--chunk-tokens", "1000"), "--chunk-tokens 1000: wanted a multiple"),
        ((*H200, "--model", "gpt-9"), "unknown model 'gpt-9'"),
        ((*H200, "--tokens", str(1 << 22)), "do not fit the 2097152 positions"),
        ((*H200, "--memory-gib", "4"), "the weights of random:llama-3.1-8b take"),
        ((*H200, "--json", "no/plan.json"), "there is no folder no"),
    ],
)
def test_bad_plans_are_refused_in_one_line(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert says in line


def test_nothing_that_fits_is_told_with_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*H200, "--memory-gib", "20", "--scheme", "ring"]) == 2
    said = capsys.readouterr()
    assert "nothing fits" in said.err
    assert "use fewer tokens, more ranks, or --codec int8" in said.err
    assert " no\n" in said.out


def test_a_prefill_tells_what_was_predicted_and_what_it_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import numpy as np

    from ringspan.cluster import speeds as measuring
    from ringspan.deploy.record import read_record

    monkeypatch.setattr(measuring, "CPU_SHAPE_S", 0.005)
    np.save("ids.npy", np.arange(400, dtype=np.int32))
    prefill = ("prefill", "--model", "random:tiny", "--input", "ids.npy", "--local", "--ranks", "2",
               "--store", "store", "--chunk-tokens", "256", "--json", "r.json")  # fmt: skip
    assert cli.run([*prefill, "--measure", "--deterministic", "--audit-rows", "2"]) == 0
    assert "predicted " in capsys.readouterr().err
    record = read_record(tmp_path / "r.json")
    assert record.plan is not None
    assert (record.plan.deterministic, record.plan.audit_rows) == (True, 2)
    done = record.prefill
    assert done is not None
    assert done.ratio == pytest.approx(done.elapsed_s / done.predicted_s)
    assert len(done.predicted_chunk_s) == len(done.chunk_ratio) == len(done.chunk_s) == 2
    assert cli.run([*prefill, "--again"]) == 0  # unmeasured on a CPU: nothing is predicted
    assert "not predicted" in capsys.readouterr().err
    unpredicted = read_record(tmp_path / "r.json").prefill
    assert unpredicted is not None
    assert (unpredicted.ratio, unpredicted.chunk_ratio) == (None, ())
    assert cli.run([*prefill, "--again", "--audit-rows", "-1"]) == 2
    assert "--audit-rows -1" in capsys.readouterr().err
