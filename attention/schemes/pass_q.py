"""Pass-Q: keys stay where they lie, queries go round, partial results come straight home.

Step 0 attends with the rank's own queries. In step h the queries of rank - h are here; their part
over the keys here is sent back to rank - h while step h + 1 is computed, so that nothing but the
last return can be exposed. All P parts of a rank's rows are merged at home, n ways, once.

Bytes sent per rank: (P - 1) / P of all queries and of all parts, whatever the number of keys: the
better way for few new tokens over a long cache.

Sources: pass-Q, https://arxiv.org/abs/2411.01783; the return during the next step, TokenRing,
https://arxiv.org/abs/2412.20501.
"""

from __future__ import annotations

import torch

from ringspan.attention.buffers import Shape
from ringspan.attention.layer import Layer
from ringspan.attention.transport import Message, Pending
from ringspan.types import Part


def pass_q(layer: Layer) -> Part:
    rank, world_size = layer.rank, layer.world_size
    rows, heads, dim = layer.q.shape
    own_q = layer.q.contiguous()
    accumulator = layer.accumulator(layer.q)
    layer_q, src = own_q, rank
    returning: Pending | None = None
    returned: list[tuple[int, Part]] = []
    for step in range(world_size):
        last = step + 1 == world_size
        if not last:
            next_src = (rank - step - 1) % world_size
            shape = Shape((layer.problem.rows(next_src), heads, dim), own_q.dtype)
            (next_q,) = layer.lease(f"pass-q-{step % 2}", [shape])
            coming = layer.start(
                [Message(own_q, (rank + step + 1) % world_size)],
                [Message(next_q, next_src)],
                step + 1,
            )
        if src == rank:
            layer.over(accumulator, rank, rank, layer.own)
        else:
            part = _part(layer, layer_q, src, step)
            if returning is not None:
                layer.wait(returning)
            returning, home = _send_home(layer, part, src, step, rows)
            returned.append(home)
        if not last:
            layer.wait(coming)
            layer_q, src = next_q, next_src
    if returning is not None:
        layer.wait(returning)
    for k_rank, part in returned:
        accumulator.add(0, rows, part, (k_rank, 0, 0))
    return layer.finish(accumulator)


def _part(layer: Layer, q: torch.Tensor, src: int, step: int) -> Part:
    """Rank src's rows over the keys here, in buffers that stay until two steps later."""
    away = layer.within(rules=layer.rules._replace(sinks=None))  # sinks are added once, at home
    accumulator = away.accumulator(q)
    away.over(accumulator, src, layer.rank, layer.own)
    part = away.finish(accumulator)
    out, lse = layer.lease(f"pass-q-away-{step % 2}", layer.part_shapes(q.shape[0]))
    out.copy_(part.out)
    lse.copy_(part.lse)
    return Part(out, lse)


def _send_home(
    layer: Layer, part: Part, src: int, step: int, rows: int
) -> tuple[Pending, tuple[int, Part]]:
    """src's part goes to src; ours, of the rank that has our queries now, comes."""
    holder = (layer.rank + step) % layer.world_size
    home = Part(*layer.lease(f"pass-q-home-{holder}", layer.part_shapes(rows)))
    pending = layer.start(
        [Message(part.out, src), Message(part.lse, src)],
        [Message(home.out, holder), Message(home.lse, holder)],
        layer.world_size + step,
    )
    return pending, (holder, home)
