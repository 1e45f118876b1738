"""API keys: who may ask, and as which tenant.

A key is 32 random bytes, printed once. The server keeps `TENANT:sha256:HEX` lines, of a file or of
the environment; a hash of so many random bits needs no salt and no slow function, for there is
nothing to guess. An empty tenant is the public namespace. Keys may be added and removed while the
server runs, for tenants that it knew when it started. A line `TENANT:limits: NAME=NUMBER ...`
bounds what that tenant may ask for, `*:limits: ...` every one without a line of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from starlette.requests import Request

from ringspan.cluster.service_types import TenantLimits
from ringspan.deploy.serve.errors import DENIED, SERVER, ApiError, log
from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.tenancy import tenant_namespace

KEYS_VARIABLE = "RINGSPAN_API_KEYS"
"""Environment variable: lines as the file has them, parted by newlines or commas."""
PREFIX = "rsk-"
EVERYBODY = "*"
_LIMITS = re.compile(r"(?P<tenant>[^:\s]+):limits:\s*(?P<limits>.*)")
_LINE = re.compile(r"(?P<tenant>[^:\s]*):sha256:(?P<digest>[0-9a-f]{64})")


class ApiKeys:
    """Whose key hashes to what. Without any key everybody is the public tenant."""

    def __init__(
        self, path: Path | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        """BadInput for a line that is none or a file that others may write."""
        self._path = path
        lines = environment.get(KEYS_VARIABLE, "").replace(",", "\n")
        self._fixed, self._fixed_limits = _parse(lines, KEYS_VARIABLE)
        self._stamp: tuple[int, int] | None = None
        self._digests: dict[str, str] = {}
        self._limits: dict[str, TenantLimits] = {}
        self._load()
        self.tenants = frozenset(self._digests.values())
        """Known from the start; what is kept apart for them is made once."""
        self.required = path is not None or bool(self._fixed)
        """Also of a file whose keys were all taken out."""

    def tenant(self, authorization: str) -> str:
        """Of the header `Authorization: Bearer KEY`. ApiError 401."""
        if not self.required:
            return ""
        try:
            self._load()
        except BadInput as error:  # changed under way into something that is none
            log.error("%s", error)
            raise ApiError(500, "the server cannot read its API keys", kind=SERVER) from None
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise _denied("no API key: send the header 'Authorization: Bearer <key>'", "no_api_key")
        asked = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found: str | None = None
        for digest, tenant in self._digests.items():  # all of them, whichever is the one
            if hmac.compare_digest(digest, asked):
                found = tenant
        if found is None or found not in self.tenants:
            raise _denied("the API key is not one of this server's", "invalid_api_key")
        return found

    def of(self, request: Request) -> str:
        """The tenant that sent the request. ApiError 401."""
        return self.tenant(request.headers.get("authorization", ""))

    def limits(self, tenant: str) -> TenantLimits:
        """Of a tenant that has a name, as the file had them when a key was last looked at. (The
        public one has those of the server alone.)"""
        if not tenant:
            return TenantLimits()
        limits = self._limits
        return limits.get(tenant) or limits.get(EVERYBODY) or TenantLimits()

    def _load(self) -> None:
        """The file's lines, if it changed since they were read."""
        digests, limits = dict(self._fixed), dict(self._fixed_limits)
        if self._path is not None:
            try:
                with self._path.open("rb") as file:
                    found = os.fstat(file.fileno())
                    stamp = found.st_mtime_ns, found.st_ino
                    if stamp == self._stamp:
                        return
                    if stat.S_IMODE(found.st_mode) & 0o022:
                        raise BadInput(
                            f"--api-keys {self._path} can be written by others (mode "
                            f"{stat.S_IMODE(found.st_mode):04o}): chmod 600 it"
                        )
                    text = file.read().decode("utf-8", "replace")
            except OSError as error:
                raise BadInput(
                    f"--api-keys {self._path}: {error.strerror}; make a key with ringspan serve "
                    f"--new-api-key TENANT --api-keys {self._path}"
                ) from None
            more, bounds = _parse(text, str(self._path))
            digests, limits = digests | more, limits | bounds
            self._stamp = stamp
        self._digests, self._limits = digests, limits


def new_key(tenant: str, path: Path) -> str:
    """A new key for the tenant (empty: the public one), its hash added to the file, which is made
    with mode 0600. BadInput for a tenant whose name is none; StoreError."""
    if tenant:
        tenant_namespace(tenant, b"any")  # refuses what is no name
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{tenant}:sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as file:
            file.write(line)
            file.flush()
            os.fsync(fd)
    except OSError as error:
        raise StoreError(f"cannot keep the key's hash in {path}: {error.strerror}") from None
    return key


def _parse(text: str, where: str) -> tuple[dict[str, str], dict[str, TenantLimits]]:
    """digest -> tenant, and tenant -> limits."""
    found: dict[str, str] = {}
    limits: dict[str, TenantLimits] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if (bounds := _LIMITS.fullmatch(line)) is not None:
            if bounds["tenant"] != EVERYBODY:
                tenant_namespace(bounds["tenant"], b"any")
            limits[bounds["tenant"]] = _limits(bounds["limits"], f"{where}, line {number}")
            continue
        match = _LINE.fullmatch(line)
        if match is None:  # the line is not shown: somebody may have put the key itself there
            raise BadInput(
                f"{where}, line {number}: wanted TENANT:sha256:<64 hex digits>, as ringspan serve "
                "--new-api-key TENANT writes it"
            )
        if match["tenant"]:
            tenant_namespace(match["tenant"], b"any")
        found[match["digest"]] = match["tenant"]
    return found, limits


def _limits(text: str, where: str) -> TenantLimits:
    known = [field.name for field in fields(TenantLimits)]
    found: dict[str, int] = {}
    for word in text.split():
        name, _, number = word.partition("=")
        if name not in known or name in found or not re.fullmatch(r"[1-9]\d{0,17}", number):
            raise BadInput(
                f"{where}: limit {word[:100]!r}: wanted NAME=NUMBER, a number from 1, each name of "
                f"{', '.join(known)} at most once"
            )
        found[name] = int(number)
    return TenantLimits(**found)


def _denied(message: str, code: str) -> ApiError:
    return ApiError(401, message, kind=DENIED, code=code, headers={"www-authenticate": "Bearer"})
