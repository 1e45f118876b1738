"""Ring pass-KV: each rank's keys go round, one hop at a time, while the last ones are attended.

Hop 0 is the rank's own block; before hop h is computed, block h is already on its way to rank + 1
and block h + 1 on its way here, into the other of two buffers.

Source: Ring Attention, https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.transport import Message, Transport


def ring(
    transport: Transport,
    own: tuple[torch.Tensor, ...],
    shapes: Callable[[int], Sequence[Shape]],
    buffers: Buffers,
) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """(src, the tensors of rank src's block), own first; valid until the next is asked for.

    shapes(src): the shapes of rank src's tensors.
    """
    rank, world_size = transport.rank, transport.world_size
    held, src = own, rank
    for hop in range(world_size):
        last = hop + 1 == world_size
        if not last:
            next_src = (src - 1) % world_size
            into = buffers.lease(f"ring-{hop % 2}", shapes(next_src))
            pending = transport.start(
                [Message(t, (rank + 1) % world_size) for t in held],
                [Message(t, (rank - 1) % world_size) for t in into],
            )
        yield src, held
        if not last:
            pending.wait()
            held, src = into, next_src
