"""What a local attention call looks like to a backend, and what a backend is.

A case is one rectangle of query rows and keys whose mask is already in canonical form (see
`canonical_blocks`): every row sees at least one key, no key lies behind all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ringspan.types import Part

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Case"], Part]
RunInto = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Case", Part], None]


class Mask(NamedTuple):
    """Row i sees key j iff (not causal or j <= i + offset)
    and (window is None or i + offset - j < window)."""

    causal: bool
    offset: int
    window: int | None


class Block(NamedTuple):
    """Rows [row_start, row_stop) over keys [key_start, key_stop), under `mask` in local indices."""

    row_start: int
    row_stop: int
    key_start: int
    key_stop: int
    mask: Mask


class Case(NamedTuple):
    """All that decides whether a backend can serve a call, and how well. Hashable."""

    device_type: str
    capability: tuple[int, int] | None
    """CUDA compute capability, None elsewhere."""
    dtype: torch.dtype
    rows: int
    keys: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mask: Mask
    softcap: float
    scale: float

    @property
    def aligned(self) -> bool:
        """The last row sits on the last key, as bottom-right causal kernels take it."""
        return self.mask.offset == self.keys - self.rows


@dataclass(frozen=True)
class Backend:
    """One way to compute a part. `why_not` gives the reason why it cannot serve a case, or None.

    `available` gives the reason why it cannot be used on a device type at all, or None.
    """

    name: str
    available: Callable[[str], str | None]
    why_not: Callable[[Case], str | None]
    run: Run
    run_into: RunInto | None = None
    """Continues the fp32 part of the same rows in place; None where a backend cannot."""


def canonical_blocks(rows: int, keys: int, mask: Mask) -> Iterator[Block]:
    """Row blocks, disjoint and ascending, that hold all that `mask` lets be seen.

    Rows that see nothing are in no block; keys that no row of a block sees are cut off. A causal
    mask without a window becomes an aligned causal block and a full one. Each block is one piece
    that needs no merging with another.
    """
    causal, offset, window = mask
    first = max(0, -offset) if causal else 0
    last = rows if window is None else min(rows, keys - 1 - offset + window)
    if window is not None and last - 1 + offset < window:
        window = None  # the last row reaches back to key 0
    mask = Mask(causal, offset, window)
    if window is None and causal:
        aligned_stop = min(last, keys - offset)  # row keys - offset - 1 sees the last key
        if first < aligned_stop:
            yield _trimmed(first, aligned_stop, keys, mask)
        full_start = max(first, aligned_stop)
        if full_start < last:
            yield _trimmed(full_start, last, keys, mask)
    elif first < last:
        yield _trimmed(first, last, keys, mask)


def _trimmed(row_start: int, row_stop: int, keys: int, mask: Mask) -> Block:
    causal, offset, window = mask
    key_stop = min(keys, row_stop + offset) if causal else keys
    key_start = 0 if window is None else max(0, row_start + offset - window + 1)
    rows, offset = row_stop - row_start, offset + row_start - key_start
    count = key_stop - key_start
    if window is not None and rows - 1 + offset < window:
        window = None
    if causal and offset >= count - 1:
        causal = False
    if not causal and window is None:
        offset = 0
    return Block(row_start, row_stop, key_start, key_stop, Mask(causal, offset, window))
