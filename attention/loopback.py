"""P ranks in one process on one device: every distributed path, run and timed on a single GPU.

Each rank is a thread. The ranks share one lock and run one at a time, handing over only where they
wait for each other, so a run is repeatable, the device's time is the sum of the ranks' work, and
kernels of two ranks never compete. Exchanges are real copies into the receiver's buffers, on a
stream of their own on a GPU. With `poison` a receive buffer is filled with NaN bytes before the
copy: whoever reads it too early, or reads a stale one, shows it in the answer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ringspan.attention.exposure import Exposure
from ringspan.attention.transport import Message, as_bytes
from ringspan.errors import PeerTimeout

T = TypeVar("T")


@dataclass
class _Parcel:
    """A posted send: what, when it may be read, and when the copy of it is done."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None
    copied: torch.cuda.Event | None = None
    taken: bool = False


@dataclass
class LoopbackWorld:
    """What the ranks share. `run` starts them."""

    world_size: int
    timeout_s: float = 60.0
    poison: bool = True
    turn: threading.Condition = field(default_factory=threading.Condition)
    boxes: dict[tuple[int, int], deque[_Parcel]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    """What ranks of one process need only once: the weights."""
    failed: tuple[int, BaseException] | None = None

    def transport(self, rank: int, device: torch.device) -> LoopbackTransport:
        return LoopbackTransport(self, rank, device)

    def run(self, fns: Sequence[Callable[[], T]]) -> list[T]:
        """fns[r] as rank r, each on a thread of its own; the results in rank order.

        The first error of any rank is raised; the others are released from their waits.
        """
        results: list[T | None] = [None] * len(fns)
        self.failed = None
        self.boxes.clear()

        def body(rank: int) -> None:
            with self.turn:
                if self.failed is not None:
                    return
                try:
                    results[rank] = fns[rank]()
                except BaseException as error:
                    if self.failed is None:
                        self.failed = (rank, error)
                finally:
                    self.turn.notify_all()

        threads = [
            threading.Thread(target=body, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(len(fns))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed is not None:
            raise self.failed[1]
        return results  # type: ignore[return-value]  # every slot was filled

    def wait_for(self, condition: Callable[[], bool], rank: int, peer: int) -> None:
        """Hand the turn over until `condition` holds."""

        def done() -> bool:
            return self.failed is not None or condition()

        self.turn.notify_all()
        if not self.turn.wait_for(done, timeout=self.timeout_s):
            raise PeerTimeout(f"rank {rank} waited {self.timeout_s:.1f} s for rank {peer}")
        if self.failed is not None:
            raise PeerTimeout(
                f"rank {rank} waited for rank {peer}, but rank {self.failed[0]} failed"
            )


class LoopbackTransport:
    """One rank's end of a LoopbackWorld."""

    def __init__(self, world: LoopbackWorld, rank: int, device: torch.device) -> None:
        self.world, self.rank, self.world_size = world, rank, world.world_size
        self.exchange_s, self.sent_bytes = 0.0, 0
        self.exposure = Exposure(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(
        self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0
    ) -> _LoopbackPending:
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        posted = []
        for tensor, peer in sends:
            parcel = _Parcel(as_bytes(tensor), ready)
            self.world.boxes.setdefault((self.rank, peer), deque()).append(parcel)
            posted.append((parcel, peer))
            self.sent_bytes += tensor.nbytes
        if self._stream is not None and ready is not None:
            self._stream.wait_event(ready)  # what still reads the receive buffers comes first
        if self.world.poison:
            self._on_stream(lambda: [as_bytes(tensor).fill_(0xFF) for tensor, _ in recvs])
        return _LoopbackPending(self, posted, list(recvs), step)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        x = x.contiguous()
        out[self.rank].copy_(x)
        others = [peer for peer in range(self.world_size) if peer != self.rank]
        self.start(
            [Message(x, peer) for peer in others], [Message(out[peer], peer) for peer in others]
        ).wait()
        return out

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        others = [peer for peer in range(self.world_size) if peer != src]
        if self.rank == src:
            self.start([Message(x, peer) for peer in others], []).wait()
        else:
            self.start([], [Message(x, src)]).wait()

    def close(self) -> None:
        pass

    def _on_stream(self, work: Callable[[], object]) -> None:
        if self._stream is None:
            work()
        else:
            with torch.cuda.stream(self._stream):
                work()


class _LoopbackPending:
    def __init__(
        self,
        transport: LoopbackTransport,
        posted: list[tuple[_Parcel, int]],
        recvs: list[Message],
        step: int,
    ) -> None:
        self._transport, self._posted, self._recvs = transport, posted, recvs
        self._step = step

    def wait(self) -> None:
        if self._transport._stream is None:
            with self._transport.exposure.waiting(self._step):
                self._wait()
        else:
            self._wait()

    def _wait(self) -> None:
        began = time.perf_counter()
        transport, world = self._transport, self._transport.world
        stream = transport._stream
        for tensor, peer in self._recvs:
            box = world.boxes.setdefault((peer, transport.rank), deque())
            world.wait_for(lambda box=box: bool(box), transport.rank, peer)  # type: ignore[misc]
            parcel = box.popleft()
            if parcel.tensor.numel() != tensor.nbytes:
                raise ValueError(
                    f"rank {transport.rank} expected {tensor.nbytes} bytes of rank {peer}, "
                    f"which sent {parcel.tensor.numel()}"
                )
            if stream is not None and parcel.ready is not None:
                stream.wait_event(parcel.ready)
            transport._on_stream(lambda t=tensor, p=parcel: as_bytes(t).copy_(p.tensor))  # type: ignore[misc]
            if stream is not None:
                parcel.copied = torch.cuda.Event()
                parcel.copied.record(stream)
            parcel.taken = True
        for parcel, peer in self._posted:
            world.wait_for(lambda parcel=parcel: parcel.taken, transport.rank, peer)  # type: ignore[misc]
        if stream is not None:
            # Ranks share the compute stream: only what stands still here is this rank's exposure.
            with transport.exposure.waiting(self._step):
                for parcel, _ in self._posted:
                    if parcel.copied is not None:
                        torch.cuda.current_stream().wait_event(parcel.copied)
                torch.cuda.current_stream().wait_stream(stream)
        self._posted, self._recvs = [], []
        transport.exchange_s += time.perf_counter() - began
