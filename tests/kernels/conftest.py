"""What the tests of kernels share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ringspan


@pytest.fixture(scope="session")
def compiled_by(tmp_path_factory):
    """Machine code for sm_90 without a GPU, made by a process of its own: this one may run Triton's
    interpreter."""

    def compiled(script, *arguments, timeout_s=290):
        """The rows that `script` prints as JSON, by their names."""
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        env |= {
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
            "TRITON_DEFAULT_FP_FUSION": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(ringspan.__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])]
            ),
        }
        done = subprocess.run(
            [sys.executable, script, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return {row["name"]: row for row in json.loads(done.stdout)}

    return compiled
