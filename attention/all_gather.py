"""All-gather KV: every rank sends its block to all others at once, then attends to all of them.

One exchange instead of P - 1, for P times the buffer memory: good where links are idle between
hops (few tokens, many ranks). The own block is attended while the others arrive.

Source: Llama 3, https://arxiv.org/abs/2407.21783, section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.transport import Message, Transport


def all_gather(
    transport: Transport,
    own: tuple[torch.Tensor, ...],
    shapes: Callable[[int], Sequence[Shape]],
    buffers: Buffers,
) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """(src, the tensors of rank src's block), own first, then rank + 1, rank + 2, …"""
    rank, world_size = transport.rank, transport.world_size
    others = [(rank + i) % world_size for i in range(1, world_size)]
    into = {src: buffers.lease(f"gather-{src}", shapes(src)) for src in others}
    pending = transport.start(
        [Message(t, peer) for peer in others for t in own],
        [Message(t, src) for src in others for t in into[src]],
    )
    yield rank, own
    pending.wait()
    for src in others:
        yield src, into[src]
