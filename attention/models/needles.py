"""Key -> value pairs planted in a long context, for the retriever to find.

Keys and values are distinct ids of the upper half of the vocabulary, fillers are drawn from the
lower half. A question is the key alone; the token that must follow is its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ringspan.attention.models.retriever import VOCAB
from ringspan.errors import BadInput

MAX_NEEDLES = VOCAB // 4
"""Two ids of the upper half for each."""


class Haystack(NamedTuple):
    token_ids: np.ndarray
    """int32 [n]."""
    keys: np.ndarray
    """int32 [needles]: the questions, one token each."""
    values: np.ndarray
    """int32 [needles]: the answers."""
    positions: np.ndarray
    """int64 [needles], ascending: of each key; its value stands right behind it."""


def plant(num_tokens: int, num_needles: int, seed: int = 0) -> Haystack:
    """A context of `num_tokens` with one needle in each of `num_needles` equal stretches.

    The first and the last stretch hold theirs at their outer ends, so the whole length is tried.
    Raises BadInput if there is no room (position 0 stays free: no token comes before it).
    """
    if not 1 <= num_needles <= MAX_NEEDLES:
        raise BadInput(f"wanted 1 to {MAX_NEEDLES} needles, found {num_needles}")
    if num_tokens < 4 * num_needles + 1:
        raise BadInput(
            f"{num_needles} needles want at least {4 * num_needles + 1} tokens, found {num_tokens}"
        )
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, VOCAB // 2, num_tokens, dtype=np.int32)
    ids = rng.permutation(VOCAB // 2)[: 2 * num_needles].astype(np.int32) + VOCAB // 2
    keys, values = ids[:num_needles], ids[num_needles:]
    edges = 1 + (num_tokens - 1) * np.arange(num_needles + 1, dtype=np.int64) // num_needles
    positions = rng.integers(edges[:-1], edges[1:] - 1)
    positions[-1] = num_tokens - 2
    positions[0] = 1
    token_ids[positions] = keys
    token_ids[positions + 1] = values
    return Haystack(token_ids, keys, values, positions)


def score(answers: Sequence[int], haystack: Haystack) -> int:
    """How many of `answers` (one token id per needle, in the order of the keys) are right."""
    if len(answers) != len(haystack.values):
        raise ValueError(f"{len(answers)} answers to {len(haystack.values)} needles")
    return int((np.asarray(answers) == haystack.values).sum())
