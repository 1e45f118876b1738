"""deploy/slurm/prefill.sbatch, run with an `srun` and a `scontrol` that only write down what they
are asked: a real `ray symmetric-run` ends every Ray of the machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

SRUN = """#!{python}
import json, os, pathlib, sys
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
asked = dict(words=sys.argv[1:], mode=os.environ["RAY_AUTH_MODE"], token=token.read_text(),
             token_mode=token.stat().st_mode & 0o777, path=str(token))
pathlib.Path("asked.json").write_text(json.dumps(asked))
if os.environ["OUTCOME"]:
    record = sys.argv[sys.argv.index("--json") + 1]
    pathlib.Path(record).write_text(json.dumps(dict(outcome=os.environ["OUTCOME"])))
"""


@pytest.fixture
def script(root: Path) -> Path:
    return root / "deploy/slurm/prefill.sbatch"


@pytest.fixture
def submit(script: Path, tmp_path: Path):
    """Runs the script in an empty folder; its end, and what srun was asked."""

    def run(outcome: str, *options: str, **changed: str) -> tuple[Any, Any]:
        tools = tmp_path / "bin"
        tools.mkdir()
        python = Path(sys.executable)
        for name, text in {
            "srun": SRUN.format(python=python),
            "scontrol": "#!/bin/sh\nprintf 'node7\\nnode8\\n'\n",
            "python": f'#!/bin/sh\nexec "{python}" "$@"\n',
        }.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        env = {
            "PATH": f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(tmp_path), "HEAD_IP": "192.0.2.7",
            "MODEL": "/models/llama", "INPUT": "/data/a book.txt", "STORE": "/shared/contexts",
            "OUTCOME": outcome, **changed,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(script), *options],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        asked = tmp_path / "asked.json"
        return done, json.loads(asked.read_text()) if asked.exists() else None

    return run


def test_bash_reads_the_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")


def test_nodes_are_the_jobs_own(script: Path) -> None:
    """What ends Rays there must find only this job's."""
    directives = re.findall(r"^#SBATCH --([\w-]+)", script.read_text(), flags=re.M)
    assert {"exclusive", "nodes", "ntasks-per-node", "time"} <= set(directives)


def test_one_ray_over_all_nodes_runs_one_prefill(submit, parse) -> None:
    done, asked = submit("ok", "--codec", "int8", "--parity", "1")
    assert done.returncode == 0, done.stderr
    words = asked["words"]
    ray = words[words.index("ray") :]
    assert ray[:2] == ["ray", "symmetric-run"]
    cut = ray.index("--")
    context = symmetric_run.make_context("_", ray[2:cut], resilient_parsing=True)
    assert (context.params["address"], context.params["min_nodes"]) == ("192.0.2.7:6379", 2)
    start.make_context("start", curate_and_validate_ray_start_args(ray[2:cut]))
    assert ray[cut + 1 : cut + 4] == ["env", "RAY_ADDRESS=192.0.2.7:6379", "ringspan"]
    prefill = parse(ray[cut + 4 :])
    assert (prefill["ranks"], prefill["input_"]) == (16, ["/data/a book.txt"])
    assert (prefill["codec"], prefill["parity"]) == ("int8", 1)


def test_ray_asks_for_a_token_of_this_job(submit) -> None:
    _, asked = submit("ok")
    assert (asked["mode"], asked["token_mode"], len(asked["token"])) == ("token", 0o600, 64)
    assert not Path(asked["path"]).exists()


@pytest.mark.parametrize("outcome", ["", "RankLost: rank 3"], ids=["no-ray", "failed"])
def test_a_prefill_that_did_not_run_fails_the_job(submit, outcome: str) -> None:
    done, _ = submit(outcome)
    assert done.returncode != 0
    assert "no context was made" in done.stderr


def test_what_is_not_set_is_named(submit) -> None:
    done, asked = submit("ok", STORE="")
    assert done.returncode != 0
    assert "STORE" in done.stderr
    assert asked is None
