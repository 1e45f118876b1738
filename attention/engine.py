"""The one loop: a scheme brings blocks of keys, local backends attend to them, parts are merged.

Two kinds of step are handed to the model as its `ringspan` argument; the hook calls `attend` once
a layer. A `PrefillStep` takes one chunk of a context through the model, its tokens dealt to the
ranks. A `TailStep` takes a session's new tokens, which every rank computes alike, over keys that
lie where they are: queries go to the keys, and one small exchange a layer merges the parts.

q [T, Hq, D], k and v [T, Hkv, D] in the compute dtype; accumulators are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ringspan.attention.all_gather import all_gather
from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.kv import KVShard
from ringspan.attention.layout import Deal
from ringspan.attention.local import attend
from ringspan.attention.mask import Piece, pieces
from ringspan.attention.ring import ring
from ringspan.attention.transport import Transport
from ringspan.errors import UnknownName
from ringspan.kernels.merge import merge_into, merge_parts
from ringspan.types import Part, Span, total_tokens

Blocks = Iterator[tuple[int, tuple[torch.Tensor, ...]]]
Scheme = Callable[
    [Transport, tuple[torch.Tensor, ...], Callable[[int], Sequence[Shape]], Buffers], Blocks
]
SCHEMES: dict[str, Scheme] = {"ring": ring, "all-gather": all_gather}


def scheme_named(name: str) -> Scheme:
    if name not in SCHEMES:
        raise UnknownName("scheme", name, tuple(SCHEMES))
    return SCHEMES[name]


class Rules(NamedTuple):
    """How one layer attends."""

    layer: int
    scale: float
    window: int | None = None
    softcap: float = 0.0
    causal: bool = True


class Step:
    """What the hook calls."""

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [T, Hq, D], k, v [T, Hkv, D] of one layer -> out [T, Hq, D]."""
        raise TypeError("a Step is either a PrefillStep or a TailStep")


class _Attention:
    """Parts of one layer's queries, merged as they come."""

    def __init__(self, rules: Rules, q: torch.Tensor, backend: str, buffers: Buffers) -> None:
        self._rules, self._q, self._backend, self._buffers = rules, q, backend, buffers
        self._whole: Part | None = None
        self._acc: Part | None = None

    def over(self, k: torch.Tensor, v: torch.Tensor, cut: Sequence[Piece]) -> None:
        for piece in cut:
            rows = slice(piece.q0, piece.q1)
            part = attend(
                self._q[rows],
                k[piece.k0 : piece.k1],
                v[piece.k0 : piece.k1],
                causal=piece.causal,
                offset=piece.offset,
                window=piece.window,
                softcap=self._rules.softcap,
                scale=self._rules.scale,
                backend=self._backend,
            )
            first = self._whole is None and self._acc is None
            if first and piece.q1 - piece.q0 == self._q.shape[0]:
                self._whole = part  # often the only one: then nothing is copied or merged
                continue
            acc = self._accumulator()
            merge_into(acc.out[rows], acc.lse[rows], part.out, part.lse)

    def _accumulator(self) -> Part:
        if self._acc is None:
            num_rows, num_heads, head_dim = self._q.shape
            out, lse = self._buffers.lease(
                "accumulator",
                [
                    Shape((num_rows, num_heads, head_dim), torch.float32),
                    Shape((num_rows, num_heads), torch.float32),
                ],
            )
            if self._whole is not None:
                out.copy_(self._whole.out)
                lse.copy_(self._whole.lse)
                self._whole = None
            else:
                out.zero_()
                lse.fill_(float("-inf"))
            self._acc = Part(out, lse)
        return self._acc

    def part(self) -> Part:
        """The merged part; valid until the next layer."""
        return self._whole if self._whole is not None else self._accumulator()


