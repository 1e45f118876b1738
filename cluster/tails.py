"""The memory of tails: sessions' own keys behind a context, raw.

The tails that are decoded together lie in one block, each a range of its rows, so that one kernel
attends to all of them, and a captured step finds them where it left them. A block stays as long as
a session has its tail in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringspan.attention.decode_step import TailRows
from ringspan.cluster.runtime import Runtime
from ringspan.errors import TooLarge
from ringspan.kvstore.codecs.registry import codec
from ringspan.types import Span, coalesce, total_tokens


class TailBlock:
    """Rows for several tails, in the pool under `name`."""

    def __init__(self, runtime: Runtime, name: str, page_tokens: int, rows: Sequence[int]) -> None:
        """rows: of each tail on this rank. Raises TooLarge with the numbers."""
        self._pool, self.name, self.page_tokens = runtime.pool, name, page_tokens
        self.num_rows = sum(rows)
        # One row more: decode steps write there what a rank does not keep.
        self._memory = runtime.new_shard(name, "raw", self.num_rows + 1, page_tokens)
        self._memory.reserve((Span(0, self.num_rows + 1),))
        self._memory.mark_filled()
        begins = [sum(rows[:at]) for at in range(len(rows))]
        self.tails = tuple(Tail(self, *at) for at in zip(begins, rows, strict=True))
        self._users = len(rows)

    def tensors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [num_rows + 1, Hkv, D]."""
        k, v = self._memory.tensors(layer)
        return k, v

    def leave(self) -> None:
        """By each of the tails, once; the last one gives the memory back."""
        self._users -= 1
        if not self._users:
            self._pool.free(self.name)


class Tail:
    """One session's rows: a `KVShard`, exact, of this rank's positions behind the context."""

    def __init__(self, block: TailBlock, begin: int, capacity: int) -> None:
        self.block, self.begin, self.capacity_tokens = block, begin, capacity
        self.codec = codec("raw")
        self.page_tokens = block.page_tokens
        self._spans: tuple[Span, ...] = ()
        self._before: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    @property
    def num_tokens(self) -> int:
        return total_tokens(self._spans)

    def reserve(self, spans: Sequence[Span]) -> None:
        """The next positions; `write` fills them layer by layer, `cancel` forgets them."""
        held = self.num_tokens
        if held + total_tokens(spans) > self.capacity_tokens:
            raise TooLarge(
                f"{total_tokens(spans)} more tokens in a tail that holds {held} of "
                f"{self.capacity_tokens}: allocate it for {held + total_tokens(spans)}"
            )
        self._before, self._spans = self._spans, coalesce((*self._spans, *spans))

    def cancel(self) -> None:
        """Forget the last reservation."""
        self._spans = self._before

    def keep(self, spans: tuple[Span, ...]) -> None:
        """Forget what lies behind `spans`, which the tail begins with."""
        self._before = self._spans = spans

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [T, Hkv, D] of the positions last reserved."""
        rows = slice(total_tokens(self._before), self.num_tokens)
        for into, new in zip(self.tensors(layer), (k, v), strict=True):
            into[rows].copy_(new)

    def tensors(
        self, layer: int, num_tokens: int | None = None, first: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """k and v [tokens, Hkv, D] of the rows from `first` to `num_tokens` (all) held."""
        stop = self.num_tokens if num_tokens is None else num_tokens
        rows = slice(self.begin + first, self.begin + stop)
        return tuple(tensor[rows] for tensor in self.block.tensors(layer))

    def take_over(self, other: Tail, spans: tuple[Span, ...], num_layers: int) -> None:
        """The first rows of another tail, which hold `spans`, as this one's first."""
        self.reserve(spans)
        for layer in range(num_layers):
            k, v = other.tensors(layer, total_tokens(spans))
            self.write(layer, k, v)


def rows_of_tails(block: TailBlock, tails: Sequence[Tail], starts: Sequence[int]) -> TailRows:
    """For a decode step of these sessions; starts: the lengths of their contexts."""
    return TailRows(
        tensors=block.tensors,
        num_rows=block.num_rows,
        bases=tuple(tail.begin for tail in tails),
        starts=tuple(starts),
        page_tokens=block.page_tokens,
    )
