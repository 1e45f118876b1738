"""The OpenAPI description, made of the structs that requests are decoded into."""

from __future__ import annotations

from typing import Any

from ringspan.deploy.serve.openai_types import (
    ChatRequest,
    CompletionRequest,
    ContextRequest,
    TokenizeRequest,
    schemas,
)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANY_JSON = {"application/json": {"schema": {"type": "object"}}}
_EVENTS: dict[str, Any] = {"text/event-stream": {}}
"""OpenAPI 3.1 has no schema for single events."""
_POSTS = (
    ("/v1/chat/completions", "The next turn of a conversation", ChatRequest),
    ("/v1/completions", "What follows a text or token ids", CompletionRequest),
    ("/tokenize", "Token ids of a text or of messages", TokenizeRequest),
    ("/v1/contexts", "Prefill a document and keep it", ContextRequest),
)
_GETS = (
    ("/v1/models", "The model that is served"),
    ("/v1/contexts", "The tenant's contexts"),
    ("/v1/requests", "The tenant's requests, newest first"),
    ("/health", "Whether requests are taken"),
    ("/metrics", "Prometheus' text format"),
)
_ID = {"type": "string", "pattern": "^[0-9a-f]{16}$"}
_REQUEST = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}


def describe(version: str) -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for path, summary, kind in _POSTS:
        ref = {"$ref": f"#/components/schemas/{kind.__name__}"}
        paths.setdefault(path, {})["post"] = _operation(summary, path, "post") | {
            "requestBody": {"required": True, "content": {"application/json": {"schema": ref}}}
        }
    for path, summary in _GETS:
        paths.setdefault(path, {})["get"] = _operation(summary, path, "get")
    for path, method, summary, schema in (
        ("/v1/models/{id}", "get", "One model", {"type": "string"}),
        ("/v1/contexts/{id}", "get", "One context", _ID),
        ("/v1/contexts/{id}", "delete", "Remove a context", _ID),
        ("/v1/contexts/{id}/verify", "post", "Read and check every stored page", _ID),
        ("/v1/requests/{id}", "get", "How far one request is", _REQUEST),
    ):
        parameter = {"name": "id", "in": "path", "required": True, "schema": schema}
        paths.setdefault(path, {})[method] = _operation(summary, path, method) | {
            "parameters": [parameter]
        }
    kinds = schemas(ChatRequest, CompletionRequest, TokenizeRequest, ContextRequest)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ringspan", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**kinds, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(summary: str, path: str, method: str) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace("v1_", "")
    answer: dict[str, Any] = {"description": "Done", "content": _ANY_JSON}
    if path == "/metrics":
        answer["content"] = {"text/plain": {"schema": {"type": "string"}}}
    elif method == "post" and path in ("/v1/chat/completions", "/v1/completions", "/v1/contexts"):
        answer["content"] = {**_ANY_JSON, **_EVENTS}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    more = {"202": {**answer, "description": "Under way"}} if path == "/v1/contexts" else {}
    return {
        "summary": summary,
        "operationId": f"{method}_{name}",
        "responses": {
            "200": answer,
            **(more if method == "post" else {}),
            "4XX": {"description": "What the request got wrong", "content": error},
            "503": {"description": "Overloaded: see Retry-After", "content": error},
        },
    }
