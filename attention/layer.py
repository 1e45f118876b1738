"""One layer's attention on one rank, as a scheme sees it.

A scheme moves queries, keys or parts over `transport` and calls `over` with the block of keys it
has at hand; pieces, decoding, kernels, counting and merging are done here, once for all schemes.

A block is the tuple of tensors in which one rank's keys travel: for each source of the problem the
tensors of its codec, each [units, Hkv, ...], contiguous, in the order of the sources.

Encoded keys travel encoded. Few rows attend to the codes as they lie, where the codec can; for many
the keys are decoded, a stretch at a time, one stretch ahead of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ringspan.attention.accumulator import Accumulator
from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.kv import cut_units, unit_tokens
from ringspan.attention.ledger import Ledger
from ringspan.attention.mask import Piece, clip
from ringspan.attention.problem import Problem
from ringspan.attention.staging import PLACES
from ringspan.attention.transport import Message, Pending, Transport
from ringspan.types import Part

Block = tuple[torch.Tensor, ...]

STAGING_TOKENS = 1 << 17
"""Keys of an encoded source that are decoded at once: half a GiB of K and V at 8 heads of 128, and
there are two such places. A multiple of every page."""


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
                shapes.append(Shape((spec.units(keys), *spec.shape), spec.dtype))
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
                self._over_encoded(accumulator, k_rank, at, tensors, cut)
            if self.ledger is not None:
                self.ledger.add(q_rank, cut, accumulator.q.shape[1])

    def finish(self, accumulator: Accumulator) -> Part:
        return accumulator.finish(self.q.dtype)

    def _over_encoded(
        self,
        accumulator: Accumulator,
        k_rank: int,
        source: int,
        tensors: Block,
        cut: Sequence[Piece],
    ) -> None:
        """The pieces that the codec attends to in place, then the others over decoded keys."""
        codec = self.problem.sources[source].codec
        left = []
        for piece in cut:
            rows = accumulator.q[piece.q0 : piece.q1]
            part = self.compute.attend_encoded(codec, rows, tensors, piece, self.rules)
            if part is None:
                left.append(piece)
            else:
                accumulator.add(piece.q0, piece.q1, part, (k_rank, source, piece.k0))
        if not left:
            return
        unit = unit_tokens(codec.specs(*self.kv_shape, self.q.dtype))
        stretches = _stretches(left, unit)
        ahead = self._decode(source, tensors, *stretches[0][:2])
        for number, (k0, _, here) in enumerate(stretches):
            keys, values, place = ahead
            if number + 1 < len(stretches):
                ahead = self._decode(source, tensors, *stretches[number + 1][:2])
            self.compute.decoded(place)
            for piece in here:
                accumulator.over(keys, values, piece, (k_rank, source, k0 + piece.k0))
            self.compute.has_read(place)

    def _decode(
        self, source: int, tensors: Block, k0: int, k1: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Start decoding keys [k0, k1) of an encoded source: K and V [S, Hkv, D], and the place
        where they lie until its next turn."""
        codec, place = self.problem.sources[source].codec, self.compute.next_place()
        specs = codec.specs(*self.kv_shape, self.q.dtype)
        # Both places, as large as any block of this layer wants them: the same memory every time.
        whole = Shape((self._staging_tokens(), *self.kv_shape), self.q.dtype)
        places = self.lease("staging", [whole] * 2 * PLACES)
        keys, values = (one[: k1 - k0] for one in places[2 * place : 2 * place + 2])
        self.compute.decode(codec, cut_units(tensors, specs, k0, k1), keys, values, place)
        return keys, values, place

    def _staging_tokens(self) -> int:
        held = [
            self.problem.keys(at, rank)
            for at, source in enumerate(self.problem.sources)
            if not source.codec.exact
            for rank in range(self.problem.world_size)
        ]
        return min(STAGING_TOKENS, max(held))


def _stretches(cut: Sequence[Piece], unit: int) -> list[tuple[int, int, tuple[Piece, ...]]]:
    """Keys [k0, k1) to decode at once, and the pieces over them, whose keys count from k0 on.
    k0 begins a unit; a stretch that no piece reads is left out."""
    first = min(piece.k0 for piece in cut) // unit * unit
    stop = max(piece.k1 for piece in cut)
    found = []
    for k0 in range(first, stop, STAGING_TOKENS):
        k1 = min(k0 + STAGING_TOKENS, stop)
        if here := clip(cut, k0, k1):
            found.append((k0, k1, here))
    return found
