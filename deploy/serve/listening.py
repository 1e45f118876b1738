"""The HTTP server below the application: its socket, and uvicorn with its bounds."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

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


def server_for(app: ASGIApp, *, drain_s: float, log_level: str = "info") -> uvicorn.Server:
    """Its `run` ends at SIGINT or SIGTERM, in a thread when `should_exit` is set."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",  # the one whose headers are bounded
            ws="none",
            lifespan="on",
            h11_max_incomplete_event_size=HEADER_BYTES,
            backlog=BACKLOG,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_s)),
            log_level=log_level,
        )
    )
