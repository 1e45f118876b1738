from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.tenancy import SECRET_VARIABLE, server_secret, tenant_namespace

SECRET = b"s" * 32


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "secret"
    made = server_secret(path, {})
    assert len(made) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert server_secret(path, {}) == made
    assert server_secret(tmp_path / "other", {}) != made
    assert [p.name for p in path.parent.iterdir()] == ["secret"]


def test_processes_that_start_together_agree_on_one_secret(tmp_path: Path) -> None:
    found: list[bytes] = []
    ready = threading.Barrier(8)

    def start() -> None:
        ready.wait()
        found.append(server_secret(tmp_path / "secret", {}))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_the_environment_goes_first(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert server_secret(path, {SECRET_VARIABLE: "e" * 40}) == b"e" * 40
    assert not path.exists()
    with pytest.raises(BadInput, match="RINGSPAN_SECRET has 5 characters: wanted at least 32"):
        server_secret(path, {SECRET_VARIABLE: "short"})


def test_a_secret_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"s" * 64)
    os.chmod(path, 0o644)
    with pytest.raises(BadInput, match=r"can be read by others \(mode 0644\): chmod 600 it"):
        server_secret(path, {})
    os.chmod(path, 0o600)
    assert server_secret(path, {}) == b"s" * 64
    path.write_bytes(b"tiny\n")
    with pytest.raises(BadInput, match="has 4 bytes: wanted at least 32"):
        server_secret(path, {})
    with pytest.raises(StoreError, match=f"set {SECRET_VARIABLE} instead|cannot read the secret"):
        server_secret(path / "below a file", {})


def test_tenants_and_secrets_make_namespaces_that_share_no_page() -> None:
    tokens = np.arange(300)
    namespaces = [
        tenant_namespace(None, None),
        tenant_namespace("a", SECRET),
        tenant_namespace("b", SECRET),
        tenant_namespace("a", b"t" * 32),
    ]
    assert namespaces[0] == PUBLIC_NAMESPACE
    assert tenant_namespace("a", SECRET) == namespaces[1]
    keys = [key for name in namespaces for key in page_keys("0a" * 32, name, tokens, 128)]
    assert len(set(keys)) == 4 * 3


@pytest.mark.parametrize("tenant", ["", " a", "a/b", "../a", "a\n", "x" * 129, "-a"])
def test_a_name_that_is_none_is_refused(tenant: str) -> None:
    with pytest.raises(BadInput, match="wanted 1 to 128 letters"):
        tenant_namespace(tenant, SECRET)
    with pytest.raises(BadInput, match="needs a server secret"):
        tenant_namespace("a", None)
