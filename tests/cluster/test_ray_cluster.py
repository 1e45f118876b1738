"""Which Ray is joined, and what is said when it cannot be. Nothing here starts a Ray."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ringspan.cluster import ray_cluster
from ringspan.cluster.ray_cluster import HeadProcess, connect
from ringspan.errors import BadInput, RingspanError


def test_a_ray_client_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(BadInput, match="Ray Client address"), connect():
        pass


def test_an_address_where_no_ray_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        missing = f"no Ray cluster answers at RAY_ADDRESS={address}"
        with pytest.raises(BadInput, match=missing), connect():
            pass


def test_a_folder_too_long_for_sockets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = tmp_path / ("x" * 60)
    with pytest.raises(BadInput, match="allow 40: choose a shorter"), connect(temp_dir=folder):
        pass


def test_free_ports_differ_and_keep_clear_of_rays_workers() -> None:
    ports = ray_cluster._free_ports(20)
    assert len(set(ports)) == 20
    assert not set(ports) & set(ray_cluster.WORKER_PORTS)


def test_a_head_that_cannot_start_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_short_temp_root", lambda: tmp_path)
    head = HeadProcess(num_cpus=-1)
    with pytest.raises(RingspanError, match="the private Ray head ended with status"):
        head.start()
    assert list(tmp_path.iterdir()) == []
    head.stop()


def test_what_the_caller_set_wins_over_private_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    env = HeadProcess().env
    assert env["RAY_AUTH_MODE"] == "token"
    assert "RAY_ADDRESS" not in env
