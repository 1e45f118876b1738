"""The same endpoint as an application of Ray Serve: one replica owns the gang.

    serve run ringspan.deploy.serve.serve_app:build model=smollm2 ranks=2
    serve deploy CONFIG.yaml          # with args: {model: ..., store: ..., api_keys: ...}

One replica: contexts lie on its gang, and another replica would have another. The gang's ranks are
actors with placement groups of their own, unless `local`. Ray Serve's proxy listens, so that the
bounds of `limits.py` hold behind the proxy's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
from ray import serve

from ringspan.deploy.serve.app import build_app
from ringspan.deploy.serve.serving import ServeConfig, check_config, serving
from ringspan.errors import BadInput

ONGOING_REQUESTS = 512
"""The service has its own bounds and says so with a status; Serve's would let clients wait."""


def config_from(args: Mapping[str, Any]) -> ServeConfig:
    """Arguments of a YAML, or `name=value` words of `serve run`. BadInput for no setting."""
    try:
        return msgspec.convert(dict(args), ServeConfig, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(ServeConfig.__struct_fields__)
        raise BadInput(f"application arguments: {error}; known: {known}") from None


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application. Raises BadInput before anything is deployed."""
    config = config_from(args)

    def app() -> Any:
        """Runs in the replica, which has the weights, the store and the keys."""
        keys = check_config(config)
        stack = contextlib.ExitStack()
        state = stack.enter_context(serving(config, keys))
        return build_app(state, closing=stack.close)

    replica: Any = serve.deployment(
        serve.ingress(app)(),
        name="ringspan",
        num_replicas=1,
        max_ongoing_requests=ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=config.drain_s + 30.0,
        health_check_timeout_s=60.0,
    )
    application: serve.Application = replica.bind()
    return application
