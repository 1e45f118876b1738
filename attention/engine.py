"""Two kinds of step, handed to the model as its `ringspan` argument; the hook calls `attend` once
a layer.

A `PrefillStep` takes new tokens through the model, dealt to the ranks: a chunk of a context, or a
long turn of a session. A `TailStep` (tail_step.py) takes new tokens of sessions, which every rank
computes alike, over keys that lie where they are; one small exchange a layer merges the parts.

How queries and keys meet is the scheme's (attention/schemes/), what is attended to is the problem's
(attention/problem.py), the arithmetic is the `Compute`'s (attention/compute.py).

q [T, Hq, D], k and v [T, Hkv, D] in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ringspan.attention.audit import Audit, AuditResult
from ringspan.attention.buffers import Buffers
from ringspan.attention.compute import Compute
from ringspan.attention.compute import Rules as Rules
from ringspan.attention.kv import PLAIN, KVShard
from ringspan.attention.layer import Block, Layer
from ringspan.attention.layout import Deal
from ringspan.attention.ledger import Ledger
from ringspan.attention.problem import Problem, Source
from ringspan.attention.schemes.table import scheme_named
from ringspan.attention.step import Step as Step
from ringspan.attention.tail_step import TailStep as TailStep
from ringspan.attention.transport import Transport
from ringspan.types import coalesce, total_tokens


class HeldKeys(NamedTuple):
    """Keys of earlier steps: this rank's shard, and what every rank holds of them."""

    shard: KVShard
    held: Deal


class PrefillStep(Step):
    """New tokens, this rank's rows of them, over the keys that lie and the new ones.

    dealt: the new tokens' spans of each rank. sink: this rank's shard that takes their keys; it
    has reserved them. earlier: what was there before; where the sink itself holds earlier tokens,
    it is the last of them. An exact codec's tensors are sent and attended to where they lie, old
    and new as one; of a lossy one the earlier tokens travel encoded, and the new ones as computed.
    """

    def __init__(
        self,
        transport: Transport,
        buffers: Buffers,
        compute: Compute,
        scheme: str,
        sink: KVShard,
        dealt: Deal,
        earlier: Sequence[HeldKeys],
        *,
        counted: bool = True,
        deterministic: bool = False,
        audit: Audit | None = None,
    ) -> None:
        self._transport, self._buffers, self._compute = transport, buffers, compute
        self._scheme = scheme_named(scheme)
        self._sink, self._earlier = sink, tuple(earlier)
        self._deterministic, self._audit = deterministic, audit
        sources = [Source(keys.held, keys.shard.codec) for keys in self._earlier]
        # An exact sink's new keys lie right behind its earlier ones: one block, one kernel call.
        self._joined = bool(self._earlier) and self._earlier[-1].shard is sink and sink.codec.exact
        if self._joined:
            joined = tuple(
                coalesce((*old, *new)) for old, new in zip(sources[-1].held, dealt, strict=True)
            )
            sources[-1] = Source(joined, sink.codec)
        else:
            sources.append(Source(dealt, PLAIN))
        self._problem = Problem([dealt], sources)
        self._ledger = Ledger(self._problem) if counted else None

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        num_rows = self._problem.rows(self._transport.rank)
        hidden = q.new_zeros(q.shape) if num_rows < q.shape[0] else None
        # A rank without new tokens runs the model on one that is none; see Contexts.run_chunk.
        q, k, v = q[:num_rows], k[:num_rows], v[:num_rows]
        if num_rows:
            self._sink.write(rules.layer, k, v)
        problem, firsts = self._problem.windowed(rules.window)
        layer = Layer(
            transport=self._transport,
            buffers=self._buffers,
            compute=self._compute,
            problem=problem,
            rules=rules,
            q=q,
            own=self._own(rules.layer, k, v, firsts),
            kv_shape=(k.shape[1], k.shape[2]),
            ledger=self._ledger,
            deterministic=self._deterministic,
        )
        if self._ledger is not None:
            self._ledger.layer(rules.window, q.shape[1])
        part = self._scheme(layer)
        if self._audit is not None and self._audit.wants(rules.layer):
            self._audit.check(layer, part)
        if hidden is not None:
            hidden[:num_rows] = part.out
            return hidden
        return part.out

    def prove(self, device: torch.device) -> Proof:
        """After the last layer; all ranks call it. Raises WrongAttention for a wrong count, or for
        an audited row that is further from its fp32 value than the dtype explains."""
        seen = None if self._ledger is None else self._ledger.check(self._transport, device)
        return Proof(seen, None if self._audit is None else self._audit.result())

    def _own(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        firsts: tuple[tuple[int, ...], ...],
    ) -> Block:
        rank = self._transport.rank
        tensors: list[torch.Tensor] = []
        for at, keys in enumerate(self._earlier):
            stop = total_tokens(keys.held[rank])
            if self._joined and at == len(self._earlier) - 1:
                stop += k.shape[0]
            tensors += keys.shard.tensors(layer, stop, firsts[at][rank])
        if not self._joined:
            first = firsts[-1][rank]
            tensors += (k[first:].contiguous(), v[first:].contiguous())
        return tuple(tensors)


class Proof(NamedTuple):
    """What a step proved of itself."""

    seen: int | None
    """Keys that this rank's rows saw, counted over heads and layers; None where not counted."""
    audit: AuditResult | None
