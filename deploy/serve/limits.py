"""What a request may bring, checked before any of it is parsed: headers, type and size of a body.

A server of long documents must take large bodies, but only so many at once, and none that dribbles
in for ever. All bodies that are being read or answered share one budget of bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ringspan.deploy.serve.errors import BUSY, ApiError
from ringspan.errors import BadInput


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one server."""

    body_bytes: int = 32 << 20
    """Of one request: a million token ids as JSON take 8 MB, as text 4 MB."""
    bodies_bytes: int = 256 << 20
    """Of all requests whose bodies are held at a time."""
    body_timeout_s: float = 120.0
    """From the headers to the last byte of a body."""
    header_bytes: int = 32 << 10
    """Of all headers and the path."""
    header_count: int = 100
    header_timeout_s: float = 10.0
    """From the first byte of a request, or from the connection, to the last byte of its headers."""
    idle_s: float = 30.0
    """A connection without a request is kept so long for the next one."""
    connections: int = 1024
    """At a time; one more takes the place of the one that has been idle longest."""
    progress_s: float = 2.0
    """A stream that has had nothing to tell for so long tells how far its prefill is."""
    send_timeout_s: float = 120.0
    """A client that takes nothing of its stream for so long is gone."""
    answer_tokens: int = 1024
    """Of a chat's answer whose request names no `max_completion_tokens`."""
    choices: int = 64
    """Answers that one request may ask for: its prompts times `n`."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) <= 0:
                raise BadInput(f"limit {name} = {getattr(self, name)}: wanted more than 0")


class Bodies:
    """The budget of bodies. Of one event loop."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._held_bytes = 0

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """A JSON request's body, which counts against the budget until the block is left. ApiError
        408, 413, 415 or 503."""
        limits = self._limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"Content-Type {kind[:100]!r}: wanted application/json",
                code="unsupported_media_type",
            )
        told = request.headers.get("content-length", "")
        if told.isdigit() and len(told) < 20 and int(told) > limits.body_bytes:
            raise self._too_long(int(told))
        taken = 0
        parts: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(limits.body_timeout_s):
                    async for part in request.stream():
                        taken += len(part)
                        self._held_bytes += len(part)
                        self._check(taken)
                        parts.append(part)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body was not there {limits.body_timeout_s:g} s after its headers "
                    f"({taken:,} bytes came)",
                    code="timeout",
                    headers={"connection": "close"},
                ) from None
            except ClientDisconnect:
                raise ApiError(400, "the connection closed within the body") from None
            body = b"".join(parts)
            parts.clear()
            yield body
        finally:
            self._held_bytes -= taken

    def _check(self, taken: int) -> None:
        if taken > self._limits.body_bytes:
            raise self._too_long(taken)
        if self._held_bytes > self._limits.bodies_bytes:
            raise ApiError(
                503,
                f"the bodies of all requests hold {self._held_bytes:,} bytes, at most "
                f"{self._limits.bodies_bytes:,} are taken at a time; try again",
                kind=BUSY,
                code="overloaded",
                retry_after_s=1.0,
                headers={"connection": "close"},
            )

    def _too_long(self, size: int) -> ApiError:
        return ApiError(
            413,
            f"the body has at least {size:,} bytes, at most {self._limits.body_bytes:,} are "
            "taken; send less at a time",
            code="body_too_large",
            headers={"connection": "close"},  # what is still to come is not read
        )


class HeaderLimits:
    """ASGI middleware: refuses before any route looks at the request. (The parser below it has a
    bound of its own, without which this would never be reached.)"""

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, limits = Headers(scope=scope), self._limits
        size = sum(len(name) + len(value) + 4 for name, value in headers.raw)
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if size > limits.header_bytes or len(headers.raw) > limits.header_count:
            error = ApiError(
                431,
                f"{len(headers.raw)} headers of {size:,} bytes; at most {limits.header_count} and "
                f"{limits.header_bytes:,} bytes are taken",
                code="headers_too_large",
                headers={"connection": "close"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)
