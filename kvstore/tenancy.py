"""Tenants: whose contexts never meet, because their page keys are made under different namespaces.

A namespace is an HMAC of the tenant's name under a secret of the server (`keys.namespace_for`).
Nobody who lacks the secret can name, guess or probe for another tenant's pages, and a look-up
sees only the maps of its own namespace, so that neither the answer nor the time of a miss depends
on what others have. Who a caller is, the server decides; a request carries no namespace.

A namespace is as secret as what it was made of: it names a tenant's pages, and the keys that
encrypt them are derived from it. It lives in memory and in messages of a gang, never in a file.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, namespace_for

SECRET_VARIABLE = "RINGSPAN_SECRET"
"""Environment variable: the server's secret, at least 32 characters. Goes before the file."""

SECRET_BYTES = 32
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")


def server_secret(
    path: Path | str, environment: Mapping[str, str] = os.environ, make: bool = True
) -> bytes:
    """The secret from the environment, else from the file, which is made (random, mode 0600) when
    it is not there, if `make`. BadInput for one that is too short or that others may read, or that
    is not there; StoreError."""
    given = environment.get(SECRET_VARIABLE, "")
    if given:
        if len(given) < SECRET_BYTES:
            raise BadInput(
                f"{SECRET_VARIABLE} has {len(given)} characters: wanted at least {SECRET_BYTES}, "
                "such as `openssl rand -hex 32` prints"
            )
        return given.encode()
    path = Path(path)
    try:
        return _read_secret(path)
    except FileNotFoundError:
        if not make:
            raise BadInput(
                f"there is no secret of the server: {SECRET_VARIABLE} is not set and {path} is "
                "not there; give the one that the contexts were made with"
            ) from None
    except OSError as error:
        raise StoreError(f"cannot read the secret in {path}: {error.strerror}") from None
    try:
        _make_secret(path)
        return _read_secret(path)
    except OSError as error:
        raise StoreError(
            f"cannot keep a secret in {path}: {error.strerror}; set {SECRET_VARIABLE} instead"
        ) from None


def tenant_namespace(tenant: str | None, secret: bytes | None, encrypted: bool = False) -> bytes:
    """The namespace of a tenant; without one the public namespace, which has no walls. BadInput for
    a tenant whose name is none, or where no secret is.

    encrypted: the tenant's other one, whose contexts are encrypted at rest; the public one cannot
    be: its pages are named by plain hashes of their text, which whoever guesses it can confirm.
    """
    if tenant is None:
        if encrypted:
            raise BadInput(
                "--encrypt wants --tenant NAME: without a tenant pages are named by plain hashes "
                "of their text, and encryption would not hide it"
            )
        return PUBLIC_NAMESPACE
    if not _TENANT.fullmatch(tenant):
        raise BadInput(
            f"tenant {tenant!r}: wanted 1 to 128 letters, digits or . _ @ -, the first a letter or "
            "digit"
        )
    if not secret:
        raise BadInput(f"tenant {tenant!r} needs a server secret: set {SECRET_VARIABLE}")
    return namespace_for(secret, tenant, encrypted)


def tenant_namespaces(tenant: str | None, secret: bytes | None) -> tuple[bytes, ...]:
    """What a tenant's contexts lie in: plain and encrypted ones. Without one the public alone."""
    if tenant is None:
        return (PUBLIC_NAMESPACE,)
    return tuple(tenant_namespace(tenant, secret, encrypted) for encrypted in (False, True))


def _read_secret(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        text = file.read().strip()
    if mode & 0o077:
        raise BadInput(
            f"the secret in {path} can be read by others (mode {mode:04o}): chmod 600 it"
        )
    if len(text) < SECRET_BYTES:
        raise BadInput(
            f"the secret in {path} has {len(text)} bytes: wanted at least {SECRET_BYTES}; remove "
            "the file for a new one (contexts of tenants are then not found any more)"
        )
    return text


def _make_secret(path: Path) -> None:
    """Whole or not at all, and one of several processes makes it: a link to a finished file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(fd)
        try:
            os.link(beside, path)
        except FileExistsError:
            return  # another process was first: its secret counts
    finally:
        beside.unlink()
