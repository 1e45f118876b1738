"""A session's new tokens, which every rank computes alike, over keys that lie where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringspan.attention.buffers import Buffers
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.kv import KVShard
from ringspan.attention.layer import Layer
from ringspan.attention.problem import Problem, Source
from ringspan.attention.step import Step
from ringspan.attention.transport import Transport
from ringspan.kernels.merge import merge_many
from ringspan.types import Part, Span


class TailStep(Step):
    """A session's new tokens [start, start + T), over its contexts and its tail so far.

    Every rank computes the same rows. `tail` already reserves this rank's spans of the new tokens;
    `keep` tells which rows these are.
    """

    def __init__(
        self,
        transport: Transport,
        buffers: Buffers,
        compute: Compute,
        contexts: Sequence[KVShard],
        tail: KVShard,
        span: Span,
        keep: slice | torch.Tensor | None,
    ) -> None:
        self._transport, self._buffers, self._compute = transport, buffers, compute
        self._tail, self._span, self._keep = tail, span, keep
        self._shards = (*contexts, tail)
        self._problem = Problem(
            [((span,),)], [Source((tuple(shard.spans),), shard.codec) for shard in self._shards]
        )

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        if self._keep is not None:
            self._tail.write(rules.layer, k[self._keep], v[self._keep])
        several = self._transport.world_size > 1
        problem, firsts = self._problem.windowed(rules.window)
        layer = Layer(
            transport=self._transport,
            buffers=self._buffers,
            compute=self._compute,
            problem=problem,
            rules=rules._replace(sinks=None) if several else rules,
            q=q,
            own=tuple(
                t
                for shard, (first, *_) in zip(self._shards, firsts, strict=True)
                for t in shard.tensors(rules.layer, None, first)
            ),
            kv_shape=(k.shape[1], k.shape[2]),
        )
        accumulator = layer.accumulator(q)
        layer.over(accumulator, 0, 0, layer.own)
        part = accumulator.finish(torch.float32 if several else q.dtype)
        if not several:
            return part.out
        packed = torch.cat((part.out, part.lse[..., None]), -1)
        gathered = self._transport.all_gather(packed)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        merge_many([Part(one[..., :-1], one[..., -1]) for one in gathered], out, None, rules.sinks)
        return out
