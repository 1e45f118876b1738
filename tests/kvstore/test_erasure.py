"""Parity: any one page, with two rows any two, come back; and the field is a field."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ringspan.kvstore.erasure import MOST_MEMBERS, coefficient, parity, rebuild, times


def product(a: int, b: int) -> int:
    """Of two elements, bit by bit: the definition that the tables must give."""
    total = 0
    for bit in range(8):
        if b >> bit & 1:
            total ^= a << bit
    for bit in range(14, 7, -1):
        if total >> bit & 1:
            total ^= 0x11D << bit - 8
    return total


def test_products_are_those_of_polynomials():
    every = np.arange(256, dtype=np.uint8)
    for factor in (1, 2, 3, 29, 128, 255):
        assert times(factor, every).tolist() == [product(factor, value) for value in range(256)]


def test_no_two_members_count_alike():
    assert len({coefficient(1, member) for member in range(MOST_MEMBERS)}) == MOST_MEMBERS


def payloads(lengths):
    random = np.random.default_rng(len(lengths))
    return {i: random.integers(0, 256, n, dtype=np.uint8) for i, n in enumerate(lengths)}


@pytest.mark.parametrize(
    "lengths", [(7,), (64, 64), (100, 100, 31), (9, 200, 200, 1, 200)], ids=str
)
def test_whatever_is_lost_comes_back(lengths):
    members = payloads(lengths)
    size = max(lengths)
    rows = {row: parity(row, members, size) for row in (0, 1)}
    losses = [
        lost for count in (1, 2) for lost in itertools.combinations(range(len(lengths)), count)
    ]
    for lost in losses:
        present = {i: data for i, data in members.items() if i not in lost}
        for whole in ({0}, {1}, {0, 1}):
            if len(whole) < len(lost):
                continue
            back = rebuild(lost, present, {row: rows[row] for row in whole})
            for index in lost:
                assert np.array_equal(back[index][: lengths[index]], members[index])
                assert not back[index][lengths[index] :].any()


def test_more_losses_than_rows_are_refused():
    members = payloads((8, 8, 8))
    with pytest.raises(ValueError, match="2 members are lost, 1 rows"):
        rebuild((0, 1), {2: members[2]}, {0: parity(0, members, 8)})
