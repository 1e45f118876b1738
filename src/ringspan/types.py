"""Value types that every folder shares.

Legend for shapes, used in the whole project:
T tokens (query rows) · S keys · Hq q heads · Hkv kv heads · D head_dim · L layers · P world_size
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    import torch

PAGE_TOKENS = 128
"""Tokens of a page; 64 when head_dim is 256 (see `page_tokens_for`)."""


class Span(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Token positions start <= i < stop."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"span [{self.start}, {self.stop}) is not 0 <= start <= stop")

    @property
    def tokens(self) -> int:
        return self.stop - self.start


class Part(NamedTuple):
    """Attention over a subset of keys.

    out [T, Hq, D] in the compute dtype or fp32; lse [T, Hq] fp32, natural log of the sum of the
    exponentials of the scaled scores, -inf (and out 0) where no key was seen.
    """

    out: torch.Tensor
    lse: torch.Tensor


def total_tokens(spans: Iterable[Span]) -> int:
    return sum(span.tokens for span in spans)


def coalesce(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same positions in the same order, touching neighbours joined, empties left out."""
    joined: list[Span] = []
    for span in spans:
        if not span.tokens:
            continue
        if joined and joined[-1].stop == span.start:
            joined[-1] = Span(joined[-1].start, span.stop)
        else:
            joined.append(span)
    return tuple(joined)


def page_tokens_for(head_dim: int) -> int:
    """Tokens of a page for models of this head_dim (DESIGN: a page's plane stays near 256 KiB)."""
    return PAGE_TOKENS if head_dim < 256 else PAGE_TOKENS // 2
