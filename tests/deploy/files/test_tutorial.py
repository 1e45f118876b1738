"""docs/tutorial.md, its shell blocks one after the other in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # two loads of the model: half a minute
def test_the_tutorial_runs(root: Path, blocks, tmp_path: Path) -> None:
    shims = tmp_path / "bin"
    shims.mkdir()
    command = shims / "ringspan"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m ringspan.deploy.cli "$@"\n')
    command.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    env = {
        **os.environ,
        "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root / "src"),
    }
    said = []
    for block in blocks((root / "docs/tutorial.md").read_text()):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=here, env=env, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        said.append(done.stdout)
    assert len((here / "id").read_text().split()) == 1
    assert "48213" in said[2]
    assert "notes" in said[3]
    assert said[4].startswith("removed ")
