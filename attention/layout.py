"""How a chunk is dealt to ranks, in whole pages.

    contiguous   rank r takes the r-th of P equal runs of pages: fewest pieces, causal work unequal
    zigzag       pages in 2P groups, rank r takes groups r and 2P-1-r: causal work equal
    striped      page i goes to rank i mod P: causal work equal to within a page

The chunk's last page may be short; it goes where its place in the order puts it. All functions
are pure: every rank computes every rank's spans from the same numbers.

Source: zigzag, https://github.com/zhuzilin/ring-flash-attention/issues/2; striped,
https://arxiv.org/abs/2311.09431 (there a stripe is a token, here it is a page).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ringspan.errors import UnknownName
from ringspan.types import Span, coalesce

Deal = tuple[tuple[Span, ...], ...]
"""For each rank the spans it takes, ascending; together they tile the chunk."""


def deal(layout: str, chunk: Span, world_size: int, page_tokens: int) -> Deal:
    """The spans of `chunk` for each rank; pages are aligned to multiples of page_tokens."""
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, tuple(LAYOUTS))
    if chunk.start % page_tokens:
        raise ValueError(f"chunk starts at {chunk.start}, not at a page of {page_tokens} tokens")
    num_pages = -(-chunk.tokens // page_tokens)
    owners = LAYOUTS[layout](num_pages, world_size)

    def page(i: int) -> Span:
        start = chunk.start + i * page_tokens
        return Span(start, min(start + page_tokens, chunk.stop))

    return tuple(
        coalesce(page(i) for i in range(num_pages) if owners[i] == rank)
        for rank in range(world_size)
    )


def _contiguous(num_pages: int, world_size: int) -> list[int]:
    return [i * world_size // max(num_pages, 1) for i in range(num_pages)]


def _zigzag(num_pages: int, world_size: int) -> list[int]:
    groups = (i * 2 * world_size // max(num_pages, 1) for i in range(num_pages))
    return [min(group, 2 * world_size - 1 - group) for group in groups]


def _striped(num_pages: int, world_size: int) -> list[int]:
    return [i % world_size for i in range(num_pages)]


LAYOUTS: dict[str, Callable[[int, int], list[int]]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "striped": _striped,
}


def positions(spans: Sequence[Span], device: torch.device | str = "cpu") -> torch.Tensor:
    """The token positions of `spans` in row order, int64 [T]."""
    if not spans:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([torch.arange(s.start, s.stop, device=device) for s in spans])


def undeal(rows: Sequence[torch.Tensor], dealt: Deal) -> torch.Tensor:
    """The inverse of `deal`: rows[r] [T_r, ...] of each rank -> [T, ...] in token order."""
    order = torch.cat([positions(spans) for spans in dealt]).argsort()
    return torch.cat(list(rows))[order.to(rows[0].device)]


def owner(dealt: Deal, position: int) -> tuple[int, int]:
    """Which rank holds `position`, and in which of its rows."""
    for rank, spans in enumerate(dealt):
        row = 0
        for span in spans:
            if span.start <= position < span.stop:
                return rank, row + position - span.start
            row += span.tokens
    raise ValueError(f"position {position} was not dealt")
