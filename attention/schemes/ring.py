"""Ring pass-KV: each rank's keys go round, one hop at a time, while the last ones are attended.

Step 0 is the rank's own block. Before step h is computed, the block of step h + 1 is already on its
way here, into the other of two buffers. Two ways to bring it:

    ring          the neighbour forwards what it has: only neighbours talk, as ring links want it
    ring-direct   its owner sends it: no hop waits for the one before it, own pages are sent from
                  where they lie; for links between all (NVLink switches, one network)

Bytes sent per rank: (P - 1) / P of all keys. Hidden behind attention when
new tokens / P >= (Hkv / Hq) * C / b, with C in FLOP/s and b in bytes/s.

Source: Ring Attention, https://arxiv.org/abs/2310.01889; sending straight to rank + i, as in
https://github.com/alibaba/rtp-llm's rotation.
"""

from __future__ import annotations

from ringspan.attention.layer import Layer
from ringspan.attention.transport import Message
from ringspan.types import Part


def ring(layer: Layer) -> Part:
    return _ring(layer, forward=True)


def ring_direct(layer: Layer) -> Part:
    return _ring(layer, forward=False)


def _ring(layer: Layer, forward: bool) -> Part:
    rank, world_size = layer.rank, layer.world_size
    accumulator = layer.accumulator(layer.q)
    held, src = layer.own, rank
    for step in range(world_size):
        last = step + 1 == world_size
        if not last:
            next_src = (src - 1) % world_size
            into = layer.lease(f"ring-{step % 2}", layer.shapes(next_src))
            to = (rank + 1 if forward else rank + step + 1) % world_size
            comes_from = (rank - 1) % world_size if forward else next_src
            pending = layer.start(
                [Message(t, to) for t in (held if forward else layer.own)],
                [Message(t, comes_from) for t in into],
                step + 1,
            )
        layer.over(accumulator, rank, src, held)
        if not last:
            layer.wait(pending)
            held, src = into, next_src
    return layer.finish(accumulator)
