"""The clients of a soak: OpenAI's own, each asks one thing after the other, and some go away.

An answer is right if its tokens, its text and its finish reason are those of transformers; what a
client heard before it left must be a beginning of them. An error is right if it is a 503 or 409
with all four fields of OpenAI's errors and one of the codes that a client can act on.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import openai

from ringspan.deploy.jobs.soak_questions import Question

GOOD_CODES = {"rank_lost", "overloaded", "in_use"}
ERROR_FIELDS = {"message", "type", "param", "code"}
PATIENCE_S = 180.0
"""An answer that takes longer counts as one that never came."""
LEAVES_BEFORE, LEAVES_WITHIN = 0.15, 0.25
"""Shares of the requests whose client leaves before the first token, and within a stream."""
STREAMS = 0.6
MOST_WRONG = 20
"""Of which the record has the details."""


class Heard:
    """What came of all requests; any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.tokens = 0
        self.first_token_s: list[float] = []
        self.rank_lost_at_s: list[float] = []
        """Unix times."""
        self.last_s = 0.0
        """Unix time of the last right answer."""

    def note(self, outcome: str, tokens: int = 0, first_s: float = 0.0) -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            self.tokens += tokens
            if first_s:
                self.first_token_s.append(first_s)
            if outcome == "right":
                self.last_s = time.time()
            if outcome.endswith("rank_lost"):
                self.rank_lost_at_s.append(time.time())

    def amiss(self, question: Question, why: str, **found: Any) -> None:
        with self._lock:
            self.outcomes["WRONG"] += 1
            if len(self.wrong) < MOST_WRONG:
                self.wrong.append({"at_s": time.time(), "name": question.name, "why": why, **found})


class Client(threading.Thread):
    """Asks until `stop` is set, then ends with the answer under way."""

    def __init__(
        self,
        url: str,
        asked: Sequence[Question],
        contexts: dict[str, str],
        heard: Heard,
        stop: threading.Event,
        seed: int,
    ) -> None:
        """contexts: ids by title."""
        super().__init__(name=f"client-{seed}", daemon=True)
        self._url, self._asked, self._contexts = url, asked, contexts
        self._heard, self._stop_asking, self._draw = heard, stop, random.Random(seed)

    def run(self) -> None:
        while not self._stop_asking.is_set():
            # a connection of its own for each: a client that leaves takes it along
            with openai.OpenAI(
                base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
            ) as client:
                question = self._draw.choice(self._asked)
                if self._ask(client, question) and question.following:
                    self._ask(client, self._draw.choice(question.following))
            self._stop_asking.wait(self._draw.uniform(0, 0.2))

    def _ask(self, client: openai.OpenAI, question: Question) -> bool:
        """Whether it was answered to the end."""
        fate, draw = self._draw.random(), self._draw
        if fate < LEAVES_BEFORE:
            return self._try(client, question, draw.random() < STREAMS, draw.uniform(0.01, 0.5), 0)
        if fate < LEAVES_BEFORE + LEAVES_WITHIN and len(question.wanted) > 1:
            return self._try(client, question, True, 0, draw.randrange(1, len(question.wanted)))
        return self._try(client, question, draw.random() < STREAMS, 0, 0)

    def _try(
        self, client: openai.OpenAI, question: Question, stream: bool, wait_s: float, most: int
    ) -> bool:
        """wait_s: it leaves after so long, 0: it does not; most: tokens after which it leaves."""
        completions = client.chat.completions if question.chat else client.completions
        create: Callable[..., Any] = completions.create
        more: dict[str, Any] = {"return_token_ids": True}
        if question.document:
            more["contexts"] = [self._contexts[question.document]]
        answer = _Answer(question.chat)
        try:
            reply = create(
                model="",
                temperature=0,
                max_tokens=question.max_tokens,
                stream=stream,
                extra_body=more,
                timeout=wait_s or PATIENCE_S,
                **question.body,
            )
            if not stream:
                answer.add(reply.choices[0])
            else:
                with reply:
                    for chunk in reply:
                        for choice in chunk.choices:
                            answer.add(choice)
                        if most and len(answer.tokens) >= most and not answer.finish_reason:
                            break
        except openai.APITimeoutError:
            if not wait_s:
                self._heard.amiss(question, f"no answer within {PATIENCE_S:g} s")
                return False
            answer.left = True
        except openai.APIConnectionError as error:
            self._heard.amiss(question, f"the connection broke: {error}")
            return False
        except openai.APIError as error:
            self._failed(question, error, answer)
            return False
        except Exception as error:
            # a read that times out within a stream is raised as the transport has it
            if not wait_s or "timeout" not in type(error).__name__.lower():
                self._heard.amiss(question, f"{type(error).__name__}: {error}")
                return False
            answer.left = True
        return self._judge(question, answer)

    def _judge(self, question: Question, answer: _Answer) -> bool:
        if answer.finish_reason:
            found = (tuple(answer.tokens), answer.text, answer.finish_reason)
            if found == (question.wanted, question.text, question.finish_reason):
                self._heard.note("right", len(answer.tokens), answer.first_s)
                return True
            self._heard.amiss(
                question, "another answer", found=found, wanted=(question.wanted, question.text)
            )
            return False
        if not answer.is_beginning_of(question):
            self._heard.amiss(question, "no beginning of the answer", found=answer.tokens)
        elif answer.tokens:
            self._heard.note("left within", len(answer.tokens), answer.first_s)
        elif answer.left:
            self._heard.note("left before")
        else:
            self._heard.amiss(question, "the stream ended without an answer or an error")
        return False

    def _failed(self, question: Question, error: openai.APIError, answer: _Answer) -> None:
        body = error.body if isinstance(error.body, dict) else {}
        status = error.status_code if isinstance(error, openai.APIStatusError) else 0
        code = str(body.get("code"))
        good = set(body) == ERROR_FIELDS and code in GOOD_CODES and status in (0, 409, 503)
        if status == 503 and isinstance(error, openai.APIStatusError):
            good = good and int(error.response.headers.get("retry-after", 0)) >= 1
        if not good:
            self._heard.amiss(question, f"error {status}: {error}", body=body)
        elif not answer.is_beginning_of(question):
            self._heard.amiss(question, "no beginning of the answer", found=answer.tokens)
        else:
            self._heard.note(f"{status or 'in a stream'} {code}")


class _Answer:
    """One as it comes."""

    def __init__(self, chat: bool) -> None:
        self._chat, self._began_s = chat, time.monotonic()
        self.tokens: list[int] = []
        self.text, self.finish_reason, self.first_s, self.left = "", "", 0.0, False

    def add(self, choice: Any) -> None:
        """choice: of a whole answer or of a chunk."""
        new = choice.model_extra.get("token_ids") or []
        if new and not self.tokens:
            self.first_s = time.monotonic() - self._began_s
        self.tokens += new
        if self._chat:
            said = choice.message if hasattr(choice, "message") else choice.delta
            self.text += said.content or ""
        else:
            self.text += choice.text or ""
        self.finish_reason = choice.finish_reason or self.finish_reason

    def is_beginning_of(self, question: Question) -> bool:
        known = question.wanted[: len(self.tokens)] == tuple(self.tokens)
        return known and question.text.startswith(self.text)
