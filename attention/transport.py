"""How ranks exchange tensors: one small interface with three forms.

    attention/group.py     torch.distributed: NCCL between GPUs, gloo between CPUs
    attention/loopback.py  P ranks in one process on one device, with real copies

Both obey the same rules. An exchange is started, then waited for; between the two the caller may
compute on anything but the receive buffers. Every wait ends within the transport's timeout, and
then names the peer. Bytes travel as they are: shapes are known to both sides from the plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from ringspan.attention.exposure import Exposure


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

    @property
    def exchange_s(self) -> float:
        """Host seconds spent in waits so far."""

    @property
    def exposure(self) -> Exposure:
        """How long computing stood still for exchanges."""

    @property
    def sent_bytes(self) -> int:
        """By this rank, so far."""

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0) -> Pending:
        """Begin an exchange, for what a scheme computes in its step number `step`. All ranks start
        the same exchanges in the same order; messages of one pair of ranks match in order."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] of every rank, equal shapes -> [P, ...] in rank order."""

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        """x of rank `src` into x of all."""

    def close(self) -> None: ...


class ByMessages(ABC):
    """Collectives made of an exchange, for transports that have nothing better."""

    rank: int
    world_size: int

    @abstractmethod
    def start(
        self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0
    ) -> Pending: ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        x = x.contiguous()
        out[self.rank].copy_(x)
        others = [peer for peer in range(self.world_size) if peer != self.rank]
        self.start(
            [Message(x, peer) for peer in others], [Message(out[p], p) for p in others]
        ).wait()
        return out

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        others = [peer for peer in range(self.world_size) if peer != src]
        if self.rank == src:
            self.start([Message(x, peer) for peer in others], []).wait()
        else:
            self.start([], [Message(x, src)]).wait()


class SubTransport(ByMessages):
    """Some of the ranks of a transport, numbered from 0 in the order given; this rank is one of
    them. Its steps count from `first_step` of the whole."""

    def __init__(self, whole: Transport, ranks: Sequence[int], first_step: int = 0) -> None:
        self._whole, self._ranks, self._first_step = whole, tuple(ranks), first_step
        self.rank, self.world_size = self._ranks.index(whole.rank), len(self._ranks)

    @property
    def exchange_s(self) -> float:
        return self._whole.exchange_s

    @property
    def exposure(self) -> Exposure:
        return self._whole.exposure

    @property
    def sent_bytes(self) -> int:
        return self._whole.sent_bytes

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0) -> Pending:
        return self._whole.start(
            [Message(m.tensor, self._ranks[m.peer]) for m in sends],
            [Message(m.tensor, self._ranks[m.peer]) for m in recvs],
            self._first_step + step,
        )

    def close(self) -> None:
        """The whole is closed by whoever made it."""


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A flat uint8 view; exchanges move bytes, so every dtype travels on every backend."""
    return x.view(torch.uint8).flatten() if x.numel() else x.new_empty(0, dtype=torch.uint8)
