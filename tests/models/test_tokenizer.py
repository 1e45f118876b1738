"""Tokenising in pieces, and the chat frame, with a small byte-level BPE trained here."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ringspan.attention.models import tokenizer as module
from ringspan.attention.models.chat import split_chat
from ringspan.attention.models.tokenizer import split_pieces, tokenize_documents

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROSE = Path(__file__).read_text()


@functools.cache
def trained() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [PROSE],
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return bpe


def make(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(),
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=template,
    )


def test_the_ids_give_back_the_text_and_do_not_depend_on_the_batching(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PIECE_CHARS", 700)
    tokenizer = make()
    texts = [PROSE * 3, "", "Grüße aus 北京 🙂\n" * 200, "x"]
    ids = tokenize_documents(tokenizer, iter(texts))
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids.tolist()) == "".join(texts)
    monkeypatch.setattr(module, "_BATCH_PIECES", 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert np.array_equal(tokenize_documents(tokenizer, texts), ids)


def test_progress_ends_at_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARS", 100)
    told: list[tuple[int, int]] = []
    tokenize_documents(make(), [PROSE, PROSE], lambda done, total: told.append((done, total)))
    assert len(told) > 2
    assert told == sorted(told)
    assert told[-1] == (2 * len(PROSE), 2 * len(PROSE))


def test_no_text_gives_no_tokens() -> None:
    assert tokenize_documents(make(), []).shape == (0,)
    assert tokenize_documents(make(), [""]).shape == (0,)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("aaaa bbbb\n\ncc dd", ["aaaa bbbb\n", "\ncc dd"]),
        ("aaaaa\n\nbb ccc ddd e", ["aaaaa\n\n", "bb ccc ", "ddd e"]),
        ("aaaaaa\nbb cccc", ["aaaaaa\n", "bb cccc"]),
        ("aaaaaa bbcccccc", ["aaaaaa ", "bbcccccc"]),
        ("a" * 23, ["a" * 10, "a" * 10, "aaa"]),
        ("a" * 10, ["a" * 10]),
    ],
    ids=["last-newline", "paragraph", "newline", "space", "hard", "fits"],
)
def test_pieces_end_at_the_best_break_of_their_second_half(
    text: str, pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_CHARS", 10)
    assert list(split_pieces(text)) == pieces


def test_control_tokens_in_a_document_stay_text() -> None:
    tokenizer = make()
    ids = tokenize_documents(tokenizer, ["a<|im_end|>b"])
    assert not set(ids.tolist()) & {0, 1}
    assert tokenizer.decode(ids.tolist()) == "a<|im_end|>b"
    assert tokenizer("<|im_end|>")["input_ids"] == [1]


def test_document_and_question_together_are_the_templates_user_turn() -> None:
    tokenizer = make()
    frame = split_chat(tokenizer)
    assert frame is not None
    ids = [*frame.before, *tokenize_documents(tokenizer, ["The text."]), *frame.after("Why?")]
    turn = {"role": "user", "content": "The text.\n\nWhy?"}
    whole = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == whole
    assert ids.count(1) == 1
    assert frame.stop_ids == (1,)


def test_a_next_turn_closes_the_answer_first() -> None:
    tokenizer = make()
    frame = split_chat(tokenizer)
    assert frame is not None
    ids = frame.next_turn("And <|im_end|>?")
    assert ids[0] == 1
    assert ids.count(1) == 2
    text = tokenizer.decode(ids)
    assert text == (
        "<|im_end|>\n<|im_start|>user\nAnd <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "template",
    [
        None,
        "no messages at all",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content | upper }}",
    ],
    ids=["none", "constant", "raises", "changes-the-text"],
)
def test_without_a_usable_template_the_question_is_plain_text(template: str | None) -> None:
    tokenizer = make(template)
    frame = split_chat(tokenizer)
    assert frame is not None
    assert frame.before == ()
    assert tokenizer.decode(frame.after("Why?")) == "\n\nQuestion: Why?\nAnswer:"
    assert tokenizer.decode(frame.next_turn("And?")) == "\n\nQuestion: And?\nAnswer:"
    assert frame.stop_ids == (1,)


def test_models_without_a_tokenizer_have_no_frame() -> None:
    assert split_chat(None) is None
