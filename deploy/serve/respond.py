"""From the answers that a request wants to its response, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ringspan.cluster.service_types import JobView, Sampling
from ringspan.deploy.serve import sse
from ringspan.deploy.serve.answering import Answers, Ask, Delta, Left
from ringspan.deploy.serve.errors import CLIENT_LEFT, as_api_error, bad
from ringspan.deploy.serve.openai_types import Asking, ChatRequest
from ringspan.deploy.serve.shapes import Json, Shape
from ringspan.deploy.serve.state import ServeState
from ringspan.deploy.serve.texts import too_long

GREEDY_BELOW = 1e-5
"""Of temperatures: dividing logits by less overflows."""
LEAST_TOP_P = 1e-9
COMPLETION_TOKENS = 16
"""OpenAI's own default for completions."""


class Conversation(NamedTuple):
    """What one request is about."""

    tenant: str
    prompts: Sequence[Sequence[int]]
    """Token ids of each prompt, or of what follows the context."""
    param: str
    """The request's field that they came from."""
    context_id: str = ""
    context_tokens: int = 0


def asks_of(state: ServeState, asked: Asking, talk: Conversation, logprobs: int) -> list[Ask]:
    """`n` answers for each prompt. ApiError 400 where prompt and answer have not the room, before
    anything is computed. logprobs: alternatives a token."""
    choices = asked.n or 1
    if len(talk.prompts) * choices > state.limits.choices:
        raise bad(
            f"{len(talk.prompts)} prompts times n = {choices}: at most {state.limits.choices} "
            "answers are given to one request",
            "n",
            "invalid_value",
        )
    stop_ids = () if asked.ignore_eos else state.texts.stop_ids
    stop_ids += tuple(asked.stop_token_ids or ())
    temperature = 1.0 if asked.temperature is None else asked.temperature
    top_p = 1.0 if asked.top_p is None else asked.top_p
    asks = []
    for prompt in talk.prompts:
        max_tokens = _max_tokens(state, asked, talk, len(prompt))
        for choice in range(choices):
            sampling = Sampling(
                max_tokens=max_tokens,
                min_tokens=min(asked.min_tokens, max_tokens),
                temperature=0.0 if temperature < GREEDY_BELOW else temperature,
                top_p=max(top_p, LEAST_TOP_P),
                seed=None if asked.seed is None else (asked.seed + choice) & (1 << 63) - 1,
                stop_ids=stop_ids,
                logprobs=logprobs,
            )
            asks.append(Ask(prompt, sampling, asked.stops, state.texts.stream()))
    return asks


def _max_tokens(state: ServeState, asked: Asking, talk: Conversation, new_tokens: int) -> int:
    limit = state.service.max_model_len
    prompt = talk.context_tokens + new_tokens
    chat = isinstance(asked, ChatRequest)
    wanted = asked.max_tokens
    if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
        wanted = asked.max_completion_tokens
    if prompt >= limit or (wanted is not None and prompt + wanted > limit):
        raise too_long(limit, prompt, wanted or 1, talk.param)
    if wanted is None:
        wanted = min(state.limits.answer_tokens if chat else COMPLETION_TOKENS, limit - prompt)
    return wanted


async def respond(
    state: ServeState,
    request: Request,
    asked: Asking,
    talk: Conversation,
    asks: Sequence[Ask],
    shape: Shape,
) -> Response:
    """Begins the answers and gives their response. What is refused at once, or fails before a
    stream has begun, is raised and has a status of its own."""
    answers = Answers(request)
    begin = partial(
        state.service.answer,
        context_id=talk.context_id,
        tenant=talk.tenant,
        priority=asked.priority,
    )
    try:
        await answers.begin(asks, begin)
        reply = _Reply(state, asked, talk, answers, shape)
        if not asked.stream:
            try:
                return reply.response(await reply.whole())
            finally:
                answers.close()
        first = await answers.next(state.limits.progress_s)
        return sse.EventStream(
            reply.stream(first),
            state.limits.send_timeout_s,
            answers.close,
            {"x-request-id": reply.request_id},
        )
    except Left:
        answers.close()
        return Response(status_code=CLIENT_LEFT)
    except BaseException:
        answers.close()
        raise


