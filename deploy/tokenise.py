"""Inputs to the token ids of a context: the chat template's opening and the document."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ringspan.deploy.inputs import Inputs, check_vocabulary, joined
from ringspan.deploy.progress import meter
from ringspan.errors import BadInput
from ringspan.specs import ModelFacts, ModelSpec
from ringspan.types import Span

PROGRESS_CHARS = 2_000_000
"""Shorter texts are tokenised before a person could read a progress line."""


class Prepared(NamedTuple):
    token_ids: np.ndarray
    """int32 [n]: what is prefilled."""
    document: Span
    """Where the document lies in it."""
    chat: bool
    """The tokens open a user's turn of the model's template; a question goes on with it."""


def prepare(
    inputs: Inputs,
    names: list[str],
    model: ModelSpec,
    facts: ModelFacts,
    *,
    plain: bool,
    limit_tokens: int | None,
) -> Prepared:
    """Tokenise, in parallel, with progress for long texts. Raises BadInput for a model without a
    tokenizer, or ids that are not its own."""
    if inputs.token_ids is not None:
        ids = inputs.token_ids[:limit_tokens]
        if facts.vocab_size:
            check_vocabulary(ids, facts.vocab_size, names[0])
        return Prepared(ids, Span(0, len(ids)), chat=False)
    from ringspan.attention.models.chat import split_chat
    from ringspan.attention.models.tokenizer import load_tokenizer, tokenize_documents

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise BadInput(
            f"model {model.name!r} has no tokenizer; give its input as token ids in a .npy file"
        )
    texts = joined(inputs.documents)
    total_chars = sum(map(len, texts))
    if total_chars < PROGRESS_CHARS:
        ids = tokenize_documents(tokenizer, texts)
    else:
        with meter("tokenise", total_chars, "characters") as progress:
            ids = tokenize_documents(tokenizer, texts, lambda done, total: progress.update(done))
    ids = ids[:limit_tokens]
    frame = None if plain else split_chat(tokenizer)
    before = np.asarray(frame.before if frame else (), dtype=np.int32)
    whole = np.concatenate([before, ids])
    return Prepared(whole, Span(len(before), len(whole)), chat=frame is not None)


def describe_sources(paths: list[str]) -> tuple[str, ...]:
    """As the manifest keeps them: what a person typed, made absolute where it is a path."""
    return tuple("stdin" if path == "-" else str(Path(path).absolute()) for path in paths)
