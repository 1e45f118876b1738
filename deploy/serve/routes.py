"""Chats, completions, tokenising, and what the server says of itself."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ringspan.deploy.serve.contexts import known_context
from ringspan.deploy.serve.errors import MISSING, ApiError, bad
from ringspan.deploy.serve.openai_types import (
    Asking,
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    parse,
    refuse_unsupported,
)
from ringspan.deploy.serve.respond import Conversation, asks_of, respond
from ringspan.deploy.serve.shapes import ChatShape, CompletionShape
from ringspan.deploy.serve.state import ServeState, state_of

_REQUEST_ID = re.compile(r"(?:chatcmpl-|cmpl-)?([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
MOST_PROMPTS = 64


async def chat(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    state = state_of(request)
    tenant = state.keys.of(request)
    async with state.bodies.of(request) as body:
        asked = parse(body, ChatRequest)
        _check(state, asked)
        if asked.contexts:
            context = await known_context(state, asked.contexts[0], tenant)
            ids = await state.texts.behind_context(asked.messages, context.chat)
            talk = Conversation(tenant, [ids], "messages", context.context_id, context.num_tokens)
        else:
            talk = Conversation(tenant, [await state.texts.chat(asked.messages)], "messages")
        wanted = (asked.top_logprobs or 0) if asked.logprobs else None
        asks = asks_of(state, asked, talk, 0 if wanted is None else max(1, wanted))
        shape = ChatShape(state.texts, wanted, asked.return_token_ids)
    return await respond(state, request, asked, talk, asks, shape)


async def completions(request: Request) -> Response:
    """`POST /v1/completions`."""
    state = state_of(request)
    tenant = state.keys.of(request)
    async with state.bodies.of(request) as body:
        asked = parse(body, CompletionRequest)
        _check(state, asked)
        context_id, context_tokens = "", 0
        if asked.contexts:
            context = await known_context(state, asked.contexts[0], tenant)
            context_id, context_tokens = context.context_id, context.num_tokens
        prompts = await _prompts(state, asked)
        talk = Conversation(tenant, prompts, "prompt", context_id, context_tokens)
        wanted = asked.logprobs
        asks = asks_of(state, asked, talk, 0 if wanted is None else max(1, wanted))
        shape = CompletionShape(state.texts, wanted, asked.return_token_ids)
    return await respond(state, request, asked, talk, asks, shape)


async def _prompts(state: ServeState, asked: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    prompt, texts = asked.prompt, state.texts
    if isinstance(prompt, str):
        return [await texts.plain(prompt)]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [texts.token_ids(ids, "prompt")]
    if ids or not prompt or len(prompt) > MOST_PROMPTS:
        raise bad(
            "prompt: wanted a text, token ids, or a list of at most "
            f"{MOST_PROMPTS} texts or lists of token ids",
            "prompt",
            "invalid_value",
        )
    return [
        await texts.plain(item)
        if isinstance(item, str)
        else texts.token_ids(item if isinstance(item, list) else [item], "prompt")
        for item in prompt
    ]


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`: of a text, or of messages through the chat template."""
    state = state_of(request)
    state.keys.of(request)
    async with state.bodies.of(request) as body:
        asked = parse(body, TokenizeRequest)
        state.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad("wanted one of prompt and messages", "prompt", "invalid_value")
        if asked.messages is not None:
            ids = await state.texts.chat(asked.messages)
        else:
            ids = await state.texts.plain(asked.prompt or "")
    return _json({"count": len(ids), "max_model_len": state.service.max_model_len, "tokens": ids})


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    state = state_of(request)
    state.keys.of(request)
    return _json({"object": "list", "data": [_card(state)]})


async def model(request: Request) -> Response:
    """`GET /v1/models/{name}`."""
    state = state_of(request)
    state.keys.of(request)
    state.check_model(request.path_params["name"])
    return _json(_card(state))


def _card(state: ServeState) -> dict[str, Any]:
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created_unix_s,
        "owned_by": "ringspan",
        "root": state.model_name,
        "parent": None,
        "max_model_len": state.service.max_model_len,
    }


async def health(request: Request) -> Response:
    """`GET /health`: 200 while requests are taken. No key: load balancers have none."""
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """`GET /metrics`, in Prometheus' text format."""
    state = state_of(request)
    if not state.open_metrics:
        state.keys.of(request)
    return Response(
        state.service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


async def request_view(request: Request) -> Response:
    """`GET /v1/requests/{id}`: of the tenant's own; ids of chats and completions are taken too."""
    state = state_of(request)
    tenant = state.keys.of(request)
    match = _REQUEST_ID.fullmatch(request.path_params["id"])
    if match is None:
        raise ApiError(404, "no such request", kind=MISSING, code="not_found")
    return _json(msgspec.to_builtins(state.service.view(match[1], tenant)))


async def request_views(request: Request) -> Response:
    """`GET /v1/requests`: the tenant's own, newest first."""
    state = state_of(request)
    tenant = state.keys.of(request)
    views = [view for view in state.service.views() if view.tenant == tenant]
    views.sort(key=lambda view: view.created_unix_s, reverse=True)
    return _json({"object": "list", "data": [msgspec.to_builtins(view) for view in views]})


def _check(state: ServeState, asked: Asking) -> None:
    state.check_model(asked.model)
    refuse_unsupported(asked)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
