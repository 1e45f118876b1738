"""All-gather KV: every rank sends its block to all others at once, then attends to all of them.

One exchange instead of P - 1, for P times the buffer memory: good where links are idle between
hops (few tokens, many ranks). The own block is attended while the others arrive.

Source: Llama 3, https://arxiv.org/abs/2407.21783, section 3.3.2.
"""

from __future__ import annotations

from ringspan.attention.layer import Layer
from ringspan.attention.transport import Message
from ringspan.types import Part


def all_gather(layer: Layer) -> Part:
    rank, world_size = layer.rank, layer.world_size
    others = [(rank + i) % world_size for i in range(1, world_size)]
    into = {src: layer.lease(f"gather-{src}", layer.shapes(src)) for src in others}
    pending = layer.start(
        [Message(t, peer) for peer in others for t in layer.own],
        [Message(t, src) for src in others for t in into[src]],
        1,
    )
    accumulator = layer.accumulator(layer.q)
    layer.over(accumulator, rank, rank, layer.own)
    layer.wait(pending)
    for src in others:
        layer.over(accumulator, rank, src, into[src])
    return layer.finish(accumulator)
