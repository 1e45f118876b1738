"""What this machine is and which versions run on it, for records and `ringspan doctor`.

Nothing here makes a CUDA context: GPUs are asked of nvidia-smi, which is there wherever the driver
is, and versions of the packages' metadata, so that no heavy import is paid for a report.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec

import ringspan

PACKAGES = ("torch", "triton", "ray", "transformers", "numpy", "flash-attn-4")
TOOL_TIMEOUT_S = 20.0


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    memory_bytes: int
    driver: str


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The host that the command ran on (a gang's ranks name their own devices)."""

    host: str
    cpu: str
    cores: int
    """Cores this process may use."""
    memory_bytes: int
    gpus: tuple[Gpu, ...]


def hardware() -> Hardware:
    return Hardware(
        host=platform.node(),
        cpu=_cpu_model(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus(),
    )


def versions() -> dict[str, str]:
    """ringspan, its commit, python, the packages that matter, and CUDA as torch was built for."""
    found = {"ringspan": ringspan.__version__, "python": platform.python_version()}
    commit = git_commit()
    if commit:
        found["commit"] = commit
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = _cuda_of_torch()
    if cuda:
        found["cuda"] = cuda
    boards = gpus()
    if boards:
        found["driver"] = boards[0].driver
    return found


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this host that this process may use; none where there is no driver."""
    listed = _tool(
        "nvidia-smi",
        "--query-gpu=index,name,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    )
    boards = {}
    for line in (listed or "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[2].isdigit():
            boards[fields[0]] = Gpu(
                name=fields[1], memory_bytes=int(fields[2]) * 2**20, driver=fields[3]
            )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(boards.values())
    wanted = [index.strip() for index in visible.split(",") if index.strip()]
    if all(index.isdigit() for index in wanted):
        return tuple(boards[index] for index in wanted if index in boards)
    return tuple(boards.values())[: len(wanted)]  # named by UUID: count them


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_commit() -> str | None:
    """The checkout's commit, with `+changes` if its files differ; None outside a checkout."""
    root = Path(ringspan.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _tool("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    changed = _tool("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _cuda_of_torch() -> str | None:
    """torch.version.cuda, without the seconds that `import torch` takes if it was not imported."""
    version = metadata.version("torch") if _installed("torch") else ""
    build = version.partition("+")[2]
    if build.startswith("cu"):
        digits = build.removeprefix("cu")
        return f"{digits[:-1]}.{digits[-1]}"
    if build:
        return None
    import torch

    return torch.version.cuda


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _tool(*command: str) -> str | None:
    """A small tool's output, or None if it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