class PrefillStep(Step):
    """One chunk of a context: this rank's rows of it, over the cached pages and the chunk.

    dealt: the chunk's spans of each rank. cached: the spans each rank holds of earlier chunks.
    `shard` already reserves this rank's spans of the chunk. An exact codec's tensors are sent and
    attended where they lie; of a lossy one the cached tokens travel encoded and are decoded into a
    staging buffer, while the chunk's own keys are used as computed.
    """

    def __init__(
        self,
        transport: Transport,
        buffers: Buffers,
        scheme: str,
        backend: str,
        shard: KVShard,
        dealt: Deal,
        cached: Deal,
    ) -> None:
        self._transport, self._buffers = transport, buffers
        self._scheme, self._backend = scheme_named(scheme), backend
        self._shard, self._dealt, self._cached = shard, dealt, cached
        self._chunk_start = min((s.start for spans in dealt for s in spans), default=0)
        self._cuts: dict[tuple[int, int | None], tuple[Piece, ...]] = {}

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        rank = self._transport.rank
        num_rows = total_tokens(self._dealt[rank])
        hidden = q.new_zeros(q.shape) if num_rows < q.shape[0] else None
        # A rank without tokens in this chunk runs the model on one that is none; see Rank.
        q, k, v = q[:num_rows], k[:num_rows], v[:num_rows]
        if num_rows:
            self._shard.write(rules.layer, k, v)
        attention = _Attention(rules, q, self._backend, self._buffers)
        shapes = self._shapes_of(rules, k)
        for src, tensors in self._scheme(
            self._transport, self._own(rules, k, v), shapes, self._buffers
        ):
            cut = self._cut(src, rules.window)
            if cut:
                keys, values = self._keys(rules, src, tensors, k)
                attention.over(keys, values, cut)
        out = attention.part().out.to(q.dtype) if num_rows else q
        if hidden is not None:
            hidden[:num_rows] = out
            return hidden
        return out

    def _first(self, src: int, window: int | None) -> int:
        """Row of rank src's shard at which the keys begin that this chunk can still see."""
        if window is None:
            return 0
        floor, row = self._chunk_start - window + 1, 0
        for span in self._cached[src]:
            if span.stop > floor:
                return row + max(0, floor - span.start)
            row += span.tokens
        return row

    def _counts(self, src: int, window: int | None) -> tuple[int, int]:
        """Tokens of rank src's block: cached ones that are sent, and the chunk's."""
        cached = total_tokens(self._cached[src]) - self._first(src, window)
        return cached, total_tokens(self._dealt[src])

    def _own(self, rules: Rules, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rank = self._transport.rank
        first = self._first(rank, rules.window)
        cached = total_tokens(self._cached[rank])
        if self._shard.codec.exact:
            stop = cached + k.shape[0]
            return tuple(t[first:stop] for t in self._shard.tensors(rules.layer, stop))
        encoded = tuple(t[first:cached] for t in self._shard.tensors(rules.layer, cached))
        return (*encoded, k.contiguous(), v.contiguous())

    def _shapes_of(self, rules: Rules, k: torch.Tensor) -> Callable[[int], list[Shape]]:
        codec = self._shard.codec
        specs = codec.specs(k.shape[1], k.shape[2], k.dtype)

        def shapes(src: int) -> list[Shape]:
            cached, new = self._counts(src, rules.window)
            if codec.exact:
                return [Shape((cached + new, *s.shape), s.dtype) for s in specs]
            encoded = [Shape((cached, *s.shape), s.dtype) for s in specs]
            return encoded + 2 * [Shape((new, *k.shape[1:]), k.dtype)]

        return shapes

    def _keys(
        self, rules: Rules, src: int, tensors: tuple[torch.Tensor, ...], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a block, each [S, Hkv, D]: cached first, then the chunk's."""
        cached, new = self._counts(src, rules.window)
        if self._shard.codec.exact:
            return tensors[0], tensors[1]
        *encoded, chunk_k, chunk_v = tensors
        if not cached:
            return chunk_k, chunk_v
        shape = Shape((cached + new, *like.shape[1:]), like.dtype)
        keys, values = self._buffers.lease("staging", [shape, shape])
        self._shard.codec.decode(tuple(encoded), keys[:cached], values[:cached])
        keys[cached:].copy_(chunk_k)
        values[cached:].copy_(chunk_v)
        return keys, values

    def _cut(self, src: int, window: int | None) -> tuple[Piece, ...]:
        if (src, window) not in self._cuts:
            held = _without_rows(self._cached[src], self._first(src, window))
            self._cuts[src, window] = pieces(
                self._dealt[self._transport.rank], (*held, *self._dealt[src]), True, window
            )
        return self._cuts[src, window]


class TailStep(Step):
    """A session's new tokens [start, start + T), over its contexts and its tail so far.

    Every rank computes the same rows. `tail` already reserves this rank's spans of the new tokens;
    `keep` tells which rows these are.
    """

    def __init__(
        self,
        transport: Transport,
        buffers: Buffers,
        backend: str,
        contexts: Sequence[KVShard],
        tail: KVShard,
        span: Span,
        keep: slice | torch.Tensor | None,
    ) -> None:
        self._transport, self._buffers, self._backend = transport, buffers, backend
        self._contexts, self._tail, self._span, self._keep = contexts, tail, span, keep

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        if self._keep is not None:
            self._tail.write(rules.layer, k[self._keep], v[self._keep])
        attention = _Attention(rules, q, self._backend, self._buffers)
        for shard in (*self._contexts, self._tail):
            cut = pieces((self._span,), shard.spans, True, rules.window)
            if cut:
                first = min(piece.k0 for piece in cut)
                keys, values = self._keys(rules.layer, shard, first, k)
                cut = tuple(p._replace(k0=p.k0 - first, k1=p.k1 - first) for p in cut)
                attention.over(keys, values, cut)
        part = attention.part()
        if self._transport.world_size == 1:
            return part.out.to(q.dtype)
        packed = torch.cat((part.out.float(), part.lse[..., None]), -1)
        gathered = self._transport.all_gather(packed)
        return merge_parts(gathered[..., :-1], gathered[..., -1]).out.to(q.dtype)

    def _keys(
        self, layer: int, shard: KVShard, first: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = tuple(t[first:] for t in shard.tensors(layer))
        if shard.codec.exact:
            return tensors[0], tensors[1]
        shape = Shape((shard.num_tokens - first, *like.shape[1:]), like.dtype)
        keys, values = self._buffers.lease("staging", [shape, shape])
        shard.codec.decode(tensors, keys, values)
        return keys, values


def _without_rows(spans: Sequence[Span], rows: int) -> list[Span]:
    """`spans` without their first `rows` positions."""
    kept = []
    for span in spans:
        cut = min(rows, span.tokens)
        rows -= cut
        if span.tokens > cut:
            kept.append(Span(span.start + cut, span.stop))
    return kept
