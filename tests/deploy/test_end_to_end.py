"""The commands on a small model: prefill, ask, verify, and what happens to a damaged store."""

import io
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ringspan.cluster.ray_cluster import connect
from ringspan.deploy import cli
from ringspan.deploy.record import read_record

PREFILL = ("prefill", "--model", "random:tiny", "--input", "ids.npy", "--local", "--ranks", "2")
NUM_TOKENS = 411


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store with one context, and the context's id."""
    folder = tmp_path_factory.mktemp("made")
    ids = np.random.default_rng(3).integers(0, 1000, NUM_TOKENS, dtype=np.int32)
    np.save(folder / "ids.npy", ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            cli.run([*PREFILL, "--store", "store", "--chunk-tokens", "256", "--json", "r.json"])
            == 0
        )
    context_id = read_record(folder / "r.json").context_id
    assert context_id is not None
    return folder, context_id


@pytest.fixture
def here(made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the store of `made`, to do harm to."""
    shutil.copytree(made[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("RINGSPAN_STORE", "store")
    return tmp_path / "copy"


def test_the_record_tells_what_was_done(made: tuple[Path, str]) -> None:
    record = read_record(made[0] / "r.json")
    assert record.outcome == "ok"
    assert record.plan is not None
    assert (record.plan.num_tokens, record.plan.chunk_tokens) == (NUM_TOKENS, 256)
    assert [rank.rank for rank in record.ranks] == [0, 1]
    assert record.prefill is not None
    assert record.prefill.flops > 0
    assert len(record.prefill.chunk_s) == 2
    assert {"read", "tokenise", "start", "prefill", "save"} <= {p.name for p in record.phases}


def test_answers_do_not_hang_on_the_number_of_ranks(
    here: Path, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for ranks in ("1", "3"):
        ask = ("ask", made[1][:6], "5 17 9", "4", "--local", "--ranks", ranks, "--max-tokens", "4")
        assert cli.run([*ask, "--json", "ask.json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    lines = said[0].splitlines()
    assert (lines[0], lines[3]) == ("> 5 17 9", "> 4")
    assert len(lines[1].split()) == len(lines[4].split()) == 4
    record = read_record(here / "ask.json")
    assert [(a.question, a.answer) for a in record.answers] == [
        ("5 17 9", lines[1]),
        ("4", lines[4]),
    ]


def test_questions_of_a_pipe_are_answered_and_a_chat_goes_on(
    here: Path,
    made: tuple[Path, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = []
    for chat in ([], ["--chat"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("5 17\n\n5 17\n"))
        ask = ["ask", made[1], "--local", "--ranks", "1", "--max-tokens", "3", *chat]
        assert cli.run(ask) == 0
        said = capsys.readouterr()
        lines = said.out.splitlines()
        answers.append((lines[1], lines[4]))
        assert "3 tokens: the first after" in said.err
    assert answers[0][0] == answers[0][1] == answers[1][0]  # fresh sessions answer alike
    assert answers[1][1] != answers[1][0]  # a session that goes on has read more


def test_a_context_that_is_there_is_not_computed_again_unless_asked(
    here: Path, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for extra, computed in (([], False), (["--again"], True)):
        assert cli.run([*PREFILL, "--json", "again.json", *extra]) == 0
        assert capsys.readouterr().out == f"{made[1]}\n"
        assert (read_record(here / "again.json").prefill is not None) == computed


def test_contexts_are_listed_shown_verified_and_removed(
    here: Path, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["list"], ["show", made[1][:4]], ["verify", made[1]]):
        assert cli.run(["contexts", *command]) == 0
        assert made[1] in capsys.readouterr().out
    assert cli.run(["contexts", "show", made[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == NUM_TOKENS
    assert cli.run(["contexts", "rm", made[1], "0000"]) == 2  # all or none
    assert "unknown context '0000'" in capsys.readouterr().err
    assert cli.run(["contexts", "rm", made[1]]) == 0
    capsys.readouterr()
    assert cli.run(["contexts", "list"]) == 0
    assert "no contexts in store" in capsys.readouterr().out


def test_a_corrupt_page_is_named_and_computed_again_before_it_is_answered_from(
    here: Path, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    asking = ("ask", made[1], "5", "--local", "--ranks", "2", "--max-tokens", "2")
    assert cli.run([*asking]) == 0
    answer = capsys.readouterr().out
    segment = next((here / "store" / "contexts" / made[1]).glob("*.seg"))
    data = bytearray(segment.read_bytes())
    data[len(data) * 3 // 4] ^= 1  # within the second of its two pages
    segment.write_bytes(data)
    assert cli.run(["contexts", "verify", made[1]]) == 1
    said = capsys.readouterr()
    assert "1 of 4 pages are corrupt" in said.err
    tokens = here / "store" / "contexts" / made[1] / "tokens.npy"
    tokens.rename(here / "tokens.npy")
    assert cli.run([*asking]) == 1  # without them it cannot be computed
    assert capsys.readouterr().out == ""
    (here / "tokens.npy").rename(tokens)
    assert cli.run([*asking]) == 0
    said = capsys.readouterr()
    assert said.out == answer
    assert "1 computed again" in said.err
    assert cli.run(["contexts", "verify", made[1]]) == 0


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 200 kB: what a full disk does to a writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_store_without_room_loses_nothing_and_keeps_nothing_half_written(
    here: Path, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with small_files():
        assert cli.run([*PREFILL, "--limit-tokens", "400"]) == 1
    assert "ringspan: " in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (here / "store" / "contexts").iterdir()] == [made[1]]
    assert list((here / "store" / "staging").iterdir()) == []


def test_the_doctor_finds_every_needle_through_a_store(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = ("doctor", "--needles", "1500", "--needle-count", "9", "--local", "--no-speed")
    assert cli.run([*doctor, "--ranks", "3", "--store", "s", "--reopen-ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert "needles    9 of 9 in" in said
    assert "attention  reference" in said
    assert list((here / "s" / "contexts").iterdir()) == []  # it tidies up


def test_the_doctor_fails_when_needles_are_missed(capsys: pytest.CaptureFixture[str]) -> None:
    doctor = ("doctor", "--needles", "1500", "--needle-count", "9", "--local", "--no-speed")
    assert cli.run([*doctor, "--ranks", "1", "--codec", "int8", "--margin", "0.001"]) == 1
    assert "needles were not found" in capsys.readouterr().err.splitlines()[-1]


def test_the_doctor_measures_speeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    assert "attention_tflops" in capsys.readouterr().out
    assert read_record(tmp_path / "d.json").measured["copy_gb_per_s"] > 0


@pytest.mark.ray
@pytest.mark.slow  # test_ray_gang.py has the quick ones
def test_the_same_context_comes_out_of_a_ray_gang(
    here: Path, made: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("ask", made[1], "5 17 9", "--max-tokens", "3")
    assert cli.run([*ask, "--local", "--ranks", "1"]) == 0
    alone = capsys.readouterr().out
    prefill = [word for word in PREFILL if word != "--local"]
    with connect(num_cpus=2):  # one private Ray for both
        assert cli.run([*prefill, "--again", "--threads", "1"]) == 0
        assert capsys.readouterr().out == f"{made[1]}\n"
        assert cli.run([*ask, "--ranks", "2", "--threads", "1"]) == 0
        assert capsys.readouterr().out == alone
