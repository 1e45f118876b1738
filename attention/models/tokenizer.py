"""Text to token ids: every core, bounded pieces, the same ids whatever the number of cores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ringspan.attention.models.load import pretrained_location
from ringspan.attention.models.quiet import quiet
from ringspan.errors import BadInput, RingspanError
from ringspan.specs import ModelSpec

PIECE_CHARS = 65536
_BATCH_PIECES = 16  # about a second of two cores' work: how often progress is told
_BREAKS = ("\n\n", "\n", " ")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for models without one (`random:`, `retriever`, bare folders).

    Their contexts are given as token ids. Raises BadInput for one that cannot be loaded.
    """
    location = pretrained_location(spec.name)
    if location is None:
        return None
    folder = Path(location)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except RingspanError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"cannot load the tokenizer of {spec.name!r}: {text[:300]}") from error


def tokenize_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The texts' tokens one after the other, int32 [n]; nothing is put between or around them.

    Each text is cut into pieces of at most `PIECE_CHARS` characters and each piece is tokenised by
    itself, so that a single long text keeps all cores busy. Hence a piece's end is always a token's
    end: a piece ends behind the last empty line of its second half, or behind the last newline or
    space there, or, where there is none, after exactly `PIECE_CHARS` characters. Where the pieces
    end depends on the text alone. Control tokens spelled out in a text ("<|im_end|>") stay text.

    `progress(done_chars, total_chars)` is called about once a second.
    """
    documents = list(texts)
    pieces = [piece for document in documents for piece in split_pieces(document)]
    total_chars, done_chars = sum(map(len, documents)), 0
    parts: list[np.ndarray] = []
    for start in range(0, len(pieces), _BATCH_PIECES):
        batch = pieces[start : start + _BATCH_PIECES]
        parts += [np.asarray(ids, dtype=np.int32) for ids in encode_plain(tokenizer, batch)]
        done_chars += sum(map(len, batch))
        if progress is not None:
            progress(done_chars, total_chars)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def split_pieces(text: str) -> Iterator[str]:
    """Pieces of at most `PIECE_CHARS` characters that together are the text."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        stop = start + PIECE_CHARS
        for mark in _BREAKS:
            found = text.rfind(mark, start + PIECE_CHARS // 2, stop)
            if found >= 0:
                stop = found + len(mark)
                break
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, in which control tokens are text like any other; in parallel."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
        return [tokenizer(text, **options)["input_ids"] for text in texts]
    with _control_tokens_as_text(backend):
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a template's own text: control tokens count, none is added."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return backend.encode(text, add_special_tokens=False).ids


@contextlib.contextmanager
def _control_tokens_as_text(backend: Any) -> Iterator[None]:
    own = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        yield
    finally:
        backend.encode_special_tokens = own
