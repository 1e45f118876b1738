"""Every bad input of a person, through the real command: one line, a status, nothing left."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ringspan.deploy import cli

SOURCE = Path(cli.__file__).resolve().parents[1] / "src"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster, no store of the person who runs the tests."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RINGSPAN_TRACEBACK", raising=False)
    monkeypatch.setenv("RINGSPAN_STORE", str(tmp_path / "store"))
    np.save(tmp_path / "ids.npy", np.arange(300, dtype=np.int32) % 250)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "junk.txt").write_bytes(b"\x00\x01\x02")
    (tmp_path / "text.txt").write_text("A text of a few words.\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("words\n")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)


def refused(
    capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2, says: str
) -> None:
    capsys.readouterr()
    assert cli.run(arguments) == status
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("ringspan: ")]
    assert said.err.splitlines()[-1:] == lines, said.err
    assert says in lines[0]


PREFILL = ("prefill", "--model", "random:tiny", "--local", "--ranks", "1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*PREFILL, "--input", "nowhere.txt"), "no such file or folder: nowhere.txt"),
        ((*PREFILL, "--input", "empty.txt"), "empty.txt is empty"),
        ((*PREFILL, "--input", "text.txt", "junk.txt"), "junk.txt is binary: a NUL byte at byte 0"),
        ((*PREFILL, "--input", "folder", "--pattern", "*.py"), "no file matching *.py"),
        (("prefill", "--input", "ids.npy"), "--model"),
        (("prefill", "--model", "smollm2"), "--input"),
        (
            ("prefill", "--model", "gpt-9", "--input", "ids.npy", "--local"),
            "unknown model 'gpt-9'; known:",
        ),
        (
            ("prefill", "--model", "./nowhere", "--input", "ids.npy", "--local"),
            "no such folder",
        ),
        ((*PREFILL, "--input", "ids.npy", "--codec", "mp3"), "unknown codec 'mp3'; known: bf16"),
        (
            (*PREFILL, "--input", "ids.npy", "--fidelity", "perfect"),
            "unknown fidelity 'perfect'; known: 16-bit",
        ),
        (
            (*PREFILL, "--input", "ids.npy", "--codec", "int8", "--fidelity", "exact"),
            "--codec int8 keeps 8-bit, asked for is exact or better",
        ),
        ((*PREFILL, "--input", "ids.npy", "--scheme", "star"), "unknown scheme 'star'; known:"),
        ((*PREFILL, "--input", "ids.npy", "--layout", "heap"), "unknown layout 'heap'; known:"),
        ((*PREFILL, "--input", "ids.npy", "--backend", "abacus"), "unknown attention backend"),
        ((*PREFILL, "--input", "ids.npy", "--dtype", "int3"), "unknown dtype 'int3'"),
        ((*PREFILL, "--input", "ids.npy", "--device", "tpu"), "unknown device 'tpu'"),
        ((*PREFILL, "--input", "ids.npy", "--transport", "pigeon"), "unknown transport 'pigeon'"),
        ((*PREFILL, "--input", "ids.npy", "--transport", "gloo"), "--local puts all ranks"),
        ((*PREFILL, "--input", "ids.npy", "--rope-scaling", "yarn"), "no number behind the colon"),
        ((*PREFILL, "--input", "ids.npy", "--chunk-tokens", "0"), "--chunk-tokens 0: wanted"),
        ((*PREFILL, "--input", "ids.npy", "--chunk-tokens", "100"), "--chunk-tokens 100: wanted"),
        ((*PREFILL, "--input", "ids.npy", "--chunk-tokens", "many"), "valid integer"),
        ((*PREFILL, "--input", "ids.npy", "--limit-tokens", "0"), "--limit-tokens 0: wanted"),
        ((*PREFILL, "--input", "ids.npy", "--ranks", "0"), "--ranks 0: wanted at least 1"),
        (
            ("prefill", "--model", "random:tiny", "--input", "ids.npy", "--ranks", "4096"),
            "4096 ranks asked for",
        ),
        ((*PREFILL, "--input", "ids.npy", "--json", "no/run.json"), "there is no folder no"),
        ((*PREFILL, "--input", "text.txt"), "has no tokenizer"),
        (("ask", "0123456789abcdef", "who?"), "no such folder"),
        (("contexts", "show", "0123"), "no such folder"),
        (("doctor", "--needles", "10"), "needles"),
        (("frobnicate",), "frobnicate"),
        (("prefill", "--frobnicate"), "--frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_it_is_refused_in_one_line_that_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    before = sorted(os.listdir(tmp_path))
    refused(capsys, *arguments, says=says)
    assert sorted(os.listdir(tmp_path)) == before  # nothing half-written stays


def test_a_document_longer_than_the_models_positions_is_refused_before_it_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    np.save(tmp_path / "long.npy", np.zeros(2_097_153, dtype=np.int32))
    refused(capsys, *PREFILL, "--input", "long.npy", says="--rope-scaling yarn:")


def test_an_id_outside_the_vocabulary_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    np.save(tmp_path / "wild.npy", np.array([1, 2, 2_000_000_000]))
    refused(capsys, *PREFILL, "--input", "wild.npy", says="wild.npy: token id 2000000000")


def test_a_store_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys, *PREFILL, "--input", "ids.npy", "--store", "file", status=1, says="file is a file"
    )


def test_a_store_without_rights_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    arguments = (*PREFILL, "--input", "ids.npy", "--store", "locked")
    if os.geteuid() != 0:
        refused(capsys, *arguments, status=1, says="no right to write in locked")
        return
    tmp_path.chmod(0o755)
    os.seteuid(65534)  # root may write everywhere: be nobody for a moment
    try:
        assert os.access("locked", os.W_OK, effective_ids=True) is False
        refused(capsys, *arguments, status=1, says="locked")
    finally:
        os.seteuid(0)


def test_as_a_process_it_writes_the_line_to_stderr_and_ends_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ringspan.deploy.cli", *PREFILL, "--input", "nowhere.txt"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "ringspan: no such file or folder: nowhere.txt\n"


def test_a_traceback_is_shown_to_who_asks_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGSPAN_TRACEBACK", "1")
    assert cli.run([*PREFILL, "--input", "nowhere.txt"]) == 2
    assert "Traceback" in capsys.readouterr().err
