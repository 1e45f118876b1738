"""How one speaks with a context: questions to token ids, tokens of an answer to text.

A chat model's context opens a turn of its template, and a question goes on with it. A plain one is
continued word for word. A model without a tokenizer takes and gives token ids, as numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from ringspan.deploy.record import Answered
from ringspan.deploy.text_stream import TextStream
from ringspan.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ringspan.attention.models.chat import ChatFrame
    from ringspan.cluster.messages import LongTurn, TokenChunk
    from ringspan.kvstore.manifest import Manifest


class Pieces(Protocol):
    """An answer on its way: `TextStream`, or numbers."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class Voice:
    """Made by `voice_for`."""

    def __init__(
        self,
        first: Callable[[str], tuple[int, ...]],
        following: Callable[[str], tuple[int, ...]],
        stream: Callable[[], Pieces],
        stop_ids: tuple[int, ...],
    ) -> None:
        self.first = first
        """Ids of a question that begins a session. BadInput for one that cannot be asked."""
        self.following = following
        """Ids of a question behind an answer."""
        self.stream = stream
        self.stop_ids = stop_ids


def voice_for(manifest: Manifest) -> Voice:
    """By the context's model and the way it was prefilled."""
    from ringspan.attention.models.chat import split_chat
    from ringspan.attention.models.tokenizer import encode_plain, load_tokenizer

    tokenizer = load_tokenizer(manifest.model)
    if tokenizer is None:
        return Voice(numbers, numbers, NumberStream, stop_ids=())
    frame = split_chat(tokenizer)
    assert frame is not None  # it is None for models without a tokenizer alone
    if manifest.chat:
        return _chat_voice(tokenizer, frame)

    def as_typed(question: str) -> tuple[int, ...]:
        return tuple(encode_plain(tokenizer, [question])[0])

    return Voice(as_typed, as_typed, _text_streams(tokenizer), frame.stop_ids)


def _chat_voice(tokenizer: PreTrainedTokenizerBase, frame: ChatFrame) -> Voice:
    return Voice(frame.after, frame.next_turn, _text_streams(tokenizer), frame.stop_ids)


def _text_streams(tokenizer: PreTrainedTokenizerBase) -> Callable[[], TextStream]:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return lambda: TextStream(decode)


def numbers(question: str) -> tuple[int, ...]:
    """`5 17 9` -> (5, 17, 9)."""
    try:
        ids = tuple(int(word) for word in question.replace(",", " ").split())
    except ValueError:
        ids = ()
    if not ids or min(ids) < 0:
        raise BadInput(
            f"question {question!r}: this context's model has no tokenizer; wanted token ids,"
            " such as '5 17 9'"
        )
    return ids


class NumberStream:
    """Token ids, a space between them."""

    def __init__(self) -> None:
        self._begun = False

    def push(self, token_id: int) -> str:
        text = f" {token_id}" if self._begun else str(token_id)
        self._begun = True
        return text

    def finish(self) -> str:
        return ""


class Spoken:
    """One answer, from its tokens as they come."""

    def __init__(self, voice: Voice, question: str, ids: tuple[int, ...]) -> None:
        self.question, self.done = question, False
        self._ids, self._stream = ids, voice.stream()
        self._pieces: list[str] = []
        self._count, self._reason = 0, "length"
        self._long_turn: LongTurn | None = None
        self._began = time.perf_counter()
        self._first_s = self._elapsed_s = 0.0

    def push(self, token: TokenChunk) -> str:
        """What may be printed of the answer now."""
        self._count += 1
        self._long_turn = self._long_turn or token.long_turn
        self._first_s = self._first_s or time.perf_counter() - self._began
        text = "" if token.finish_reason == "stop" else self._stream.push(token.token_id)
        if token.finish_reason is not None:
            self._reason = token.finish_reason
            text += self._stream.finish()
            self._elapsed_s, self.done = time.perf_counter() - self._began, True
        self._pieces.append(text)
        return text

    @property
    def text(self) -> str:
        """So far."""
        return "".join(self._pieces)

    def answered(self) -> Answered:
        """For the record, after the last token."""
        return Answered(
            question=self.question,
            answer=self.text,
            question_tokens=len(self._ids),
            answer_tokens=self._count,
            first_token_s=self._first_s,
            elapsed_s=self._elapsed_s,
            finish_reason=self._reason,
            long_turn=self._long_turn,
        )


def pace(answers: Sequence[Answered]) -> str:
    """One line: how long the first tokens took, and those after them."""
    first = min(answer.first_token_s for answer in answers)
    took = max(answer.elapsed_s for answer in answers)
    tokens = sum(answer.answer_tokens for answer in answers)
    after = tokens - len(answers)
    line = f"{tokens:,} tokens: the first after {first:.2f} s"
    if len(answers) > 1:
        line = f"{len(answers)} answers at once, " + line
    if after and took > first:
        line += f", then {1e3 * (took - first) / after:.1f} ms a token"
    return line


def in_order(answers: dict[str, Spoken], tokens: Iterable[TokenChunk]) -> Iterator[str]:
    """Answers that come together, as text to print one after the other: `> question`, the answer
    as it comes or as far as it has come, a line's end. answers: by session, in their order."""
    order, at = list(answers.values()), 0
    shown = -1  # characters of the answer whose turn it is; -1: not even its question
    for token in tokens:
        answers[token.session_id].push(token)
        while at < len(order):
            spoken = order[at]
            if shown < 0:
                yield f"{chr(10) if at else ''}> {spoken.question}\n"
            yield spoken.text[max(0, shown) :]
            shown = len(spoken.text)
            if not spoken.done:
                break
            yield "\n"
            at, shown = at + 1, -1
