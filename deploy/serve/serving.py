"""From settings to a running service: gang, controller, service, tokenizer, keys.

The same for `ringspan serve` and for a replica of Ray Serve.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.deploy.checks import check_gang, check_model, check_plan_names, check_store_folder
from ringspan.deploy.commands import options
from ringspan.deploy.gangs import open_gang
from ringspan.deploy.serve.auth import ApiKeys
from ringspan.deploy.serve.limits import HttpLimits
from ringspan.errors import BadInput
from ringspan.kvstore.keys import PUBLIC_NAMESPACE

if TYPE_CHECKING:
    from ringspan.cluster.gang import Gang
    from ringspan.deploy.serve.state import ServeState


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one server; `args:` of a Serve application's YAML."""

    model: str
    served_model_name: str = ""
    """Empty: the model's name, of a path its last part."""
    store: str = str(options.DEFAULT_STORE)
    quota_bytes: int | None = None
    """Of the store; see `Store`."""
    ranks: int | None = None
    local: bool = False
    transport: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"
    rope_scaling: str | None = None
    seed: int = 0
    threads: int = 0
    timeout_s: float = 60.0
    codec: str = "raw"
    """Of contexts whose request names none."""
    api_keys: str = ""
    """File of keys' hashes; empty: those of the environment alone."""
    secret_file: str = str(options.DEFAULT_SECRET)
    open_metrics: bool = False
    max_waiting: int = 64
    max_running: int = 16
    drain_s: float = 30.0
    """What runs has so long to end when the server is told to."""
    limits: HttpLimits = HttpLimits()

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name or self.model

    def spec(self) -> GangSpec:
        model = ModelSpec(
            name=self.model, dtype=self.dtype, rope_scaling=self.rope_scaling, seed=self.seed
        )
        return options.gang_spec(
            model,
            ranks=self.ranks,
            transport=self.transport,
            device=self.device,
            backend=self.backend,
            threads=self.threads,
            timeout_s=self.timeout_s,
        )


def check_config(config: ServeConfig) -> ApiKeys:
    """Refuses what can be refused before anything is started; gives the keys, which were read."""
    if config.max_waiting < 1 or config.max_running < 1:
        raise BadInput(
            f"max_waiting {config.max_waiting}, max_running {config.max_running}: wanted at least 1"
        )
    check_plan_names(config.codec, "auto", "auto")
    spec = config.spec()
    check_gang(spec, config.local)
    check_model(spec)
    check_store_folder(Path(config.store))
    keys = ApiKeys(Path(config.api_keys).expanduser() if config.api_keys else None)
    namespaces_of(config, keys)
    return keys


def check_host(host: str, keys: ApiKeys, no_auth: bool) -> None:
    """BadInput for an address that others reach, where anybody who does could ask."""
    if keys.required or no_auth or is_loopback(host):
        return
    raise BadInput(
        f"--host {host} can be reached by others, and no API key is wanted of them: give "
        "--api-keys FILE (make a key: ringspan serve --new-api-key TENANT --api-keys FILE), or "
        "--no-auth if everybody may ask"
    )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def namespaces_of(config: ServeConfig, keys: ApiKeys) -> dict[str, bytes]:
    """The namespace of each tenant that has a key. Tenants without one do not exist here."""
    from ringspan.kvstore.tenancy import server_secret, tenant_namespace

    tenants = keys.tenants - {""}
    found = {"": PUBLIC_NAMESPACE}
    if tenants:
        secret = server_secret(Path(config.secret_file).expanduser())
        found |= {tenant: tenant_namespace(tenant, secret) for tenant in tenants}
    return found


@contextmanager
def serving(config: ServeConfig, keys: ApiKeys) -> Iterator[ServeState]:
    """A gang, and a service over it, for as long as it is entered; then what runs is let end."""
    with open_gang(config.spec(), config.local) as gang, served(config, keys, gang) as state:
        yield state


@contextmanager
def served(config: ServeConfig, keys: ApiKeys, gang: Gang) -> Iterator[ServeState]:
    """The same over a gang that is the caller's."""
    from ringspan.cluster.controller import Controller
    from ringspan.cluster.service import Service
    from ringspan.cluster.service_types import Limits
    from ringspan.deploy.serve.state import ServeState
    from ringspan.deploy.serve.texts import Texts
    from ringspan.kvstore.folder import Store

    namespaces = namespaces_of(config, keys)
    store = Store(Path(config.store), tuple(namespaces.values()), config.quota_bytes)
    service = Service(
        Controller(gang, store),
        limits=Limits(max_waiting=config.max_waiting, max_running=config.max_running),
        namespace_of=_looked_up(namespaces),
        tenant_limits=keys.limits,
    )
    try:
        facts = service.facts
        texts = Texts(gang.spec.model, facts.vocab_size, service.max_model_len)
        yield ServeState(
            service=service,
            texts=texts,
            model_name=config.model_name,
            keys=keys,
            limits=config.limits,
            codec=config.codec,
            open_metrics=config.open_metrics,
        )
        service.drain(config.drain_s)
    finally:
        service.close()


def _looked_up(namespaces: dict[str, bytes]) -> Callable[[str], bytes]:
    return lambda tenant: namespaces[tenant]
