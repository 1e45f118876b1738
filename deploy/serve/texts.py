"""Texts of requests to token ids and back: the model's tokenizer, its chat template, its bounds.

What a client sends is text: control tokens that it spells out ("<|im_end|>") open no turn and end
none. A tokenizer must not encode and change its settings at once, so that one thread encodes, with
a tokenizer of its own, and the event loop decodes with another.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from jinja2 import TemplateError

from ringspan.attention.models.chat import ChatFrame, split_chat
from ringspan.attention.models.tokenizer import (
    encode_markup,
    encode_plain,
    load_tokenizer,
    tokenize_documents,
)
from ringspan.deploy.answers import NumberStream, Pieces
from ringspan.deploy.inputs import Document, joined
from ringspan.deploy.serve.errors import ApiError, bad
from ringspan.deploy.serve.openai_types import ChatMessage, ContextFile
from ringspan.deploy.text_stream import HALF, TextStream
from ringspan.specs import ModelSpec
from ringspan.types import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")


class ContextTokens(NamedTuple):
    """What is prefilled of a document."""

    token_ids: np.ndarray
    """int32 [n]."""
    document: Span
    chat: bool
    """It opens a user's turn of the model's template."""


class Texts:
    """Of one model. Coroutines run on the encoding thread; the rest is for the event loop."""

    def __init__(self, model: ModelSpec, vocab_size: int, max_model_len: int) -> None:
        """vocab_size: 0 if it is not known. max_model_len: tokens of a prompt and its answer."""
        self._model, self._vocab_size, self._max_len = model, vocab_size, max_model_len
        self._encoder = load_tokenizer(model)
        self._decoder = load_tokenizer(model)
        self._frame: ChatFrame | None = split_chat(self._encoder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        self.stop_ids: tuple[int, ...] = self._frame.stop_ids if self._frame else ()
        self.max_token_chars = 1
        self._specials: tuple[tuple[str, int], ...] = ()
        self._around: tuple[list[int], list[int]] = ([], [])
        if self._encoder is not None:
            self._around = put_around(self._encoder)
            self.max_token_chars = max(map(len, self._encoder.get_vocab()), default=1)
            self._specials = tuple(
                (str(token), token_id)
                for token_id, token in self._encoder.added_tokens_decoder.items()
                if token.special and str(token)
            )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def has_tokenizer(self) -> bool:
        return self._encoder is not None

    # to token ids

    async def plain(self, text: str, param: str = "prompt", *, special: bool = False) -> list[int]:
        """A text as it is; special: between the control tokens that the tokenizer puts around one.
        ApiError 400 for one that is too long whatever its tokens are."""
        tokenizer = self._check(text, param)
        before, after = self._around if special else ((), ())
        ids = await self._run(lambda: encode_plain(tokenizer, [text])[0])
        return [*before, *ids, *after]

    async def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Through the model's chat template, up to the header of the answer."""
        turns = [(message.role, content_of(message)) for message in messages]
        tokenizer = self._check("".join(text for _, text in turns), "messages")
        if not tokenizer.chat_template:
            raise bad(
                f"model {self._model.name!r} has no chat template; use /v1/completions",
                "messages",
                "no_chat_template",
            )
        return await self._run(lambda: self._rendered(tokenizer, turns))

    async def behind_context(self, messages: Sequence[ChatMessage], chat: bool) -> list[int]:
        """A conversation about a context, whose opening is prefilled already.

        chat: the context opens a user's turn. A system message cannot stand before the document
        any more: it is put before the first question.
        """
        turns = [(message.role, content_of(message)) for message in messages]
        self._check("".join(text for _, text in turns), "messages")
        system = [text for role, text in turns if role in ("system", "developer")]
        talk = [(role, text) for role, text in turns if role not in ("system", "developer")]
        alternating = [("user", "assistant")[at % 2] for at in range(len(talk))]
        if not len(talk) % 2 or [role for role, _ in talk] != alternating:
            raise bad(
                "messages on a context: wanted user and assistant by turns, the first and the last "
                f"of the user; found {', '.join(role for role, _ in talk[:20]) or 'none'}",
                "messages",
                "invalid_value",
            )
        talk[0] = ("user", "\n\n".join((*system, talk[0][1])))
        return await self._run(lambda: self._behind(talk, chat))

    async def document(
        self, text: str | None, files: Sequence[ContextFile] | None, plain: bool
    ) -> ContextTokens:
        """A document as `ringspan prefill` takes one: several files have a line each with their
        name."""
        named = [Document(path=file.name, text=file.text) for file in files or ()]
        texts = joined(named) if text is None else (text,)
        tokenizer = self._check(texts, "text" if text is not None else "files")
        frame = None if plain else self._frame
        ids = await self._run(lambda: tokenize_documents(tokenizer, texts))
        before = np.asarray(frame.before if frame else (), dtype=np.int32)
        whole = np.concatenate([before, ids])
        return ContextTokens(whole, Span(len(before), len(whole)), frame is not None)

    def token_ids(self, ids: Sequence[int], param: str) -> list[int]:
        """Ids as they were sent. ApiError 400 for none, or one that the model has not."""
        if not ids:
            raise bad(f"{param} is empty; wanted at least one token", param, "invalid_value")
        if self._vocab_size and max(ids) >= self._vocab_size:
            raise bad(
                f"{param}: token id {max(ids)} is not below the model's {self._vocab_size}",
                param,
                "invalid_value",
            )
        return list(ids)

    # to text

    def stream(self) -> Pieces:
        """An answer's tokens to text, as they come."""
        tokenizer = self._decoder
        if tokenizer is None:
            return NumberStream()
        return TextStream(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))

    def token(self, token_id: int) -> tuple[str, list[int] | None]:
        """How one token reads by itself, and its bytes; None for a part of a character."""
        if self._decoder is None:
            return str(token_id), list(str(token_id).encode())
        text = str(self._decoder.decode([token_id]))
        return text, None if HALF in text else list(text.encode())

    # within

    async def _run(self, encode: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)

    def _check(self, text: str | Sequence[str], param: str) -> PreTrainedTokenizerBase:
        """Before any work: a token has at most so many characters, so that a text has at least so
        many tokens."""
        if self._encoder is None:
            raise bad(
                f"model {self._model.name!r} has no tokenizer; send token ids to /v1/completions "
                "or /v1/contexts",
                param,
                "no_tokenizer",
            )
        chars = len(text) if isinstance(text, str) else sum(map(len, text))
        if not chars:
            raise bad(f"{param} is empty; wanted some text", param, "invalid_value")
        least = -(-chars // self.max_token_chars)
        if least > self._max_len:
            raise too_long(self._max_len, least, 0, param, at_least=True)
        return self._encoder

    def _rendered(
        self, tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
    ) -> list[int]:
        if not any(special in text for _, text in turns for special, _ in self._specials):
            return encode_markup(tokenizer, _render(tokenizer, turns))
        # Marks stand in for the texts, so that the template's control tokens are told from theirs.
        mark = f"ringspan{secrets.token_hex(8)}x"
        marked = _render(tokenizer, [(role, f"{mark}{at}x") for at, (role, _) in enumerate(turns)])
        ids: list[int] = []
        run = ""  # text of the template and of messages, between two control tokens
        rest = marked
        while rest:
            found = [(at, len(word), token) for word, token in self._specials
                     if (at := rest.find(word)) >= 0]  # fmt: skip
            at, size, token = min(
                found, key=lambda place: (place[0], -place[1]), default=(-1, 0, 0)
            )
            run += rest if at < 0 else rest[:at]
            if run:
                ids += encode_plain(tokenizer, [_filled(run, mark, turns)])[0]
            if at < 0:
                break
            ids.append(token)
            rest, run = rest[at + size :], ""
        return ids

    def _behind(self, talk: list[tuple[str, str]], chat: bool) -> list[int]:
        assert self._encoder is not None
        assert self._frame is not None
        if not chat:  # the context is text: what follows is text too, as `ringspan ask` has it
            if len(talk) > 1:
                raise bad(
                    "the context was prefilled plain: it takes one message of the user; "
                    "prefill it without plain for a conversation",
                    "messages",
                    "invalid_value",
                )
            return encode_plain(self._encoder, [talk[0][1]])[0]
        ids = list(self._frame.after(talk[0][1]))
        for (_, answer), (_, question) in zip(talk[1::2], talk[2::2], strict=True):
            ids += encode_plain(self._encoder, [answer])[0]
            ids += self._frame.next_turn(question)
        return ids


def content_of(message: ChatMessage) -> str:
    """A message's text. ApiError 400 for parts that are no text."""
    if isinstance(message.content, str):
        return message.content
    for part in message.content or ():
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise bad(
                f"content of type {part.type[:100]!r} is not supported; wanted text",
                "messages",
                "unsupported_value",
            )
    return "".join(part.text for part in message.content or ())


def too_long(
    limit: int, prompt: int, answer: int, param: str, *, at_least: bool = False
) -> ApiError:
    """In the words that clients and load generators look for."""
    found = f"{'at least ' if at_least else ''}{prompt} tokens in the {param}"
    more = f" and {answer} for the completion" if answer else ""
    return bad(
        f"This model's maximum context length is {limit} tokens. However, you requested {found}"
        f"{more}. Please shorten the {param if prompt > limit else 'completion'}.",
        param,
        "context_length_exceeded",
    )


def put_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The control tokens that a tokenizer puts before and behind a text, a BOS most often."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return [], []


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise bad(
            f"the model's chat template refuses these messages: {why}", "messages", "invalid_value"
        ) from None


def _filled(run: str, mark: str, turns: list[tuple[str, str]]) -> str:
    for at, (_, text) in enumerate(turns):
        run = run.replace(f"{mark}{at}x", text)
    return run
