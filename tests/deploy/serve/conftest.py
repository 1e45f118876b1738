"""A real server on a free port, in a thread: smollm2 for texts, a tiny random model beside it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from ringspan.cluster.local_gang import LocalGang
from ringspan.deploy.serve.app import build_app
from ringspan.deploy.serve.auth import ApiKeys, new_key
from ringspan.deploy.serve.limits import HttpLimits
from ringspan.deploy.serve.listening import bound, server_for
from ringspan.deploy.serve.serving import ServeConfig, served
from ringspan.deploy.serve.state import ServeState


@dataclass
class Served:
    """One that listens."""

    url: str
    state: ServeState
    keys: dict[str, str]
    """Of each tenant."""
    store: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def openai(self, key: str = "none", **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 60.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def http(self, tenant: str | None = None) -> httpx2.Client:
        key = None if tenant is None else self.keys[tenant]
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60.0)

    def raw(self, sent: bytes, timeout_s: float = 20.0) -> bytes:
        """What comes back for bytes that no client would send."""
        with socket.create_connection(self.address, timeout=timeout_s) as connection:
            connection.sendall(sent)
            parts = []
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 16):
                    parts.append(part)
            return b"".join(parts)

    def running(self) -> int:
        """Jobs that have not ended."""
        return sum(not view.state.ended for view in self.state.service.views())


def wait_for(what: Any, timeout_s: float = 20.0) -> None:
    ends = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < ends, "it did not come to be"
        time.sleep(0.01)


@contextlib.contextmanager
def serve_model(
    model: str,
    folder: Path,
    tenants: tuple[str, ...] = (),
    ranks: int = 1,
    bounds: str = "",
    **settings: Any,
) -> Iterator[Served]:
    """bounds: lines of limits, for the file of keys."""
    keys_file = folder / "keys"
    keys = {tenant: new_key(tenant, keys_file) for tenant in tenants}
    if bounds:
        with keys_file.open("a") as file:
            file.write(bounds)
    config = ServeConfig(
        model=model,
        store=str(folder / "store"),
        ranks=ranks,
        local=True,
        device="cpu",
        transport="loopback",
        threads=1,
        api_keys=str(keys_file) if tenants else "",
        secret_file=str(folder / "secret"),
        **settings,
    )
    with (
        bound("127.0.0.1", 0) as listening,
        LocalGang(config.spec()) as gang,
        served(config, ApiKeys(keys_file if tenants else None, {}), gang) as state,
    ):
        server = server_for(build_app(state), drain_s=5.0, log_level="error", limits=config.limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            port = listening.getsockname()[1]
            yield Served(f"http://127.0.0.1:{port}", state, keys, folder / "store")
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_model("smollm2", tmp_path_factory.mktemp("smollm2")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """No tokenizer; two ranks, two tenants, and bounds that a test can reach."""
    limits = HttpLimits(
        body_bytes=1 << 20, bodies_bytes=1 << 21, body_timeout_s=1.0, progress_s=0.05
    )
    folder = tmp_path_factory.mktemp("tiny")
    settings = {"ranks": 2, "limits": limits, "served_model_name": "tiny", "max_waiting": 256}
    with serve_model("random:tiny", folder, ("", "a", "b"), **settings) as server:
        yield server


@pytest.fixture(scope="session")
def opened() -> Any:
    """`opened(model, folder, tenants, ranks, **settings)`: a server of one's own."""
    return serve_model


@pytest.fixture(scope="session")
def until() -> Any:
    """`until(condition)`: waits for it, or fails."""
    return wait_for
