"""One layer's attention on one rank, as a scheme sees it.

A scheme moves queries, keys or parts over `transport` and calls `over` with the block of keys it
has at hand; pieces, decoding, kernels, counting and merging are done here, once for all schemes.

A block is the tuple of tensors in which one rank's keys travel: for each source of the problem the
tensors of its codec, each [keys, Hkv, ...], contiguous, in the order of the sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ringspan.attention.accumulator import Accumulator
from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.ledger import Ledger
from ringspan.attention.mask import clip
from ringspan.attention.problem import Problem
from ringspan.attention.transport import Message, Pending, Transport
from ringspan.types import Part

Block = tuple[torch.Tensor, ...]

STAGING_TOKENS = 1 << 18
"""Keys of an encoded source that are decoded at once: 1 GiB of K and V at 8 heads of 128."""


@dataclass(frozen=True)
class Layer:
    """q [T, Hq, D] are this rank's rows; `own` its block; `kv_shape` (Hkv, D) of the keys.

    `problem` is already without the keys that lie before every window.
    """

    transport: Transport
    buffers: Buffers
    compute: Compute
    problem: Problem
    rules: Rules
    q: torch.Tensor
    own: Block
    kv_shape: tuple[int, int]
    ledger: Ledger | None = None
    deterministic: bool = False
    scope: str = field(default="")
    """Before the names of leased buffers: a scheme within a scheme has its own."""

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def world_size(self) -> int:
        return self.transport.world_size

    def within(self, **changes: object) -> Layer:
        """The same layer with other queries, keys or ranks: for a scheme composed of another."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def lease(self, name: str, shapes: Sequence[Shape]) -> tuple[torch.Tensor, ...]:
        return self.buffers.lease(self.scope + name, shapes)

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], step: int) -> Pending:
        """Begin an exchange, behind whatever reads the receive buffers."""
        with self.compute.fenced():
            return self.transport.start(sends, recvs, step)

    def wait(self, pending: Pending) -> None:
        """What comes next may read what an exchange brought."""
        with self.compute.fenced():
            self.transport.exposure.mark()
        pending.wait()

    def shapes(self, src: int) -> list[Shape]:
        """Of rank src's block."""
        shapes = []
        for at, source in enumerate(self.problem.sources):
            keys = self.problem.keys(at, src)
            for spec in source.codec.specs(*self.kv_shape, self.q.dtype):
                shapes.append(Shape((keys, *spec.shape), spec.dtype))
        return shapes

    def part_shapes(self, rows: int) -> list[Shape]:
        """Of a part as it travels: out in the compute dtype, lse in fp32."""
        _, heads, dim = self.q.shape
        return [Shape((rows, heads, dim), self.q.dtype), Shape((rows, heads), torch.float32)]

    def accumulator(self, q: torch.Tensor) -> Accumulator:
        return Accumulator(self.compute, self.rules, q, self.deterministic)

    def over(self, accumulator: Accumulator, q_rank: int, k_rank: int, block: Block) -> None:
        """Attend with q_rank's rows, which the accumulator has, to the block of k_rank."""
        begin = 0
        for at, source in enumerate(self.problem.sources):
            specs = source.codec.specs(*self.kv_shape, self.q.dtype)
            tensors = block[begin : begin + len(specs)]
            begin += len(specs)
            cut = self.problem.cut(q_rank, k_rank, at, self.rules.window)
            if not cut:
                continue
            if source.codec.exact:
                for piece in cut:
                    accumulator.over(tensors[0], tensors[1], piece, (k_rank, at, piece.k0))
            else:
                first = min(piece.k0 for piece in cut)
                stop = max(piece.k1 for piece in cut)
                for k0 in range(first, stop, STAGING_TOKENS):
                    k1 = min(k0 + STAGING_TOKENS, stop)
                    keys, values = self._decoded(at, tuple(t[k0:k1] for t in tensors))
                    for piece in clip(cut, k0, k1):
                        accumulator.over(keys, values, piece, (k_rank, at, k0 + piece.k0))
            if self.ledger is not None:
                self.ledger.add(q_rank, cut, accumulator.q.shape[1])

    def finish(self, accumulator: Accumulator) -> Part:
        return accumulator.finish(self.q.dtype)

    def _decoded(self, source: int, tensors: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [S, Hkv, D] of a stretch of an encoded source; valid until the next one."""
        shape = Shape((tensors[0].shape[0], *self.kv_shape), self.q.dtype)
        keys, values = self.lease("staging", [shape, shape])
        self.compute.decode(self.problem.sources[source].codec, tensors, keys, values)
        return keys, values
