"""What users would take instead: transformers' quantised caches, in an environment of their own.

    ringspan bench codecs --make-peers PEERS                     # once: a virtual environment
    ringspan bench codecs --peers-python PEERS/bin/python

The environment has torch, transformers and the two quantisers at pinned versions; quanto compiles
a C++ extension at its first use (a minute; wants a compiler). The settings are those that
transformers' documentation recommends: groups of 64, 128 residual tokens, hqq along axis 1 (a
token's dimensions), quanto along its axis 0.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from ringspan.errors import RingspanError

PACKAGES = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "hqq==0.2.8.post1",
    "optimum-quanto==0.2.7",
    "accelerate==1.15.0",
    "numpy",
)
MODULES = "torch, transformers, hqq, optimum.quanto"
TIMEOUT_S = 3600.0
"""For one cache's run."""

Options = dict[str, str | int]
EXACT_PEER = "transformers"
"""The cache that is not quantised: what our exact run is checked against."""
CACHES: dict[str, Options] = {
    EXACT_PEER: {},
    "fp8": {"backend": "fp8"},
    "hqq-8": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "hqq-4": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "hqq-2": {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
    "quanto-4": {"backend": "quanto", "nbits": 4},
    "quanto-2": {"backend": "quanto", "nbits": 2},
}

_SCRIPT = Path(__file__).with_name("peers") / "hf_quantized_cache.py"


class PeerJob(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is asked; see the script."""

    model: str
    """A folder as transformers' save_pretrained writes it."""
    token_ids: str
    """An .npy file."""
    prefill: int
    block: int
    caches: dict[str, Options]
    out: str
    keep_kv: bool
    threads: int


class PeerDone(msgspec.Struct, frozen=True, kw_only=True):
    cache: str
    seconds: float
    bits: tuple[float, ...]
    """Per element of K and V: after the prefill, then after each block."""


def run_peers(python: Path, job: PeerJob) -> Iterator[PeerDone]:
    """Each cache as it is done; its arrays lie in `job.out`. RingspanError where the process
    fails or a cache takes longer than `TIMEOUT_S`."""
    # quanto's compiler finds ninja where the environment has it
    env = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    env["HF_HUB_OFFLINE"] = "1"
    with subprocess.Popen(
        [str(python), "-I", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()
            for name in job.caches:
                yield _answer(process, process.stdout, name)
        finally:
            process.kill()


def _answer(process: subprocess.Popen[bytes], lines: Iterable[bytes], name: str) -> PeerDone:
    """The process's next line of JSON; what its libraries print is passed over."""
    timer = threading.Timer(TIMEOUT_S, process.kill)
    timer.start()
    try:
        for line in lines:
            if line.startswith(b'{"cache"'):
                return msgspec.json.decode(line, type=PeerDone)
    finally:
        timer.cancel()
    raise RingspanError(
        f"bench codecs: the peers' process ended (status {process.wait(10)}) at cache {name!r}; "
        "its output above says why"
    )


def load_arrays(job: PeerJob, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Hidden states [T, hidden], and K and V [layers, 2, prefill, Hkv, D] where they were kept."""
    out = Path(job.out)
    kv = np.load(out / f"{name}.kv.npy", mmap_mode="r") if job.keep_kv else None
    return np.load(out / f"{name}.hidden.npy"), kv
