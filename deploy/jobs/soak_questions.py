"""What a soak asks: a finite set of requests, each with the answer that transformers gives to it.

The answers are greedy, fp32, by one process without any of the hook. A request is left out where
the two likeliest tokens of any step are closer than `LEAST_MARGIN`: ranks add in another order, and
which token wins such a step says nothing of either.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ringspan.attention.models.load import load_model
from ringspan.deploy.serve.openai_types import ChatMessage
from ringspan.deploy.serve.texts import Texts
from ringspan.specs import ModelSpec

LEAST_MARGIN = 1e-3
"""Of the logits of the two likeliest tokens."""
PROMPT_CHARS = (60, 400, 1600, 2800)
PROMPT_TOKENS = (5, 90, 300, 700)
"""Of models without a tokenizer."""
ANSWER_TOKENS = (6, 12, 24, 40)
ASKED = (
    "What is this text about? Answer in one sentence.",
    "Which word comes first in the text?",
    "Name one function that the text mentions.",
    "Is this text a program? Say why.",
)
CHATS = (
    "What is the capital of France? Answer in one sentence.",
    "Name three planets.",
    "Explain in two sentences why the sky is blue.",
    "Write the first line of a poem about a river.",
)
FOLLOWING = "Thank you. Now say it in other words."


@dataclass(frozen=True)
class Document:
    """One that is made a context: `POST /v1/contexts` with `body`."""

    title: str
    body: dict[str, Any]
    token_ids: tuple[int, ...]


@dataclass
class Question:
    """`POST` of `body` to chats (`chat`) or completions, and what must come back."""

    name: str
    chat: bool
    body: dict[str, Any]
    """Without model and context."""
    max_tokens: int
    token_ids: tuple[int, ...]
    """The whole prompt's, with the document's."""
    document: str = ""
    """Title of the context it is about; empty: none."""
    wanted: tuple[int, ...] = ()
    """The answer's token ids; a stop id is the last of them."""
    text: str = ""
    finish_reason: str = ""
    following: list[Question] = field(default_factory=list)
    """Asked with this one's question and answer before them."""


class Greedy:
    """transformers' own answers."""

    def __init__(self, model: str, seed: int) -> None:
        """seed: of a `random:` model's weights."""
        self.spec = ModelSpec(name=model, dtype="float32", seed=seed)
        loaded = load_model(self.spec, torch.device("cpu"))
        self._model, self.facts = loaded.model, loaded.facts
        self.texts = Texts(self.spec, self.facts.vocab_size, self.facts.max_positions)

    def answer(self, question: Question) -> bool:
        """Fills it in; False where it is too close to call."""
        new = torch.tensor([question.token_ids])
        past: Any = None
        out: list[int] = []
        with torch.inference_mode():
            while len(out) < question.max_tokens:
                step = self._model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
                best = torch.topk(step.logits[0, -1].float(), 2)
                if float(best.values[0] - best.values[1]) < LEAST_MARGIN:
                    return False
                out.append(int(best.indices[0]))
                past, new = step.past_key_values, best.indices[None, :1]
                if out[-1] in self.texts.stop_ids:
                    break
        stopped = out[-1] in self.texts.stop_ids
        pieces = self.texts.stream()
        told = "".join(pieces.push(token) for token in (out[:-1] if stopped else out))
        question.wanted, question.text = tuple(out), told + pieces.finish()
        question.finish_reason = "stop" if stopped else "length"
        return True


def questions(
    greedy: Greedy, seed: int, document_tokens: int
) -> tuple[list[Document], list[Question], int]:
    """Two documents, what is asked of them and without them, and how many were left out."""
    draw = random.Random(seed)
    if greedy.texts.has_tokenizer:
        documents, asked = _of_texts(greedy, draw, document_tokens)
    else:
        documents, asked = _of_numbers(greedy, draw, document_tokens)
    good = [question for question in asked if greedy.answer(question)]
    left_out = len(asked) - len(good)
    for question in [one for one in good if one.chat and one.finish_reason == "stop"]:
        following = _following(greedy, documents, question)
        if greedy.answer(following):
            question.following.append(following)
        else:
            left_out += 1
    return documents, good, left_out


