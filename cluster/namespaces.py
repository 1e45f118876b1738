"""Several hosts on one machine: network namespaces on a bridge, each with an address, a hostname, a
process table, shared memory and a Ray node of its own. Links can be slowed and cut, hosts killed.

    with Hosts([2, 2, 2]) as hosts:               # CPUs that Ray is told of; the first is the head
        driver = hosts.popen(0, [sys.executable, "job.py"])
        hosts.cut(2); hosts.restore(2); hosts.kill(1)

For tests and demonstrations of faults; needs root, iproute2 and util-linux. All hosts share the
machine's file system, as hosts of a cluster share a store. Nothing but processes started here is
ended, and nothing of the machine's own network is touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Self

from ringspan.cluster.ray_cluster import OBJECT_STORE_BYTES, PRIVATE_ENV
from ringspan.errors import RingspanError

NETWORK = "10.77.0"
"""Seen by these hosts alone."""
PORT = 6379
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
SHARED_MEMORY_MIB = 512
HEALTH_ENV = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "15",
}
"""A node that says nothing for 15 to 45 s is dead; one whose processes are gone is so at once."""
_ENTER = """
set -e
hostname "$NAME"
mount --bind "$HOSTS" /etc/hosts
mount -t tmpfs -o size=${SHM}m tmpfs /dev/shm
mount --bind "$OWN" "$SHARED"
exec "$@"
"""


class Hosts:
    """Started when entered, ended when left, whatever state its hosts are in.

    cpus: of each host's Ray node. Raises RingspanError where this machine does not permit it
    (`why_not` says so before), or a node does not come up.
    """

    def __init__(self, cpus: Sequence[int], env: dict[str, str] | None = None) -> None:
        self._cpus = tuple(cpus)
        self._name = f"rsp-{secrets.token_hex(3)}"
        self._env = {**PRIVATE_ENV, **HEALTH_ENV, **os.environ, **(env or {})}
        self._env.pop("RAY_ADDRESS", None)
        self._folder = Path(tempfile.mkdtemp(prefix="rsn-", dir="/tmp"))
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.address = f"{self.ip(0)}:{PORT}"
        """Of the Ray cluster, inside of it."""

    def __enter__(self) -> Self:
        try:
            self._make_network()
            for host in range(len(self._cpus)):
                self.start(host)
            self._wait_until_joined(len(self._cpus))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @staticmethod
    def ip(host: int) -> str:
        return f"{NETWORK}.{10 + host}"

    @staticmethod
    def hostname(host: int) -> str:
        return f"host{host}"

    def start(self, host: int) -> None:
        """A host's Ray node; again after `kill`."""
        own = self._folder / f"own-{host}-{secrets.token_hex(2)}"
        shared = self._folder / "ray"
        own.mkdir(parents=True)
        shared.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            f"--node-ip-address={self.ip(host)}", f"--num-cpus={self._cpus[host]}",
            f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats",
        ]  # fmt: skip
        if host == 0:
            command += ["--head", f"--port={PORT}", f"--temp-dir={shared}"]
            command += ["--include-dashboard=false"]
        else:
            command += [f"--address={self.address}"]
        env = {
            **self._env,
            "NAME": self.hostname(host),
            "HOSTS": str(self._folder / "hosts"),
            "SHM": str(SHARED_MEMORY_MIB),
            "OWN": str(own),
            "SHARED": str(shared),
        }
        with (self._folder / f"host{host}.log").open("ab") as log:
            self._nodes[host] = subprocess.Popen(
                ["ip", "netns", "exec", self._ns(host), "unshare", "--mount", "--uts", "--ipc",
                 "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", _ENTER, "_",
                 *command],
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def popen(
        self,
        host: int,
        command: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A process on a host, with RAY_ADDRESS set."""
        inner = self._first_pid(host)
        return subprocess.Popen(
            ["nsenter", "-t", str(inner), "-m", "-u", "-i", "-n", "-p", *command],
            env={**self._env, "RAY_ADDRESS": self.address, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT if stdout is not None else None,
        )

    def kill(self, host: int) -> None:
        """All of its processes at once, as when its power fails; its link stays up."""
        node = self._nodes.pop(host)
        with contextlib.suppress(RingspanError, ProcessLookupError):
            # the first process of a process table takes all others with it
            os.kill(self._first_pid(host, node), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(STOP_TIMEOUT_S)
        if node.poll() is None:
            node.kill()
            node.wait(STOP_TIMEOUT_S)

    def cut(self, host: int) -> None:
        """Packets to and from the host vanish; nobody is told."""
        _run("ip", "-n", self._ns("switch"), "link", "set", f"p{host}", "down")

    def restore(self, host: int) -> None:
        _run("ip", "-n", self._ns("switch"), "link", "set", f"p{host}", "up")

    def shape(self, host: int, mbit_s: float = 0.0, delay_ms: float = 0.0) -> None:
        """What the host sends goes at this rate, so much later; 0 and 0: as before. A delay wants a
        kernel with netem: RingspanError where there is none."""
        where = ["dev", f"e{host}", "root"]
        tc = ["tc", "-n", self._ns(host), "qdisc"]
        if not mbit_s and not delay_ms:
            with contextlib.suppress(RingspanError):  # there was no rule
                _run(*tc, "del", *where)
        elif delay_ms:
            rate = ["rate", f"{mbit_s}mbit"] if mbit_s else []
            _run(*tc, "replace", *where, "netem", "delay", f"{delay_ms}ms", *rate)
        else:
            limit = ["burst", "256kb", "latency", "50ms"]
            _run(*tc, "replace", *where, "tbf", "rate", f"{mbit_s}mbit", *limit)

    def log(self, host: int) -> str:
        """What its Ray node said."""
        return (self._folder / f"host{host}.log").read_text(errors="replace")

    def close(self) -> None:
        """May be repeated."""
        for host in list(self._nodes):
            self.kill(host)
        for place in (*range(len(self._cpus)), "switch"):
            with contextlib.suppress(RingspanError):  # it was never made
                _run("ip", "netns", "del", self._ns(place))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make_network(self) -> None:
        switch = self._ns("switch")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        lines = ["127.0.0.1 localhost"]
        for host in range(len(self._cpus)):
            name = self._ns(host)
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "link", "add", "name", f"e{host}", "netns", name, "type", "veth",
                 "peer", "name", f"p{host}", "netns", switch)  # fmt: skip
            _run("ip", "-n", switch, "link", "set", f"p{host}", "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"{self.ip(host)}/24", "dev", f"e{host}")
            _run("ip", "-n", name, "link", "set", f"e{host}", "up")
            lines.append(f"{self.ip(host)} {self.hostname(host)}")
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")

    def _wait_until_joined(self, count: int) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        joined = 0
        while joined < count:
            joined = sum("Ray runtime started" in self.log(host) for host in self._nodes)
            for host, node in self._nodes.items():
                if node.poll() is not None:
                    last = (self.log(host).strip().splitlines() or ["it said nothing"])[-1]
                    raise RingspanError(f"the Ray node of {self.hostname(host)} ended: {last}")
            if time.monotonic() > deadline:
                raise RingspanError(
                    f"{joined} of {count} hosts have a Ray node after {READY_TIMEOUT_S:.0f} s"
                )
            time.sleep(0.1)

    def _first_pid(self, host: int, node: subprocess.Popen[bytes] | None = None) -> int:
        """As this machine counts, of the first process in the host's process table."""
        node = node or self._nodes[host]
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while node.poll() is None and time.monotonic() < deadline:
            # `unshare --fork` replaced `ip netns exec` and has that one child
            children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.01)
        raise RingspanError(f"{self.hostname(host)} runs no process")

    def _ns(self, place: int | str) -> str:
        return f"{self._name}-{place}"


def why_not() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    for tool in ("ip", "tc", "unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (iproute2, util-linux)"
    name = f"rsp-{secrets.token_hex(3)}"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "probe", "type", "bridge")
            _run("ip", "-n", name, "link", "add", "e", "type", "veth", "peer", "name", "p")
        finally:
            _run("ip", "netns", "del", name)
    except RingspanError as error:
        return f"network namespaces are not permitted here: {error}"
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise RingspanError(f"{' '.join(command)}: {lines[0]}")
