"""The environment that a benchmark's peers run in: a folder of their own, at pinned versions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ringspan.errors import BadInput, RingspanError

PeersPython = Annotated[
    Path | None,
    typer.Option("--peers-python", help="Interpreter of the peers' environment."),
]
MakePeers = Annotated[
    Path | None,
    typer.Option("--make-peers", help="Make that environment in this folder, and use it."),
]


def make_environment(folder: str | Path, packages: Sequence[str]) -> Path:
    """A virtual environment in `folder` with these packages; gives its interpreter."""
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "-q", *packages]
    if subprocess.run(install, check=False).returncode:
        raise RingspanError(f"pip could not install {', '.join(packages)} into {folder}; see above")
    return python


def check_environment(python: Path, modules: str, also: str = "") -> None:
    """Refuse before the run rather than within it. modules: as `import` takes them; also: what else
    may help."""
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", f"import {modules}"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise BadInput(f"--peers-python {python}: {error.strerror}; wanted a Python") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BadInput(
            f"--peers-python {python} lacks what the peers need ({last}); make an environment with "
            f"--make-peers FOLDER{also}"
        )
