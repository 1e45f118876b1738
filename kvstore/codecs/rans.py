"""Integers to few bits and back: rANS over many interleaved lanes, with models of one family.

    encode symbol s:  x' = (x // f_s) * M + x mod f_s + c_s        M = 2^12, L = 2^16 <= x < 2^32
    decode:           s = symbol of x mod M;  x' = f_s * (x // M) + x mod M - c_s
    a state that would leave its range gives up, or takes, one word of 16 bits

Each value says which model it is coded with. A model is a distribution over -R..R and an escape,
discrete Gaussian or Laplace, w_k = r^(k^2) or r^|k|. Frequencies
are made of integers alone: a decoder on any machine has those of the encoder, to the last one.
Lanes take steps together, so that each step is a few numpy operations over all lanes.

Source: J. Duda, Asymmetric numeral systems, https://arxiv.org/abs/1311.2540; F. Giesen, Interleaved
entropy coders, https://arxiv.org/abs/1402.3392.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from ringspan.errors import CorruptPage

BITS = 12
LOW = 1 << 16
"""A state's lowest value, and its first one."""
LANE_STEPS = 4096
"""Values of one lane, at most: each costs a step of all lanes' time, and a lane's state 32 bits."""
REACH = 126
"""The largest |value| that any model has a symbol for; others are escaped."""

_FIXED = 40
"""Bits behind the point of weights."""
_GAUSS = (1_154_000_000, 8_340_000_000)
"""r of the narrowest Gaussians (standard deviations 0.27 and 0.32), in fixed point; the square root
of r is that of one 2^(1/2) as wide."""
_LAPLACE = 2_199_023_255
"""r of the narrowest Laplacian, 1 / 500; the square root of r is that of one twice as wide."""


class Models(NamedTuple):
    """The family. S: symbols of the widest one; a value v of a model has symbol v + reach."""

    reach: np.ndarray
    """int64 [models]: R; symbol 2R + 1 is the escape."""
    freq: np.ndarray
    """uint32 [models, S]."""
    start: np.ndarray
    """uint32 [models, S]: c, sums of the frequencies before."""
    symbol: np.ndarray
    """uint8 [models, M]: of every slot."""
    cost: np.ndarray
    """fp32 [models, REACH + 2]: bits of a value by its size; the last one is that of an escape."""


