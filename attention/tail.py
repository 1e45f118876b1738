"""Where a session's tail lies, and how its new tokens go through the model.

The tail begins where the context ends, maybe within a page. Page number p (position //
page_tokens) belongs to rank p mod P, so that a long conversation fills all ranks alike.

Few new tokens are computed by every rank alike (`engine.TailStep`). Many are a partial prefill
(`engine.PrefillStep`): each rank computes the rows of the tail pages that it will keep, which
gives every rank as many rows, and as much causal work, to within a page.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ringspan.attention.layout import Deal
from ringspan.types import Span, coalesce

LONG_TURN_TOKENS = 256
"""Two pages: of fewer new tokens one rank would have nearly all, and wait for two exchanges a layer
where a tail step has one."""
STEP_TOKENS = {"cuda": 8192, "cpu": 2048}
"""New tokens of each rank in one step: what activations have room for beside the KV, and enough
rows for full speed."""
FLOPS_PER_BYTE = 3000.0
"""C / b in `turn_scheme`: 600 TFLOP/s of attention over a link of 200 GB/s per direction."""
GATHER_ROWS = 8192
"""Queries that gather-Q takes at once: enough rows for full speed on every rank; with more of them
the exchanges of pass-Q, hidden behind computing, weigh more than its small kernels."""


def owned(span: Span, rank: int, world_size: int, page_tokens: int) -> tuple[Span, ...]:
    """What `rank` keeps of the new tail positions `span`, ascending."""
    pages = range(span.start // page_tokens, -(-span.stop // page_tokens))
    return coalesce(
        Span(max(span.start, p * page_tokens), min(span.stop, (p + 1) * page_tokens))
        for p in pages
        if p % world_size == rank
    )


def tail_deal(span: Span, world_size: int, page_tokens: int) -> Deal:
    """`owned` of every rank."""
    return tuple(owned(span, rank, world_size, page_tokens) for rank in range(world_size))


def rows_of(spans: tuple[Span, ...], within: Span) -> slice | torch.Tensor | None:
    """The rows of `within` that `spans` are: a slice where it is one, None where there are none."""
    if not spans:
        return None
    if len(spans) == 1:
        return slice(spans[0].start - within.start, spans[0].stop - within.start)
    return torch.cat([torch.arange(s.start - within.start, s.stop - within.start) for s in spans])


def why_dealt(new_tokens: int, world_size: int, chunk_tokens: int) -> str | None:
    """Why a turn is a partial prefill; None where every rank computes all of it."""
    if world_size > 1 and new_tokens >= LONG_TURN_TOKENS:
        return f"{new_tokens} new tokens are dealt to {world_size} ranks"
    if new_tokens > chunk_tokens:
        return f"{new_tokens} new tokens are more than one step of {chunk_tokens} has memory for"
    return None


def turn_chunks(span: Span, chunk_tokens: int, page_tokens: int) -> Iterator[Span]:
    """The steps of a turn: at most `chunk_tokens` (at least a page), cut where pages end."""
    start = span.start
    while start < span.stop:
        cut = (start + max(chunk_tokens, page_tokens)) // page_tokens * page_tokens
        yield Span(start, min(cut, span.stop))
        start = min(cut, span.stop)


def turn_scheme(new_tokens: int, num_q_heads: int, num_kv_heads: int, world_size: int) -> str:
    """How few new tokens meet many cached ones while nobody has measured.

    A key of 2 * Hkv * D elements of two bytes takes 4 * Hkv * D / b to arrive and
    4 * Hq * D * (new / P) / C to be attended to, so passing keys is hidden when

        new / P >= (Hkv / Hq) * C / b

    Otherwise queries go to the keys: all at once while they are few, in a ring when they are many.
    """
    if new_tokens / world_size >= num_kv_heads / num_q_heads * FLOPS_PER_BYTE:
        return "ring"
    return "gather-q" if new_tokens <= GATHER_ROWS else "pass-q"
