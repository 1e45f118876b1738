"""Choices of chats and of completions, whole and in chunks, as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ringspan.cluster.service_types import TokenEvent
from ringspan.deploy.serve.answering import Delta
from ringspan.deploy.serve.texts import Texts

Json = dict[str, Any]


class Shape(Protocol):
    """Of one request's choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    tells_tokens: bool
    """Chunks without text tell something too: ids or logprobs."""

    def opening(self, index: int) -> Json | None:
        """The choice of a first chunk without text; None where there is none."""

    def part(self, delta: Delta) -> Json:
        """The choice of one chunk."""

    def whole(
        self, index: int, text: str, tokens: Sequence[TokenEvent], finish_reason: str | None
    ) -> Json:
        """The choice of an answer that is not streamed."""


class ChatShape:
    id_prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: Texts, alternatives: int | None, token_ids: bool) -> None:
        """alternatives: `top_logprobs`; None: no logprobs at all."""
        self._texts, self._alternatives, self._token_ids = texts, alternatives, token_ids
        self.tells_tokens = token_ids or alternatives is not None

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, delta: Delta) -> Json:
        content = {"content": delta.text} if delta.text else {}
        choice = {"index": delta.choice, "delta": content, "finish_reason": delta.finish_reason}
        return self._with(choice, delta.tokens)

    def whole(
        self, index: int, text: str, tokens: Sequence[TokenEvent], finish_reason: str | None
    ) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": index, "message": message, "finish_reason": finish_reason}
        return self._with(choice, tokens)

    def _with(self, choice: Json, tokens: Sequence[TokenEvent]) -> Json:
        wanted = self._alternatives
        choice["logprobs"] = (
            None
            if wanted is None
            else {"content": [self._logprob(token, wanted) for token in tokens], "refusal": None}
        )
        if self._token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        return choice

    def _logprob(self, token: TokenEvent, wanted: int) -> Json:
        top = [self._one(token_id, logprob) for token_id, logprob in token.top[:wanted]]
        return {**self._one(token.token_id, token.logprob), "top_logprobs": top}

    def _one(self, token_id: int, logprob: float | None) -> Json:
        text, read = self._texts.token(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": read}


class CompletionShape:
    id_prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, texts: Texts, alternatives: int | None, token_ids: bool) -> None:
        """alternatives: `logprobs`; None: none at all."""
        self._texts, self._alternatives, self._token_ids = texts, alternatives, token_ids
        self.tells_tokens = token_ids or alternatives is not None
        self._told: dict[int, int] = {}
        """Characters of each choice's tokens so far: where the next one's text begins."""

    def opening(self, index: int) -> Json | None:
        return None

    def part(self, delta: Delta) -> Json:
        return self.whole(delta.choice, delta.text, delta.tokens, delta.finish_reason)

    def whole(
        self, index: int, text: str, tokens: Sequence[TokenEvent], finish_reason: str | None
    ) -> Json:
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if self._alternatives is None else self._logprobs(index, tokens),
            "finish_reason": finish_reason,
        }
        if self._token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        return choice

    def _logprobs(self, index: int, tokens: Sequence[TokenEvent]) -> Json:
        words, offsets, tops = [], [], []
        for token in tokens:
            text, _ = self._texts.token(token.token_id)
            at = self._told.get(index, 0)
            self._told[index] = at + len(text)
            words.append(text)
            offsets.append(at)
            tops.append(
                {
                    self._texts.token(token_id)[0]: finite(logprob)
                    for token_id, logprob in token.top[: self._alternatives]
                }
            )
        return {
            "tokens": words,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": tops if self._alternatives else None,
            "text_offset": offsets,
        }


def finite(logprob: float | None) -> float:
    """JSON has no infinities; -9999 is what OpenAI sends for what is all but impossible."""
    return max(logprob, -9999.0) if logprob is not None and logprob == logprob else -9999.0
