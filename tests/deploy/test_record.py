import os
from pathlib import Path

import pytest

from ringspan.deploy.machine import git_commit, hardware, usable_cores, versions
from ringspan.deploy.record import read_record, recording
from ringspan.errors import BadInput


def test_a_record_is_written_when_the_run_is_over(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with recording(path, {"model": "random:tiny", "input": ["a", "b"]}) as record:
        with record.phase("load"):
            pass
        assert not path.exists()
    back = read_record(path)
    assert back.outcome == "ok"
    assert back.asked["input"] == ["a", "b"]
    assert [phase.name for phase in back.phases] == ["load"]
    assert os.listdir(tmp_path) == ["run.json"]  # no scratch file is left


def test_a_run_that_failed_leaves_its_error(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(BadInput), recording(path, {}) as record, record.phase("load"):
        raise BadInput("no such thing")
    assert read_record(path).outcome == "BadInput: no such thing"
    assert read_record(path).phases[0].name == "load"


def test_a_record_says_versions_and_machine(tmp_path: Path) -> None:
    found = versions()
    assert {"ringspan", "python", "torch", "ray", "transformers"} <= found.keys()
    machine = hardware()
    assert machine.cores == usable_cores() >= 1
    assert machine.memory_bytes > 2**28
    assert machine.cpu
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 12


def test_a_record_that_could_not_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "no" / "run.json", "there is no folder"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(BadInput, match=says), recording(path, {}):
            pytest.fail("the run was started")
