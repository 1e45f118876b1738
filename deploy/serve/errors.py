"""What a client is told when something is refused or fails, as OpenAI's clients read it.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

A status below 500 names what the client can change. 429 and 503 carry `Retry-After`, which the
clients obey. What is not one of our errors becomes a bare 500: its text could name anything, so it
goes to the log under the request's id and not to the client.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ringspan.cluster.events import Cancelled
from ringspan.errors import (
    BadInput,
    CorruptPage,
    PeerTimeout,
    RankLost,
    RingspanError,
    StoreError,
    TooLarge,
    UnknownName,
)
from ringspan.kvstore.leases import InUse

log = logging.getLogger("ringspan.serve")

INVALID, MISSING, DENIED = "invalid_request_error", "not_found_error", "authentication_error"
SERVER, BUSY, LIMITED = "server_error", "overloaded_error", "rate_limit_error"
CLIENT_LEFT = 499
"""nginx's status of a request whose client went away; nobody reads it but a log."""
LOST_RETRY_S = 5.0
"""After a lost rank: a gang is mended in seconds, a service that cannot mend says so again."""


class ApiError(Exception):
    """An answer that is an error. retry_after_s: for `Retry-After`; 0: none."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code = param, code
        self.headers = dict(headers or {})
        if retry_after_s:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))

    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.kind,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400, for what the request itself got wrong."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException, request_id: str = "") -> ApiError:
    """The answer to any exception. One that is not ours is logged under `request_id`."""
    if isinstance(error, ApiError):
        return error
    text = str(error)
    retry_s = getattr(error, "retry_after_s", None)
    if retry_s is not None:  # cluster.service_types.Overloaded: of everybody, or of one tenant
        whose = getattr(error, "tenant", "")
        status, kind = (429, LIMITED) if whose else (503, BUSY)
        code = "rate_limit_exceeded" if whose else "overloaded"
        return ApiError(status, text, kind=kind, code=code, retry_after_s=max(1.0, retry_s))
    match error:
        case UnknownName():
            return ApiError(404, _without_others(text), kind=MISSING, code="not_found")
        case TooLarge() if "positions" in text:
            return bad(f"maximum context length exceeded: {text}", code="context_length_exceeded")
        case TooLarge():
            return bad(text, code="too_large")
        case BadInput():
            return bad(text)
        case InUse():
            return ApiError(409, text, kind="conflict_error", code="in_use")
        case CorruptPage():
            return ApiError(500, text, kind=SERVER, code="corrupt_page")
        case RankLost() | PeerTimeout():
            return ApiError(503, text, kind=SERVER, code="rank_lost", retry_after_s=LOST_RETRY_S)
        case Cancelled():
            return ApiError(503, text, kind=SERVER, code="cancelled", retry_after_s=1.0)
        case StoreError():
            log.error("store_error request_id=%s %s", request_id, text)  # it names a path
            return ApiError(
                507 if "free" in text else 500,
                "the server's store cannot be read or written; its log says why",
                kind=SERVER,
                code="store_error",
            )
        case RingspanError():
            log.error("failed request_id=%s %s", request_id, text)
            return ApiError(500, text, kind=SERVER, code="engine_error")
    log.error("unexpected request_id=%s", request_id, exc_info=error)
    named = f" (request {request_id})" if request_id else ""
    return ApiError(
        500, f"the server failed on this request{named}", kind=SERVER, code="internal_error"
    )


def _without_others(text: str) -> str:
    """`unknown context 'x'; known: ...` lists names; a client is told of its own alone."""
    return re.sub(r"; known: .*", "", text, flags=re.DOTALL)


async def on_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler of what a route raised."""
    return as_api_error(error, request.headers.get("x-request-id", "")[:64]).response()


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Its own refusals: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        message, code = f"{where}: no such route; GET /openapi.json lists them", "unknown_route"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message, code = f"{where}: wanted {allowed}", "method_not_allowed"
    else:
        message, code = str(error.detail), "refused"
    kind = MISSING if error.status_code == 404 else INVALID
    return ApiError(
        error.status_code, message, kind=kind, code=code, headers=error.headers
    ).response()