def _of_texts(
    greedy: Greedy, draw: random.Random, document_tokens: int
) -> tuple[list[Document], list[Question]]:
    source = Path(argparse.__file__).read_text()
    texts = greedy.texts
    documents, asked = [], []
    for index, plain in enumerate((False, True)):
        begin = draw.randrange(len(source) - 8 * document_tokens)
        text = source[begin : begin + 3 * document_tokens]
        ids = asyncio.run(texts.document(text, None, plain)).token_ids
        title = ("plain" if plain else "chat") + str(index)
        body = {"text": text, "plain": plain, "title": title}
        document = Document(title, body, tuple(ids.tolist()))
        documents.append(document)
        for at, line in enumerate(ASKED):
            asked.append(_on(greedy, document, line, ANSWER_TOKENS[at]))
    for at, size in enumerate(PROMPT_CHARS * 2):
        begin = draw.randrange(len(source) - size)
        prompt = source[begin : begin + size]
        new = tuple(asyncio.run(texts.plain(prompt)))
        tokens = ANSWER_TOKENS[-1 - at % 4]
        asked.append(Question(f"prompt{at}", False, {"prompt": prompt}, tokens, new))
    for at, line in enumerate(CHATS):
        messages = [{"role": "user", "content": line}]
        asked.append(_chat(greedy, f"chat{at}", messages, 48))
    return documents, asked


def _of_numbers(
    greedy: Greedy, draw: random.Random, document_tokens: int
) -> tuple[list[Document], list[Question]]:
    def ids(count: int) -> list[int]:
        return [draw.randrange(greedy.facts.vocab_size) for _ in range(count)]

    documents, asked = [], []
    for index in range(2):
        whole = ids(document_tokens)
        title = f"document{index}"
        documents.append(Document(title, {"token_ids": whole, "title": title}, tuple(whole)))
        for at, tokens in enumerate(ANSWER_TOKENS):
            new = ids(3 + at)
            name, body = f"{title} question{at}", {"prompt": new}
            asked.append(Question(name, False, body, tokens, (*whole, *new), title))
    for at, size in enumerate(PROMPT_TOKENS * 3):
        new = ids(size)
        tokens = ANSWER_TOKENS[at % 4]
        asked.append(Question(f"prompt{at}", False, {"prompt": new}, tokens, tuple(new)))
    return documents, asked


def _on(greedy: Greedy, document: Document, line: str, max_tokens: int) -> Question:
    messages = [{"role": "user", "content": line}]
    ids = _behind(greedy, messages, document)
    name = f"{document.title}: {line}"
    body = {"messages": messages}
    return Question(name, True, body, max_tokens, ids, document.title)


def _behind(
    greedy: Greedy, messages: Sequence[dict[str, str]], document: Document
) -> tuple[int, ...]:
    turns = [ChatMessage(**message) for message in messages]
    chat = not document.body.get("plain")
    return (*document.token_ids, *asyncio.run(greedy.texts.behind_context(turns, chat)))


def _chat(greedy: Greedy, name: str, messages: list[dict[str, str]], tokens: int) -> Question:
    ids = asyncio.run(greedy.texts.chat([ChatMessage(**message) for message in messages]))
    return Question(name, True, {"messages": messages}, tokens, tuple(ids))


def _following(greedy: Greedy, documents: Sequence[Document], question: Question) -> Question:
    messages = [
        *question.body["messages"],
        {"role": "assistant", "content": question.text},
        {"role": "user", "content": FOLLOWING},
    ]
    name = f"{question.name}, again"
    if not question.document:
        return _chat(greedy, name, messages, 24)
    document = next(one for one in documents if one.title == question.document)
    ids = _behind(greedy, messages, document)
    return Question(name, True, {"messages": messages}, 24, ids, document.title)


def every(asked: Sequence[Question]) -> Iterator[Question]:
    """Those that follow too."""
    for question in asked:
        yield question
        yield from question.following
