"""How ranks exchange tensors: one small interface with three forms.

    attention/group.py     torch.distributed: NCCL between GPUs, gloo between CPUs
    attention/loopback.py  P ranks in one process on one device, with real copies

Both obey the same rules. An exchange is started, then waited for; between the two the caller may
compute on anything but the receive buffers. Every wait ends within the transport's timeout, and
then names the peer. Bytes travel as they are: shapes are known to both sides from the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class Message(NamedTuple):
    """A contiguous tensor that goes to, or comes from, `peer`."""

    tensor: torch.Tensor
    peer: int


class Pending(Protocol):
    def wait(self) -> None:
        """The received tensors may be read, and the sent ones overwritten, by what comes next on
        the current stream. Raises PeerTimeout, which names the peer."""


class Transport(Protocol):
    rank: int
    world_size: int
    exchange_s: float
    """Host seconds spent in waits so far."""
    sent_bytes: int

    def start(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Pending:
        """Begin an exchange. All ranks start the same exchanges in the same order; messages of
        one pair of ranks match in order."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] of every rank, equal shapes -> [P, ...] in rank order."""

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        """x of rank `src` into x of all."""

    def close(self) -> None: ...


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A flat uint8 view; exchanges move bytes, so every dtype travels on every backend."""
    return x.view(torch.uint8).flatten() if x.numel() else x.new_empty(0, dtype=torch.uint8)
