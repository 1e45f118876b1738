"""Parity of a stripe of payloads, and payloads back from it.

    row 0   P = D_0 ^ D_1 ^ ... ^ D_(k-1)
    row 1   Q = g^0 D_0 ^ g^1 D_1 ^ ... ^ g^(k-1) D_(k-1)      bytewise in GF(2^8), g = 2

Products are those of polynomials modulo x^8 + x^4 + x^3 + x^2 + 1, in which g generates all 255
elements that are not zero; so any two members of a stripe of up to 255 can be had back from both
rows, and any one from either. Shorter members count as if zeros stood behind them.

Payloads are numpy arrays of bytes, uint8 [n].

Source: H. P. Anvin, "The mathematics of RAID-6" (2004); Reed and Solomon (1960).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

POLYNOMIAL = 0x11D
MOST_ROWS = 2
MOST_MEMBERS = 255


def _powers() -> list[int]:
    """g^0 to g^254."""
    found, value = [], 1
    for _ in range(MOST_MEMBERS):
        found.append(value)
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return found


_POWER = _powers()
_LOG = {value: exponent for exponent, value in enumerate(_POWER)}
_TABLES: dict[int, np.ndarray] = {}
"""By factor: its product with every pair of bytes, uint16 [65536]."""


def times(factor: int, data: np.ndarray) -> np.ndarray:
    """`factor` (1 to 255) times each byte, as elements of the field."""
    if factor == 1:
        return data
    if factor not in _TABLES:
        log = _LOG[factor]
        rest = [_POWER[(log + _LOG[value]) % MOST_MEMBERS] for value in range(1, 256)]
        ones = np.array([0, *rest], dtype=np.uint16)
        _TABLES[factor] = (ones[:, None] << 8 | ones).reshape(-1)
    product = np.zeros(len(data) + len(data) % 2, dtype=np.uint8)
    product[: len(data)] = data
    pairs = product.view(np.uint16)  # two bytes with one look-up
    np.take(_TABLES[factor], pairs, out=pairs, mode="clip")
    return product[: len(data)]


def coefficient(row: int, member: int) -> int:
    """What a member counts with in a row."""
    return 1 if row == 0 else _POWER[member]


def parity(row: int, members: Mapping[int, np.ndarray], size: int) -> np.ndarray:
    """The row's sum over the members given (by their index), uint8 [size]."""
    total = np.zeros(size, dtype=np.uint8)
    for index, data in members.items():
        add_member(total, row, index, data)
    return total


def add_member(total: np.ndarray, row: int, member: int, data: np.ndarray) -> None:
    """One more member into a row's sum, in place."""
    into = total[: len(data)]
    np.bitwise_xor(into, times(coefficient(row, member), data), out=into)


def rebuild(
    lost: tuple[int, ...], present: Mapping[int, np.ndarray], rows: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """The lost members by index, each with the zeros that make it as long as a row.

    lost: at most as many as there are `rows` (by their number); `present`: all other members.
    """
    if len(lost) > len(rows):
        raise ValueError(f"{len(lost)} members are lost, {len(rows)} rows of parity are there")
    left = {
        row: np.bitwise_xor(data, parity(row, present, len(data)))
        for row, data in sorted(rows.items())[: len(lost)]
    }
    if len(lost) == 1:
        ((row, rest),) = left.items()
        return {lost[0]: times(_inverse(coefficient(row, lost[0])), rest)}
    if len(lost) == 2:
        # D_a ^ D_b = p and g^a D_a ^ g^b D_b = q, hence (g^a ^ g^b) D_a = q ^ g^b p
        a, b = lost
        over = _inverse(coefficient(1, a) ^ coefficient(1, b))
        first = times(over, np.bitwise_xor(left[1], times(coefficient(1, b), left[0])))
        return {a: first, b: np.bitwise_xor(left[0], first)}
    return {}


def _inverse(factor: int) -> int:
    return _POWER[-_LOG[factor] % MOST_MEMBERS]
