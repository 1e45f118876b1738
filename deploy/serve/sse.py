"""Server-sent events: `data: {...}` and an empty line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
COMMENT = b": still at it\n\n"
"""Keeps the connection without an event."""
_encode = msgspec.json.Encoder().encode


def data(value: object) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


class EventStream(Response):
    """Sends what the generator gives as it comes; closes it when the client takes no more."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        send_timeout_s: float,
        close: Callable[[], None],
        headers: dict[str, str] | None = None,
    ) -> None:
        """close: called once nothing more is sent, even if nothing ever was."""
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # proxies would hold events back
        self._events, self._send_timeout_s, self._close = events, send_timeout_s, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self._events:
                async with asyncio.timeout(self._send_timeout_s):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, OSError):
            return  # it takes nothing more; the server closes a connection whose body has no end
        finally:
            self._close()
