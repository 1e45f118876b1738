"""Which Ray we use: the one we were told of, or a private one. Never somebody else's by accident.

`connect` is for drivers, `HeadProcess` for a private cluster that takes `ray job submit`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import ray

from ringspan.errors import BadInput, RingspanError

OBJECT_STORE_BYTES = 200 * 2**20
"""Of a private Ray: only control messages and token ids go through it."""

WORKER_PORTS = range(10002, 20000)
"""Ray refuses other services on its workers' ports."""

START_ATTEMPTS = 2
JOIN_TIMEOUT_S = 10.0
HEAD_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
LONGEST_TEMP_DIR = 40
"""Characters; Ray puts unix sockets beneath it, whose paths end at 107."""

PRIVATE_ENV = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""For a Ray that only this machine's loopback jobs use. What the caller has set wins."""


@contextlib.contextmanager
def connect(
    *,
    temp_dir: Path | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
) -> Iterator[None]:
    """Inside a Ray job, or where RAY_ADDRESS is set: that cluster. Otherwise a private Ray on this
    machine, ended on leaving. In a process that has joined a Ray already: that one, left alone.

    temp_dir, num_cpus and num_gpus (found by Ray if None) are for the private one.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address and address != "local":
        _join(address)
        try:
            yield
        finally:
            ray.shutdown()
        return
    with _temp_dir(temp_dir) as folder, _environment(PRIVATE_ENV):
        _start_private(folder, num_cpus, num_gpus)
        children = _started_processes()
        try:
            yield
        finally:
            ray.shutdown()
            for child in children:  # Ray kills them but leaves them unwaited for
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_TIMEOUT_S)


class HeadProcess:
    """A private Ray head, with dashboard, as a child process: for `ray job submit`.

    Started when entered, ended when left; only processes that it started are signalled.
    """

    def __init__(
        self,
        *,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
        timeout_s: float = HEAD_TIMEOUT_S,
    ) -> None:
        self.address = ""
        """host:port, for RAY_ADDRESS."""
        self.dashboard_url = ""
        """For `ray job submit --address`."""
        self._num_cpus, self._num_gpus, self._timeout_s = num_cpus, num_gpus, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def env(self) -> dict[str, str]:
        """The whole environment for clients of this head (`ray job submit`)."""
        return {**self._base_env(), "RAY_API_SERVER_ADDRESS": self.dashboard_url}

    def start(self) -> Self:
        """Until the dashboard takes jobs, at most timeout_s. RingspanError with the log's last
        line otherwise."""
        self._folder = Path(tempfile.mkdtemp(prefix="rsp-", dir=_short_temp_root()))
        try:
            self._start(self._folder)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """May be repeated."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()  # `ray start --block` takes its own children down with it
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _start(self, folder: Path) -> None:
        gcs, dashboard, client, agent_http, agent_grpc, env_agent, metrics = _free_ports(7)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent_http}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={env_agent}",
            f"--metrics-export-port={metrics}", f"--temp-dir={folder / 'ray'}",
            f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats",
        ]  # fmt: skip
        if self._num_cpus is not None:
            command.append(f"--num-cpus={self._num_cpus}")
        if self._num_gpus is not None:
            command.append(f"--num-gpus={self._num_gpus}")
        log = folder / "head.log"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env=self._base_env(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is the driver's: it stops us in its own time
            )
        self.dashboard_url = f"http://127.0.0.1:{dashboard}"
        self.address = self._wait_until_up(folder / "ray" / "ray_current_cluster", log)

    def _wait_until_up(self, address_file: Path, log: Path) -> str:
        """The head's address, which Ray writes into its folder as the last step of its start (it
        chooses the interface itself)."""
        assert self._process is not None
        deadline = time.monotonic() + self._timeout_s
        while True:
            if self._process.poll() is not None:
                raise RingspanError(
                    f"the private Ray head ended with status {self._process.returncode} while "
                    f"starting: {_last_line(log)}"
                )
            if address_file.exists() and _answers(f"{self.dashboard_url}/api/jobs/"):
                return address_file.read_text().strip()
            if time.monotonic() > deadline:
                raise RingspanError(
                    f"the private Ray head took no jobs within {self._timeout_s:.0f} s: "
                    f"{_last_line(log)}"
                )
            time.sleep(0.1)

    def _base_env(self) -> dict[str, str]:
        env = {**PRIVATE_ENV, **os.environ}
        env.pop("RAY_ADDRESS", None)
        # jobs run `python` from the head's PATH: it must be the one that has ringspan
        python_folder = str(Path(sys.executable).parent)
        env["PATH"] = os.pathsep.join([python_folder, env.get("PATH", os.defpath)])
        return env


def _start_private(folder: Path, num_cpus: int | None, num_gpus: int | None) -> None:
    """Ray gives its own processes 30 s to come up, which a cold and busy machine can miss."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                _temp_dir=str(folder / str(attempt)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception as error:  # Ray raises this very class
            if "timed out during startup" not in str(error):
                raise
            if attempt + 1 == START_ATTEMPTS:
                raise RingspanError(
                    f"a private Ray did not come up on this machine in {START_ATTEMPTS} attempts "
                    f"(load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores): try again when "
                    "it is less busy"
                ) from error
        else:
            return


def _started_processes() -> list[subprocess.Popen[bytes]]:
    """Of the Ray that `ray.init` has just started. Ray has no public name for them."""
    node = getattr(ray._private.worker, "_global_node", None)
    infos = getattr(node, "all_processes", {}).values()
    return [info.process for group in infos for info in group]


def _join(address: str) -> None:
    if address.startswith("ray://"):
        raise BadInput(
            f"RAY_ADDRESS={address} is a Ray Client address, which ringspan does not use: submit "
            "with `ray job submit`, or set RAY_ADDRESS to host:port of the cluster's head"
        )
    _check_listening(address)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _nobody_answers(address, line) from error


def _check_listening(address: str) -> None:
    """Ray itself waits for minutes before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto`: Ray looks for the cluster itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_TIMEOUT_S).close()
    except OSError as error:
        raise _nobody_answers(address, str(error)) from None


def _nobody_answers(address: str, why: str) -> BadInput:
    return BadInput(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({why}): start it, or unset "
        "RAY_ADDRESS for a private Ray on this machine"
    )


@contextlib.contextmanager
def _temp_dir(given: Path | None) -> Iterator[Path]:
    if given is not None:
        if len(str(given)) > LONGEST_TEMP_DIR:
            raise BadInput(
                f"Ray's folder {given} has {len(str(given))} characters; unix sockets allow "
                f"{LONGEST_TEMP_DIR}: choose a shorter one"
            )
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="rsp-", dir=_short_temp_root()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _short_temp_root() -> Path:
    root = Path(tempfile.gettempdir())
    return root if len(str(root)) <= LONGEST_TEMP_DIR - 16 else Path("/tmp")


@contextlib.contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _free_ports(count: int) -> list[int]:
    """Free now, and not one of Ray's worker ports. Held open until all are found, so that they
    differ; Ray cannot be handed an open socket."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            probe.bind(("", 0))
            port = probe.getsockname()[1]
            if port not in WORKER_PORTS:
                ports.append(port)
    return ports


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "its log is empty"
