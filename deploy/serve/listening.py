"""The HTTP server below the application: its socket, and uvicorn with its bounds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ringspan.deploy.serve.errors import BUSY, ApiError
from ringspan.deploy.serve.limits import HttpLimits
from ringspan.errors import BadInput

HEADER_BYTES = 64 << 10
"""Of a request's line and headers: what the parser takes before it gives up. `HttpLimits` refuse
less, with a better answer."""
BACKLOG = 512


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on the address, before anything costly is started. BadInput if it is not to be
    had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            raise BadInput(f"cannot listen on {host} port {port}: {why}") from None
        yield listening
    finally:
        listening.close()


def server_for(
    app: ASGIApp,
    *,
    drain_s: float,
    log_level: str = "info",
    limits: HttpLimits = HttpLimits(),  # noqa: B008  # frozen
) -> uvicorn.Server:
    """Its `run` ends at SIGINT or SIGTERM, in a thread when `should_exit` is set."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_protocol(limits),  # over h11, whose headers are bounded
            ws="none",
            lifespan="on",
            h11_max_incomplete_event_size=HEADER_BYTES,
            backlog=BACKLOG,
            server_header=False,
            timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type]  # seconds for a timer
            timeout_graceful_shutdown=max(1, round(drain_s)),
            log_level=log_level,
        )
    )


class PatientProtocol(H11Protocol):
    """uvicorn's, which waits for headers as long as bytes of them come; patient up to `limits`.

    While no request is under way one of two clocks runs: uvicorn's, between requests, which the
    next byte stops; and ours, from that byte, or from the connection, until the headers are whole.
    """

    limits: HttpLimits
    _clock: asyncio.TimerHandle | None = None

    @property
    def without_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since_s = self.loop.time()
        if len(self.connections) > self.limits.connections:
            others = [one for one in self.connections if isinstance(one, PatientProtocol)]
            idle = [one for one in others if one.without_request and one is not self]
            if not idle:
                self._refuse(
                    ApiError(
                        503,
                        f"{self.limits.connections} connections are busy, no more are taken at a "
                        "time; try again",
                        kind=BUSY,
                        code="overloaded",
                        retry_after_s=1.0,
                    )
                )
                return
            min(idle, key=lambda one: one.since_s).close()
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        self.since_s = self.loop.time()
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def close(self) -> None:
        """Its place is wanted, or it waited too long."""
        self._stop()
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        self.transport.close()

    def _watch(self) -> None:
        if not self.without_request or self.transport.is_closing():
            self._stop()
        elif self._clock is None and self.timeout_keep_alive_task is None:
            self._clock = self.loop.call_later(self.limits.header_timeout_s, self._too_slow)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        self._clock = None
        if self.transport.is_closing() or not self.without_request:
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            limit_s = self.limits.header_timeout_s
            message = f"the headers were not whole {limit_s:g} s after their first byte"
            self._refuse(ApiError(408, message, code="timeout"))
        else:
            self.close()

    def _refuse(self, error: ApiError) -> None:
        """Where no request can be parsed there is no application to answer it."""
        body = error.body()
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        reason = {408: "Request Timeout", 503: "Service Unavailable"}[error.status]
        lines = [f"HTTP/1.1 {error.status} {reason}", *(f"{k}: {v}" for k, v in headers.items())]
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.close()


def _protocol(limits: HttpLimits) -> type[asyncio.Protocol]:
    """uvicorn makes one for each connection, and gives it settings of its own alone."""
    settings: dict[str, Any] = {"limits": limits}
    return type("Protocol", (PatientProtocol,), settings)