class _Reply:
    def __init__(
        self,
        state: ServeState,
        asked: Asking,
        talk: Conversation,
        answers: Answers,
        shape: Shape,
    ) -> None:
        self._state, self._asked, self._talk = state, asked, talk
        self._answers, self._shape = answers, shape
        ticket = answers.all[0].ticket
        assert ticket is not None
        self.request_id = ticket.request_id
        self._frame: Json = {
            "id": f"{shape.id_prefix}{self.request_id}",
            "object": shape.chunk_object if asked.stream else shape.whole_object,
            "created": int(time.time()),
            "model": state.model_name,
        }

    def response(self, body: Json) -> Response:
        return Response(
            msgspec.json.encode(body),
            headers={"x-request-id": self.request_id},
            media_type="application/json",
        )

    async def whole(self) -> Json:
        every: dict[int, list[Delta]] = {one.index: [] for one in self._answers.all}
        while not self._answers.done:
            for delta in await self._answers.next(3600.0) or ():
                every[delta.choice].append(delta)
        choices = [
            self._shape.whole(
                one.index,
                "".join(delta.text for delta in every[one.index]),
                [token for delta in every[one.index] for token in delta.tokens],
                one.finish_reason,
            )
            for one in self._answers.all
        ]
        return {**self._frame, "choices": choices, "usage": self._usage()}

    async def stream(self, deltas: list[Delta] | None) -> AsyncIterator[bytes]:
        """deltas: those that came before the stream began; None: it has waited for them."""
        options = self._asked.stream_options
        opened: set[int] = set()
        try:
            while True:
                if deltas is None:
                    yield self._progress()
                for delta in deltas or ():
                    if delta.choice not in opened:
                        opened.add(delta.choice)
                        opening = self._shape.opening(delta.choice)
                        if opening is not None:
                            yield self._chunk([opening])
                    if delta.text or delta.finish_reason or self._shape.tells_tokens:
                        yield self._chunk([self._shape.part(delta)])
                if self._answers.done:
                    break
                deltas = await self._answers.next(self._state.limits.progress_s)
            if options is not None and options.include_usage:
                yield self._chunk([], usage=self._usage())
            yield sse.DONE
        except Left:
            return
        except Exception as error:  # the status is out: it travels as an event, and that is all
            yield b"data: " + as_api_error(error, self.request_id).body() + b"\n\n"

    def _chunk(self, choices: list[Json], **more: Any) -> bytes:
        return sse.data({**self._frame, "choices": choices, **more})

    def _progress(self) -> bytes:
        options = self._asked.stream_options
        view = self._answers.view()
        if view is None or (options is not None and not options.include_prompt_progress):
            return sse.COMMENT
        return self._chunk([], prompt_progress=progress_of(view))

    def _usage(self) -> Json:
        choices = self._asked.n or 1
        cached = 0
        for one in self._answers.all[::choices]:
            cached += self._talk.context_tokens
            if not self._talk.context_id and one.ticket is not None:
                view = one.view
                cached += view.cached_tokens if view is not None else one.ticket.cached_tokens
        prompt = sum(self._talk.context_tokens + len(ids) for ids in self._talk.prompts)
        completion = sum(one.num_tokens for one in self._answers.all)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        }


def progress_of(view: JobView) -> Json:
    """How far a prefill is, for a client that waits."""
    return {
        "request_id": view.request_id,
        "state": str(view.state),
        "tokens_done": view.tokens_done,
        "prompt_tokens": view.prompt_tokens,
        "cached_tokens": view.cached_tokens,
        "chunk_index": view.chunk_index,
        "num_chunks": view.num_chunks,
        "left_s": view.left_s,
        "queue_place": view.queue_place,
    }
