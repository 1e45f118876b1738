"""Bodies of requests, as the OpenAI API has them and vLLM widened them; also their JSON schemas.

Fields of a chat or completion that are not listed are ignored: clients send many, and more with
every release. Listed beside what is used are fields that change no answer (`user`, `metadata`, ...:
taken, not looked at) and fields that are known to change it and that this server cannot follow:
they are taken with the values that say nothing and refused with any other, by `refuse_unsupported`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ringspan.deploy.serve.errors import ApiError, bad

MAX_STOPS, MAX_STOP_CHARS = 16, 1024
Count = Annotated[int, Meta(ge=1, le=1 << 31)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
ContextId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$", description="16 hex characters.")]
Temperature = Annotated[float, Meta(ge=0, le=2, description="Below 0.00001: the likeliest token.")]
TopP = Annotated[float, Meta(ge=0, le=1)]
Choices = Annotated[int, Meta(ge=1, le=64)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Priority = Annotated[int, Meta(ge=-100, le=100, description="Larger is later.")]
Key = Annotated[str, Meta(max_length=256)]
Name = Annotated[str, Meta(max_length=1024)]
Idle = Annotated[Any, Meta(description="Changes no answer: taken, not looked at.")]
Unable = Annotated[Any, Meta(description="Refused, unless its value says nothing.")]

SAYS_NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
}
"""Of fields that this server cannot follow: the values, besides null, that ask nothing of it."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool = False
    """One more chunk, with `choices: []` and `usage`."""
    include_prompt_progress: bool = True
    """Chunks with `choices: []` and `prompt_progress` while a prefill runs; else comments."""


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """What chats and completions have in common."""

    model: Name = ""
    """Empty: the one that is served."""
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Choices | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    contexts: list[ContextId] | None = None
    """Ids of contexts that the prompt goes on from; one for now."""
    priority: Priority = 0
    return_token_ids: bool = False
    """Adds `token_ids` to every choice."""
    user: Idle = None
    metadata: Idle = None
    store: Idle = None
    service_tier: Idle = None
    safety_identifier: Idle = None
    prompt_cache_key: Idle = None
    prompt_cache_retention: Idle = None
    presence_penalty: Unable = None
    frequency_penalty: Unable = None
    repetition_penalty: Unable = None
    logit_bias: Unable = None
    top_k: Unable = None
    min_p: Unable = None
    prompt_logprobs: Unable = None
    guided_json: Unable = None
    guided_regex: Unable = None
    guided_choice: Unable = None
    guided_grammar: Unable = None
    structured_outputs: Unable = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class CompletionRequest(Asking, frozen=True, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    """A text, texts, token ids, or lists of token ids."""
    logprobs: Alternatives | None = None
    """So many alternatives a token; 0: of the token that was chosen alone."""
    echo: Unable = None
    suffix: Unable = None
    best_of: int | None = None
    """Taken if it is `n`: all are answered, and none is picked."""


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[A-Za-z_]+$")]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Unable = None
    function_call: Unable = None
    audio: Unable = None


class ChatRequest(Asking, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: Count | None = None
    """Goes before `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    parallel_tool_calls: Idle = None
    """Without tools there is nothing that it could change."""
    prediction: Idle = None
    """A hint for speed."""
    tools: Unable = None
    tool_choice: Unable = None
    functions: Unable = None
    function_call: Unable = None
    response_format: Unable = None
    modalities: Unable = None
    audio: Unable = None
    reasoning_effort: Unable = None
    verbosity: Unable = None
    web_search_options: Unable = None
    chat_template: Unable = None
    chat_template_kwargs: Unable = None
    add_generation_prompt: Unable = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """As vLLM has it: a prompt, or messages."""

    model: Name = ""
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = False


class ContextFile(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=1024)]
    """What it is called in the document; no file of the server."""
    text: str


class ContextRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document to prefill and keep: `text`, `files` or `token_ids`, one of them."""

    model: Name = ""
    text: str | None = None
    files: list[ContextFile] | None = None
    token_ids: list[TokenId] | None = None
    title: Annotated[str, Meta(max_length=1024)] = ""
    codec: Annotated[str, Meta(max_length=64)] = ""
    """Empty: the server's."""
    plain: bool = False
    """Without the opening of the model's chat template before the document."""
    priority: Priority = 0
    idempotency_key: Key = ""
    stream: bool = False
    """Events of its progress until it is done."""
    wait: bool = False
    """Answer when it is done, instead of at once."""


Body = TypeVar("Body", bound=msgspec.Struct)


def parse(body: bytes, kind: type[Body]) -> Body:
    """The request in a body. ApiError 400 that names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        if unknown := re.search(r"contains unknown field `(.*?)`", text, re.DOTALL):
            name = unknown[1][:100]
            raise bad(
                f"{name} is not known here; leave it out, or see GET /openapi.json for what is",
                name,
                "unsupported_parameter",
            ) from None
        found = re.search(r" - at `\$\.?(.*?)`$", text)
        param = re.split(r"[.\[]", found[1])[0] if found else None
        if missing := re.search(r"missing required field `(\w+)`", text):
            param = missing[1]
        raise bad(text[:500], param or None, "invalid_value") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise bad(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    except RecursionError:
        raise bad("the body is nested too deeply", code="invalid_json") from None


def refuse_unsupported(asked: Asking) -> None:
    """ApiError 400 for what would be answered wrongly if it were ignored."""
    for name, nothing in SAYS_NOTHING.items():
        value = getattr(asked, name, None)
        if value is not None and value not in nothing:
            told = " or ".join(msgspec.json.encode(one).decode() for one in nothing)
            raise _unsupported(name, f"wanted {told or 'none'}")
    if asked.contexts is not None and len(asked.contexts) != 1:
        raise bad(
            f"contexts: {len(asked.contexts)} were named; wanted exactly one, for the positions of "
            "several cannot be joined; prefill their texts as one context",
            "contexts",
            "unsupported_value",
        )
    if len(asked.stops) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in asked.stops):
        raise bad(
            f"stop: wanted at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters",
            "stop",
            "invalid_value",
        )
    if asked.max_tokens is not None and asked.min_tokens > asked.max_tokens:
        raise bad(
            f"min_tokens {asked.min_tokens} is more than max_tokens {asked.max_tokens}",
            "min_tokens",
            "invalid_value",
        )
    if isinstance(asked, CompletionRequest) and asked.best_of not in (None, asked.n or 1):
        raise _unsupported("best_of", "wanted the same as n")
    if isinstance(asked, ChatRequest):
        if asked.top_logprobs and not asked.logprobs:
            raise bad("top_logprobs wants logprobs: true", "top_logprobs", "invalid_value")
        for message in asked.messages:
            for name in ("tool_calls", "function_call", "audio"):
                if getattr(message, name) not in (None, []):
                    raise bad(
                        f"messages with {name} are not supported; wanted text alone",
                        "messages",
                        "unsupported_value",
                    )


def _unsupported(name: str, wanted: str) -> ApiError:
    return bad(f"{name} is not supported; {wanted}", name, "unsupported_parameter")


def schemas(*kinds: type[msgspec.Struct]) -> dict[str, Any]:
    """Their JSON schemas by name, which refer to one another as OpenAPI wants it."""
    _, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    return dict(components)
