"""Contexts as a resource: documents that are prefilled once and asked any number of times.

A prefill belongs to nobody's connection: a client that leaves can ask for its progress, or post the
same document again, and is attached to what runs. An id of a request is 16 hex characters or it is
none; it reaches the store through the service, which looks it up among the tenant's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.service_types import DoneEvent, Event, FailedEvent, JobView, ProgressEvent
from ringspan.cluster.stored import Description
from ringspan.deploy.serve import sse
from ringspan.deploy.serve.errors import CLIENT_LEFT, MISSING, ApiError, as_api_error, bad
from ringspan.deploy.serve.openai_types import ContextRequest, parse
from ringspan.deploy.serve.state import ServeState, idempotency_key, state_of
from ringspan.deploy.serve.texts import ContextTokens, too_long
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.types import Span

if TYPE_CHECKING:
    from ringspan.cluster.service_jobs import Ticket
    from ringspan.cluster.service_types import ContextView

_CONTEXT_ID = re.compile(r"[0-9a-f]{16}")
AT_ONCE_S = 0.25
"""A prefill that is over so soon is answered with 200 instead of 202: mostly of what is stored."""


async def make(request: Request) -> Response:
    """`POST /v1/contexts`."""
    state = state_of(request)
    tenant = state.keys.of(request)
    async with state.bodies.of(request) as body:
        asked = parse(body, ContextRequest)
        state.check_model(asked.model)
        tokens = await _tokens(state, asked)
    description = Description(
        title=asked.title,
        sources=tuple(file.name for file in asked.files or ()),
        chat=tokens.chat,
        document=tokens.document,
    )
    key = idempotency_key(request)
    hearing = _Hearing(request)
    try:
        ticket = await asyncio.to_thread(
            state.service.prefill,
            tokens.token_ids,
            PrefillOptions(codec=asked.codec or state.codec),
            description=description,
            tenant=tenant,
            priority=asked.priority,
            idempotency_key=asked.idempotency_key or key,
            listener=hearing.listen,
        )
        hearing.ticket = ticket
        if asked.stream:
            return sse.EventStream(
                _events(state, ticket, hearing, tenant),
                state.limits.send_timeout_s,
                hearing.close,
                {"x-request-id": ticket.request_id},
            )
        try:
            done = await hearing.ended(None if asked.wait else AT_ONCE_S)
            view = await _shown(state, ticket, tenant, hearing.view, done)
        finally:
            hearing.close()
        return Response(
            msgspec.json.encode(view),
            200 if done else 202,
            {"x-request-id": ticket.request_id, "location": f"/v1/contexts/{ticket.context_id}"},
            "application/json",
        )
    except ConnectionError:  # the client went away; the prefill goes on
        hearing.close()
        return Response(status_code=CLIENT_LEFT)
    except BaseException:
        hearing.close()
        raise


async def _tokens(state: ServeState, asked: ContextRequest) -> ContextTokens:
    given = [name for name in ("text", "files", "token_ids") if getattr(asked, name) is not None]
    if len(given) != 1:
        raise bad(
            f"wanted one of text, files and token_ids, found {' and '.join(given) or 'none'}",
            given[0] if given else "text",
            "invalid_value",
        )
    if asked.codec and asked.codec not in CODECS:
        known = ", ".join(sorted(CODECS))
        raise bad(f"unknown codec {asked.codec!r}; known: {known}", "codec", "invalid_value")
    if asked.token_ids is not None:
        ids = np.asarray(state.texts.token_ids(asked.token_ids, "token_ids"), dtype=np.int32)
        tokens = ContextTokens(ids, Span(0, len(ids)), chat=False)
    else:
        tokens = await state.texts.document(asked.text, asked.files, asked.plain)
    limit = state.service.max_model_len
    if len(tokens.token_ids) >= limit:  # a context without room for a question is of no use
        raise too_long(limit, len(tokens.token_ids), 1, given[0])
    return tokens


async def list_(request: Request) -> Response:
    """`GET /v1/contexts`: the tenant's own."""
    state = state_of(request)
    tenant = state.keys.of(request)
    views = await asyncio.to_thread(state.service.contexts, tenant)
    return _json({"object": "list", "data": [resource(view) for view in views]})


async def show(request: Request) -> Response:
    """`GET /v1/contexts/{id}`."""
    state = state_of(request)
    tenant = state.keys.of(request)
    view = await asyncio.to_thread(state.service.context, _context_id(request), tenant)
    return _json(resource(view))


