"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from ringspan.deploy.serve.auth import ApiKeys
from ringspan.deploy.serve.errors import MISSING, ApiError, bad
from ringspan.deploy.serve.limits import Bodies, HttpLimits
from ringspan.deploy.serve.texts import Texts

if TYPE_CHECKING:
    from ringspan.cluster.service import Service


@dataclass
class ServeState:
    """Made when the server starts; of one event loop."""

    service: Service
    texts: Texts
    model_name: str
    """As `GET /v1/models` lists it, and requests name it."""
    keys: ApiKeys
    limits: HttpLimits
    codec: str = "raw"
    """Of contexts that name none."""
    open_metrics: bool = False
    """`GET /metrics` wants no key."""
    created_unix_s: int = field(default_factory=lambda: int(time.time()))
    bodies: Bodies = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.limits)

    def check_model(self, name: str) -> None:
        """ApiError 404 for a model that is not served; empty: whichever is."""
        if name and name != self.model_name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; this server has {self.model_name!r}",
                kind=MISSING,
                param="model",
                code="model_not_found",
            )


MOST_KEY_CHARS = 256


def idempotency_key(request: Request) -> str:
    """Of the header `Idempotency-Key`; empty: there is none. ApiError 400."""
    key = request.headers.get("idempotency-key", "")
    if len(key) > MOST_KEY_CHARS:
        raise bad(
            f"Idempotency-Key of {len(key)} characters: wanted at most {MOST_KEY_CHARS}",
            "Idempotency-Key",
            "invalid_value",
        )
    return key


def state_of(request: Request) -> ServeState:
    state = request.app.state.serve
    assert isinstance(state, ServeState)
    return state
