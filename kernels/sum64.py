"""The plane checksum: one 64-bit sum over raw bytes, the same bits on CPU and GPU.

    mix(x):  x ^= x >> 30;  x *= 0xbf58476d1ce4e5b9;  x ^= x >> 27;  x *= 0x94d049bb133111eb
             x ^= x >> 31                                  (all mod 2^64, shifts logical)
    key_i  = mix(seed) + i * 0x9e3779b97f4a7c15             (mod 2^64)
    sum64  = sum over i = 0..n of mix(w_i xor key_i)        (mod 2^64)

w_0 is the length in bytes; w_1..w_n are the bytes in words of eight, little-endian, the last one
padded with zeros. The result is given as a signed 64-bit integer.

Why this: a sum may be taken in any order and in parallel; the key makes each word's term depend on
its place, so that swapped words, moved or repeated pages, zeroed stretches and single flipped bits
all change it (an accident goes unseen once in 2^64); the length tells a cut-off zero tail. It is
not cryptographic: whoever wants a collision can make one.

Cost   reads every byte once; two multiplications a word: memory-bound on a GPU, 6 GB/s a CPU core
       where it could be compiled (`sum64_native`), 2 in numpy.
Source finaliser of splitmix64, https://doi.org/10.1145/2714064.2660195 (variant 13).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ringspan.kernels.sum64_native import sums_of_rows

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_A = 0xBF58476D1CE4E5B9
MIX_B = 0x94D049BB133111EB

_TILE_WORDS = 16384
"""Words that the CPU handles at once: its two temporaries (256 KiB) stay in the cache."""
_WORD = np.dtype("<u8")


def sum64_ref(data: bytes, seed: int = 0) -> int:
    """The definition, in Python's integers -> signed 64 bits. All others may only be faster."""
    padded = data + bytes(-len(data) % 8)
    words = [len(data)]
    words += [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    start = mix(seed)
    return _signed(sum(mix(word ^ (start + i * GOLDEN & MASK)) for i, word in enumerate(words)))


def sum64(data: torch.Tensor, seed: int = 0) -> int:
    """The sum of a contiguous tensor's bytes, any dtype, any device (waits for a GPU)."""
    if not data.is_contiguous():
        raise ValueError(f"data has strides {data.stride()}, expected a contiguous tensor")
    return int(sum64_rows(data.reshape(1, -1), seed)[0])


def sum64_rows(data: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The sum of each row's bytes: data [N, ...] any dtype -> [N] int64 on data's device.

    Each row must be contiguous; the rows may lie apart. Row i gives what `sum64(data[i])` gives.
    """
    if not data.dim():
        raise ValueError("data has no axis of rows, expected [N, ...]")
    if data.shape[0] and not data[0].is_contiguous():
        raise ValueError(f"data has strides {data.stride()}, expected contiguous rows")
    count, row_bytes = data.shape[0], data.element_size() * (data.numel() // max(1, data.shape[0]))
    start = mix(seed)
    length_term = mix(row_bytes ^ start)
    if not count or not row_bytes:
        return torch.full((count,), _signed(length_term), dtype=torch.int64, device=data.device)
    flat = data.flatten(1) if data.dim() > 1 else data[:, None]
    bytes_ = flat.view(torch.uint8)  # [N, row_bytes]
    if data.is_cuda:
        from ringspan.kernels.sum64_triton import sum64_rows_triton

        return sum64_rows_triton(bytes_, start, _signed(length_term))
    rows = bytes_.numpy()
    native = sums_of_rows(rows, start)
    sums = _sum64_rows_numpy(rows, start) if native is None else native
    sums += np.uint64(length_term)
    return torch.from_numpy(sums.view(np.int64))


def mix(word: int) -> int:
    """The finaliser on one Python integer, taken mod 2^64."""
    word &= MASK
    word = (word ^ word >> 30) * MIX_A & MASK
    word = (word ^ word >> 27) * MIX_B & MASK
    return word ^ word >> 31


def _sum64_rows_numpy(rows: np.ndarray, start: int) -> np.ndarray:
    """rows [N, row_bytes] uint8 -> [N] uint64: the terms of all words but the length."""
    count, row_bytes = rows.shape
    whole = row_bytes // 8
    words = rows[:, : whole * 8].view(_WORD)
    sums = np.zeros(count, np.uint64)
    columns = min(whole, _TILE_WORDS)
    stride = max(1, _TILE_WORDS // max(1, columns))
    for column in range(0, whole, _TILE_WORDS):
        base = np.uint64((start + (column + 1) * GOLDEN) & MASK)
        keys = _weyl()[: min(columns, whole - column)] + base
        for row in range(0, count, stride):
            tile = words[row : row + stride, column : column + _TILE_WORDS] ^ keys
            sums[row : row + stride] += _mix_into(tile).sum(axis=1, dtype=np.uint64)
    if row_bytes % 8:
        last = np.zeros((count, 8), np.uint8)
        last[:, : row_bytes % 8] = rows[:, whole * 8 :]
        key = np.uint64((start + (whole + 1) * GOLDEN) & MASK)
        sums += _mix_into(last.view(_WORD)[:, 0] ^ key)
    return sums


def _mix_into(words: np.ndarray) -> np.ndarray:
    """The finaliser on an array of uint64, in place."""
    shifted = np.empty_like(words)
    for shift, factor in ((30, MIX_A), (27, MIX_B)):
        np.right_shift(words, np.uint64(shift), out=shifted)
        np.bitwise_xor(words, shifted, out=words)
        np.multiply(words, np.uint64(factor), out=words)
    np.right_shift(words, np.uint64(31), out=shifted)
    return np.bitwise_xor(words, shifted, out=words)


@lru_cache(maxsize=1)
def _weyl() -> np.ndarray:
    """i * GOLDEN for the words of a tile."""
    return np.arange(_TILE_WORDS, dtype=np.uint64) * np.uint64(GOLDEN)


def _signed(word: int) -> int:
    word &= MASK
    return word - (1 << 64) if word >> 63 else word