async def remove(request: Request) -> Response:
    """`DELETE /v1/contexts/{id}`: from the gang and from the store."""
    state = state_of(request)
    tenant = state.keys.of(request)
    name = _context_id(request)
    await asyncio.to_thread(state.service.delete_context, name, tenant)
    return _json({"id": name, "object": "context", "deleted": True})


async def verify(request: Request) -> Response:
    """`POST /v1/contexts/{id}/verify`: every stored page is read and checked."""
    state = state_of(request)
    tenant = state.keys.of(request)
    name = _context_id(request)
    report = await asyncio.to_thread(state.service.verify_context, name, tenant)
    return _json({"id": name, "object": "context.verification", **report})


async def known_context(state: ServeState, name: str, tenant: str) -> ContextView:
    """One that can be asked. ApiError 404, or 409 while it is prefilled."""
    view = await asyncio.to_thread(state.service.context, name, tenant)
    if not (view.on_gang or view.stored):
        raise ApiError(
            409,
            f"context {name} is {view.state}: it can be asked once it is ready",
            kind="conflict_error",
            param="contexts",
            code="context_not_ready",
            retry_after_s=1.0,
        )
    return view


def resource(view: ContextView) -> dict[str, Any]:
    """A context as `GET /v1/contexts/{id}` shows it."""
    fields = msgspec.to_builtins(view)
    name, created = fields.pop("context_id"), fields.pop("created_unix_s")
    return {"id": name, "object": "context", "created": int(created), **fields}


async def _shown(
    state: ServeState, ticket: Ticket, tenant: str, view: JobView | None, done: bool
) -> dict[str, Any]:
    """The context, or what is known of it while its prefill waits or runs."""
    progress = msgspec.to_builtins(view or state.service.view(ticket.request_id, tenant))
    if done:
        found = await asyncio.to_thread(state.service.context, ticket.context_id, tenant)
        return {**resource(found), "request_id": ticket.request_id, "progress": progress}
    return {
        "id": ticket.context_id,
        "object": "context",
        "created": int(progress["created_unix_s"]),
        "state": progress["state"],
        "num_tokens": progress["prompt_tokens"],
        "request_id": ticket.request_id,
        "progress": progress,
    }


async def _events(
    state: ServeState, ticket: Ticket, hearing: _Hearing, tenant: str
) -> AsyncIterator[bytes]:
    """Progress, then the context."""
    try:
        done = False
        while not done:
            done = await hearing.ended(state.limits.progress_s)
            yield sse.data(await _shown(state, ticket, tenant, hearing.view, done))
        yield sse.DONE
    except ConnectionError:
        return
    except Exception as error:
        yield b"data: " + as_api_error(error, ticket.request_id).body() + b"\n\n"


class _Hearing:
    """One client's wait for a prefill."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Event | None] = asyncio.Queue()
        self._watch = self._loop.create_task(self._gone())
        self.ticket: Ticket | None = None
        self.view: JobView | None = None
        self._over = False

    def listen(self, events: Sequence[Event]) -> None:
        """On the service's thread."""

        def put() -> None:
            for event in events:
                self._news.put_nowait(event)

        with contextlib.suppress(RuntimeError):  # the loop ended before the prefill did
            self._loop.call_soon_threadsafe(put)

    async def ended(self, timeout_s: float | None) -> bool:
        """Whether the prefill is done; False after so long. Raises what it failed of, or
        ConnectionError once the client is gone."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    match await self._news.get():
                        case None:
                            raise ConnectionAbortedError("the client went away")
                        case FailedEvent(error=error):
                            self._over = True
                            raise error
                        case DoneEvent(view=view):
                            self.view, self._over = view, True
                            return True
                        case ProgressEvent(view=view):
                            self.view = view
        except TimeoutError:
            return False

    def close(self) -> None:
        """The prefill goes on without this client."""
        self._watch.cancel()
        if self.ticket is not None and not self._over:
            self.ticket.leave()

    async def _gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._news.put_nowait(None)


def _context_id(request: Request) -> str:
    name = str(request.path_params["id"])
    if not _CONTEXT_ID.fullmatch(name):
        raise ApiError(
            404,
            "no such context: an id is 16 hex characters, as POST /v1/contexts answers",
            kind=MISSING,
            param="id",
            code="not_found",
        )
    return name


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
