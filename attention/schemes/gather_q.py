"""Gather-Q: all queries go to all ranks, each attends with all of them to its own keys at once.

Pass-Q in one step: two exchanges a layer, one large kernel instead of P small ones. For few new
tokens over a long cache, where a hop's rows would leave most of a GPU idle: 2,048 rows dealt to
eight ranks are 64 thread blocks a hop, but 512 together.

Bytes sent per rank: as pass-Q. Nothing is hidden, but there is little of it.

Source: the decode exchange of https://arxiv.org/abs/2411.01783, for many rows.
"""

from __future__ import annotations

import torch

from ringspan.attention.buffers import Shape
from ringspan.attention.layer import Layer
from ringspan.attention.schemes.order import identity, order_of
from ringspan.attention.transport import Message
from ringspan.types import Part


def gather_q(layer: Layer) -> Part:
    rank, world_size = layer.rank, layer.world_size
    if world_size == 1:
        accumulator = layer.accumulator(layer.q)
        layer.over(accumulator, rank, rank, layer.own)
        return layer.finish(accumulator)
    _, heads, dim = layer.q.shape
    rows = [layer.problem.rows(r) for r in range(world_size)]
    starts = [sum(rows[:r]) for r in range(world_size)]
    others = [(rank + i) % world_size for i in range(1, world_size)]
    (all_q,) = layer.lease("gather-q", [Shape((sum(rows), heads, dim), layer.q.dtype)])
    mine = slice(starts[rank], starts[rank] + rows[rank])
    all_q[mine].copy_(layer.q)
    coming = layer.start(
        [Message(all_q[mine], peer) for peer in others],
        [Message(all_q[starts[src] : starts[src] + rows[src]], src) for src in others],
        1,
    )
    layer.wait(coming)
    together = layer.problem.grouped(world_size)
    order = order_of(together, "rows", 0, all_q.device)
    away = layer.within(
        problem=together.with_keys_of(rank),
        rules=layer.rules._replace(sinks=None),
        ledger=None if layer.ledger is None else layer.ledger.grouped(together),
    )
    accumulator = away.accumulator(all_q if identity(order) else all_q.index_select(0, order.index))
    away.over(accumulator, 0, 0, layer.own)
    part = away.finish(accumulator)
    return _home(layer, part, order.inverse, rows, starts, others)


def _home(
    layer: Layer,
    part: Part,
    inverse: torch.Tensor,
    rows: list[int],
    starts: list[int],
    others: list[int],
) -> Part:
    """Every rank's rows of the part go to it; ours of all ranks are merged."""
    rank = layer.rank
    out, lse = layer.lease("gather-q-away", layer.part_shapes(sum(rows)))
    torch.index_select(part.out, 0, inverse, out=out)
    torch.index_select(part.lse, 0, inverse, out=lse)
    home = {
        src: layer.lease(f"gather-q-home-{src}", layer.part_shapes(rows[rank])) for src in others
    }
    of = {r: slice(starts[r], starts[r] + rows[r]) for r in range(layer.world_size)}
    layer.wait(
        layer.start(
            [Message(t[of[peer]], peer) for peer in others for t in (out, lse)],
            [Message(t, src) for src in others for t in home[src]],
            2,
        )
    )
    accumulator = layer.accumulator(layer.q)
    accumulator.add(0, rows[rank], Part(out[of[rank]], lse[of[rank]]), (rank, 0, 0))
    for src in others:
        accumulator.add(0, rows[rank], Part(*home[src]), (src, 0, 0))
    return layer.finish(accumulator)
