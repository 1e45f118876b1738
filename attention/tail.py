"""Where a session's tail lies: its pages go round the ranks.

The tail begins where the context ends, maybe within a page. Page number p (position //
page_tokens) belongs to rank p mod P, so that a long conversation fills all ranks alike.
"""

from __future__ import annotations

import torch

from ringspan.types import Span, coalesce


def owned(span: Span, rank: int, world_size: int, page_tokens: int) -> tuple[Span, ...]:
    """What `rank` keeps of the new tail positions `span`, ascending."""
    pages = range(span.start // page_tokens, -(-span.stop // page_tokens))
    return coalesce(
        Span(max(span.start, p * page_tokens), min(span.stop, (p + 1) * page_tokens))
        for p in pages
        if p % world_size == rank
    )


def rows_of(spans: tuple[Span, ...], within: Span) -> slice | torch.Tensor | None:
    """The rows of `within` that `spans` are: a slice where it is one, None where there are none."""
    if not spans:
        return None
    if len(spans) == 1:
        return slice(spans[0].start - within.start, spans[0].stop - within.start)
    return torch.cat([torch.arange(s.start - within.start, s.stop - within.start) for s in spans])
