"""Hosts in network namespaces: they reach each other, and can be cut off."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from ringspan.cluster.namespaces import Hosts, why_not

pytestmark = pytest.mark.ray

TALK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 6379), timeout=2).close()
    print("reached", socket.gethostname())
except OSError:
    print("cut off", socket.gethostname())
"""


def talk(hosts: Hosts, host: int) -> str:
    """Whether the head's Ray can be reached from a host."""
    command = [sys.executable, "-c", TALK, hosts.ip(0)]
    process = hosts.popen(host, command, stdout=subprocess.PIPE)
    return process.communicate(timeout=30)[0].decode().strip()


def test_a_host_is_reached_by_the_others_but_not_while_its_link_is_cut(hosts: Hosts) -> None:
    assert talk(hosts, 1) == "reached host1"
    hosts.cut(1)
    try:
        assert talk(hosts, 1) == "cut off host1"
        assert talk(hosts, 2) == "reached host2"
    finally:
        hosts.restore(1)
    deadline = time.monotonic() + 10.0  # its neighbours are looked for anew
    while (said := talk(hosts, 1)) != "reached host1" and time.monotonic() < deadline:
        pass
    assert said == "reached host1"


def test_a_machine_that_cannot_have_hosts_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert why_not() == "network namespaces want root"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "is not installed" in why_not() or why_not().startswith("network namespaces want root")
