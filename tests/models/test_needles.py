"""Planting and scoring."""

from __future__ import annotations

import numpy as np
import pytest

from ringspan.attention.models.needles import plant, score
from ringspan.attention.models.retriever import VOCAB
from ringspan.errors import BadInput


@pytest.mark.parametrize(("tokens", "needles"), [(5, 1), (129, 32), (4097, 256), (10007, 64)])
def test_each_needle_stands_once_in_the_haystack(tokens: int, needles: int) -> None:
    haystack = plant(tokens, needles, seed=7)
    ids, positions = haystack.token_ids, haystack.positions
    assert ids.dtype == np.int32
    assert ids.shape == (tokens,)
    assert np.array_equal(ids[positions], haystack.keys)
    assert np.array_equal(ids[positions + 1], haystack.values)
    planted = np.concatenate([haystack.keys, haystack.values])
    assert len(np.unique(planted)) == 2 * needles
    assert planted.min() >= VOCAB // 2
    assert (ids >= VOCAB // 2).sum() == 2 * needles
    assert ids.max() < VOCAB


def test_needles_are_spread_over_the_whole_length() -> None:
    positions = plant(100_003, 50, seed=1).positions
    assert positions[0] == 1
    assert positions[-1] == 100_001
    assert np.diff(positions).max() < 2.1 * 100_003 / 50


def test_a_seed_plants_the_same_and_another_another() -> None:
    one, same, other = (plant(999, 20, seed=seed).token_ids for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("tokens", "needles"), [(4, 1), (100, 0), (100, 25), (10**6, 1025)])
def test_what_cannot_be_planted_is_refused(tokens: int, needles: int) -> None:
    with pytest.raises(BadInput):
        plant(tokens, needles)


def test_score_counts_right_answers_and_wants_one_per_needle() -> None:
    haystack = plant(500, 9)
    answers = haystack.values.tolist()
    assert score(answers, haystack) == 9
    answers[4] += 1
    assert score(answers, haystack) == 8
    with pytest.raises(ValueError, match="8 answers to 9"):
        score(answers[:8], haystack)
