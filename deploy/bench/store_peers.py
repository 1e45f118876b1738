"""What `bench store` runs beside ours: Mooncake Store and fio, each as a process of its own.

    ringspan bench store --make-peers PEERS                      # once: a virtual environment
    ringspan bench store --peers-python PEERS/bin/python

The environment has Mooncake's wheel without CUDA at a pinned version; it wants libibverbs of the
system (Debian: libibverbs1, librdmacm1, libnuma1). fio is the distribution's. Without fio a loop of
`preadv` reads the same files, which the rows then say.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from ringspan.errors import RingspanError

PACKAGES = ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "numpy")
MODULES = "mooncake.store, numpy"
OF_THE_SYSTEM = ", and install libibverbs1 librdmacm1 libnuma1"
TIMEOUT_S = 300.0
"""For one command of Mooncake's process, or one run of fio."""

_SCRIPT = Path(__file__).with_name("peers") / "mooncake.py"


class MooncakeJob(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is asked; see the script."""

    pages: str
    """An .npy file, uint8 [pages, page bytes]."""
    where: str
    log: str


MODES: dict[str, tuple[str, dict[str, str]]] = {
    "Mooncake": ("owner", {}),
    "Mooncake, checksums": ("owner", {"MOONCAKE_STORE_CHECKSUM": "1"}),
    "Mooncake, own memory": ("own", {"MC_STORE_MEMCPY": "1"}),
}
"""By its name in the rows: who holds the pages, and the settings. Only the first two keep pages in
another process, as a store does; its checksums (CRC-64) are off unless asked for."""


class Mooncake:
    """Its process, with a master of its own; a context manager. name: of MODES."""

    def __init__(self, python: Path, name: str, pages: Path, scratch: Path) -> None:
        where, settings = MODES[name]
        self.name = name
        self._log = scratch / f"{where}.log"
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [str(python), "-I", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **settings},
            )
        job = MooncakeJob(pages=str(pages), where=where, log=str(self._log))
        try:
            self._tell(msgspec.json.encode(job).decode(), "ready")
        except BaseException:
            self.close()
            raise

    def put(self) -> float:
        """Seconds; what is put next lies beside it."""
        return float(self._tell("put"))

    def get(self) -> float:
        """Seconds, of what was put last."""
        return float(self._tell("get"))

    def remove(self) -> None:
        self._tell("remove")

    def _tell(self, line: str, wanted: str = "") -> str:
        """The answer: `wanted`, or a number. What its libraries print is passed over."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            for data in self._process.stdout:
                answer = data.decode().strip()
                if answer == wanted if wanted else _is_number(answer):
                    return answer
        except BrokenPipeError:
            pass  # told below, with what it said last
        finally:
            timer.cancel()
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise RingspanError(
            f"bench store: the process of {self.name} ended at {line[:40]!r}: {last[0]}"
        )

    def close(self) -> None:
        """Its end of input ends the process, which ends its master."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Mooncake:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# fio


def fio() -> Path | None:
    """The program, where the machine has it."""
    found = shutil.which("fio")
    return Path(found) if found else None


def fio_read_s(files: Sequence[Path], block_bytes: int, direct: bool, depth: int) -> float:
    """Seconds to read the files once, in order. depth: blocks asked for at a time, by one process.

    Raises RingspanError where fio does.
    """
    program = fio()
    assert program is not None
    size = sum(path.stat().st_size for path in files)
    arguments = [
        str(program),
        "--name=read",
        f"--filename={':'.join(map(str, files))}",
        "--file_service_type=sequential",
        "--rw=read",
        f"--bs={block_bytes}",
        f"--size={size}",
        f"--direct={int(direct)}",
        f"--ioengine={'libaio' if depth > 1 else 'psync'}",
        f"--iodepth={depth}",
        "--invalidate=1",
        "--output-format=json",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RingspanError(f"fio ended with status {done.returncode}: {last}")
    read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return size / (read["io_bytes"] / (read["runtime"] / 1e3))


def preadv_read_s(files: Sequence[Path], block_bytes: int, direct: bool) -> float:
    """As `fio_read_s` at depth 1, by a loop of `preadv` into one aligned buffer."""
    room = mmap.mmap(-1, block_bytes)
    forget(files)
    began = time.perf_counter()
    for path in files:
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            offset = 0
            while done := os.preadv(fd, [room], offset):
                offset += done
        finally:
            os.close(fd)
    return time.perf_counter() - began


def forget(files: Sequence[Path]) -> None:
    """The page cache drops the files, as fio's `invalidate` does."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
