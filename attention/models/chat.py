"""A model's chat template, cut where the document ends.

A context is `before + document`, the first tail is `after(question)`: together one user turn that
holds the document, an empty line and the question, and the header of the answer. The document is
prefilled once, whatever is asked about it. `next_turn(question)` goes on from an answer.

The cuts are token boundaries. Document and questions are text: control tokens spelled out in them
have no effect.
"""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ringspan.attention.models.quiet import quiet
from ringspan.attention.models.tokenizer import encode_markup, encode_plain

_DOCUMENT, _QUESTION, _ANSWER = "ringspanDOCUMENT", "ringspanQUESTION", "ringspanANSWER"
_PLAIN_QUESTION, _PLAIN_ANSWER = "\n\nQuestion: ", "\nAnswer:"


class ChatFrame:
    """What stands around a document and a question, as token ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        before: Iterable[int],
        reopen: str,
        join: str,
        close: str,
        stop_ids: Iterable[int],
    ) -> None:
        self.before = tuple(before)
        """Ids in front of the document."""
        self.stop_ids = tuple(sorted(set(stop_ids)))
        """Ids that end an answer."""
        self._tokenizer = tokenizer
        self._join = join
        self._reopen = encode_markup(tokenizer, reopen)
        self._close = encode_markup(tokenizer, close)

    def after(self, question: str) -> tuple[int, ...]:
        """Ids behind the document: the question, the end of the turn, the answer's header."""
        [ids] = encode_plain(self._tokenizer, [self._join + question])
        return (*ids, *self._close)

    def next_turn(self, question: str) -> tuple[int, ...]:
        """Ids behind an answer: its end of turn, the next question, the next answer's header.

        The answer's own stop token must not be in the session already.
        """
        [ids] = encode_plain(self._tokenizer, [question])
        return (*self._reopen, *ids, *self._close)


def split_chat(tokenizer: PreTrainedTokenizerBase | None) -> ChatFrame | None:
    """The frame of a tokenizer's chat template; without a usable one "Question: ... Answer:".

    None for models without a tokenizer.
    """
    if tokenizer is None:
        return None
    stop_ids = _eos_ids(tokenizer)
    try:
        before, join, close, reopen = _cut_template(tokenizer)
    except (ValueError, TemplateError):
        return ChatFrame(
            tokenizer,
            before=_bos_ids(tokenizer),
            reopen=_PLAIN_QUESTION,
            join=_PLAIN_QUESTION,
            close=_PLAIN_ANSWER,
            stop_ids=stop_ids,
        )
    end_of_turn = encode_markup(tokenizer, reopen)[:1]
    stop_ids |= set(end_of_turn) & set(tokenizer.all_special_ids)
    return ChatFrame(
        tokenizer,
        before=encode_markup(tokenizer, before),
        reopen=reopen,
        join=join,
        close=close,
        stop_ids=stop_ids,
    )


def _cut_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, str]:
    """(before the document, between it and the question, behind that, answer to next question).

    Raises ValueError where there is no template or it does not carry a text through unchanged.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    first_turn = {"role": "user", "content": f"{_DOCUMENT}\n\n{_QUESTION}"}
    before, rest = _cut(_render(tokenizer, [first_turn]), _DOCUMENT)
    join, close = _cut(rest, _QUESTION)
    turns = [
        first_turn,
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": "ringspanNEXT"},
    ]
    _, rest = _cut(_render(tokenizer, turns), _ANSWER)
    reopen, _ = _cut(rest, "ringspanNEXT")
    return before, join, close, reopen


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text)


def _cut(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(f"the chat template does not carry {mark} through once")
    head, _, tail = text.partition(mark)
    return head, tail


def _eos_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found: list[int | None] = [tokenizer.eos_token_id]
    try:
        with quiet():
            config = GenerationConfig.from_pretrained(tokenizer.name_or_path, local_files_only=True)
        eos = config.eos_token_id
        found += eos if isinstance(eos, list) else [eos]
    except (OSError, ValueError):
        pass  # many folders have none; the tokenizer's own end and the template's remain
    return {token_id for token_id in found if token_id is not None}


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer("")["input_ids"]
    return [token_id for token_id in ids if token_id == tokenizer.bos_token_id]