@cache
def models() -> Models:
    """The first one expects nothing but zeros."""
    weights = [[1]]
    for first in _GAUSS:
        weights += [_gauss(r) for r in _roots(first, 13)]
    weights += [_laplace(r) for r in _roots(_LAPLACE, 8)]
    tables = [_frequencies(found) for found in weights]
    count, widest = len(tables), max(map(len, tables))
    freq = np.zeros((count, widest), np.uint32)
    symbol = np.zeros((count, 1 << BITS), np.uint8)
    cost = np.zeros((count, REACH + 2), np.float32)
    reach = np.array([(len(table) - 2) // 2 for table in tables])
    for index, table in enumerate(tables):
        freq[index, : len(table)] = table
        symbol[index] = np.repeat(np.arange(len(table)), table)
        bits = BITS - np.log2(np.array(table, np.float64))
        cost[index] = bits[-1] + 32
        cost[index, : reach[index] + 1] = bits[reach[index] : -1]
    start = np.cumsum(freq, axis=1, dtype=np.uint32) - freq
    return Models(reach, freq, start, symbol, cost)


def _roots(first: int, count: int) -> list[int]:
    """first, then each the square root of the one before, in fixed point."""
    found = [first]
    while len(found) < count:
        found.append(math.isqrt(found[-1] << _FIXED))
    return found


def _gauss(r: int) -> list[int]:
    """r^(k^2) for k = 0, 1, ... while it matters."""
    weights, odd = [1 << _FIXED], r
    square = (r * r) >> _FIXED
    while len(weights) <= REACH and weights[-1] >> (_FIXED - BITS - 2):
        weights.append((weights[-1] * odd) >> _FIXED)
        odd = (odd * square) >> _FIXED
    return weights


def _laplace(r: int) -> list[int]:
    """r^k likewise."""
    weights = [1 << _FIXED]
    while len(weights) <= REACH and weights[-1] >> (_FIXED - BITS - 2):
        weights.append((weights[-1] * r) >> _FIXED)
    return weights


def _frequencies(weights: list[int]) -> list[int]:
    """Of -R..R and the escape; each at least 1, together 2^12."""
    total = weights[0] + 2 * sum(weights[1:])
    left = (1 << BITS) - 2 * len(weights)
    half = [1 + weight * left // total for weight in weights]
    table = [*half[:0:-1], *half, 1]
    table[len(half) - 1] += (1 << BITS) - sum(table)
    return table


def choose(sizes: np.ndarray) -> np.ndarray:
    """The cheapest model of each row of |values| [rows, values]: uint8 [rows]."""
    rows, count = sizes.shape
    clipped = np.minimum(sizes, REACH + 1) + (REACH + 2) * np.arange(rows)[:, None]
    histogram = np.bincount(clipped.ravel(), minlength=rows * (REACH + 2))
    bits = histogram.reshape(rows, REACH + 2).astype(np.float32) @ models().cost.T
    return bits.argmin(axis=1).astype(np.uint8) if count else np.zeros(rows, np.uint8)


class Coded(NamedTuple):
    states: np.ndarray
    """uint32 [lanes]."""
    words: np.ndarray
    """uint16, in the order in which the decoder takes them."""
    escaped: np.ndarray
    """int32: values beyond their model's reach, in order."""


def lanes_of(count: int) -> int:
    """Both sides know it from the number of values: of few there are fewer to a lane."""
    return max(1, -(-count // min(LANE_STEPS, 4 * max(1, math.isqrt(count)))))


def encode(values: np.ndarray, model: np.ndarray) -> Coded:
    """values int [n], model uint8 [n]: that of each value."""
    family = models()
    reach = family.reach[model]
    beyond = np.abs(values) > reach
    symbols = np.where(beyond, 2 * reach + 1, values + reach)
    freq = _steps(family.freq[model, symbols], int(family.freq[0, 0]))
    start = _steps(family.start[model, symbols], 0)
    state = np.full(freq.shape[1], LOW, np.uint64)
    found: list[np.ndarray] = []
    sixteen, bits, room = np.uint64(16), np.uint64(BITS), np.uint64(32 - BITS)
    for f, c in zip(freq[::-1], start[::-1], strict=True):
        full = state >= f << room
        found.append(state[full].astype(np.uint16))  # its low half
        state = np.where(full, state >> sixteen, state)
        quotient, rest = np.divmod(state, f)
        state = (quotient << bits) + rest + c
    words = np.concatenate(found[::-1]) if found else np.zeros(0, np.uint16)
    return Coded(state.astype(np.uint32), words, values[beyond].astype(np.int32))


def decode(coded: Coded, model: np.ndarray) -> np.ndarray:
    """int64 [n]. Raises `CorruptPage` unless words, states and escapes are just enough."""
    family, count = models(), len(model)
    lanes = lanes_of(count)
    which = _steps(model.astype(np.int64), 0)
    if coded.states.shape != (lanes,) or (coded.states < LOW).any():
        raise CorruptPage(f"{len(coded.states)} states for {lanes} lanes, or states out of range")
    state, words, at = coded.states.astype(np.uint64), coded.words.astype(np.uint64), 0
    symbols = np.empty(which.shape, np.uint8)
    bits, mask, sixteen = np.uint64(BITS), np.uint64((1 << BITS) - 1), np.uint64(16)
    for step, of in enumerate(which):
        slot = state & mask
        symbol = family.symbol[of, slot]
        symbols[step] = symbol
        f, c = family.freq[of, symbol].astype(np.uint64), family.start[of, symbol]
        state = f * (state >> bits) + slot - c
        (low,) = np.nonzero(state < LOW)
        taken = words[at : at + len(low)]
        if len(taken) != len(low):
            raise CorruptPage(f"its {len(words)} words end at step {step} of {len(which)}")
        state[low] = (state[low] << sixteen) | taken
        at += len(low)
    if at != len(words) or (state != LOW).any():
        raise CorruptPage("its words do not end where its values do")
    flat = symbols.T.reshape(-1)
    reach = family.reach[model]
    values = flat[:count].astype(np.int64) - reach
    beyond = values > reach
    if beyond.sum() != len(coded.escaped) or flat[count:].any():
        raise CorruptPage(f"{len(coded.escaped)} values escaped, its symbols say {beyond.sum()}")
    values[beyond] = coded.escaped
    return values


def _steps(values: np.ndarray, fill: int) -> np.ndarray:
    """[n] -> [steps, lanes]: each lane takes neighbours, what is too few is filled up."""
    lanes = lanes_of(len(values))
    steps = -(-len(values) // lanes)
    kind = np.int64 if values.dtype == np.int64 else np.uint64
    padded = np.full(lanes * steps, fill, kind)
    padded[: len(values)] = values
    return np.ascontiguousarray(padded.reshape(lanes, steps).T)
