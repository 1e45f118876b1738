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
from ringspan.attention.transport import ByMessages, Message, as_bytes
from ringspan.errors import PeerTimeout

T = TypeVar("T")


@dataclass(eq=False)
class _Parcel:
    """A posted send: what, and when it may be read; the receiver's side fills in the rest."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None
    src: int
    taken: bool = False
    """The copy of it is done, or enqueued with `copied` behind it."""
    copied: torch.cuda.Event | None = None


@dataclass(eq=False)
class _Slot:
    """A posted receive: where to, and when that may be overwritten."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None
    transport: LoopbackTransport
    parcel: _Parcel | None = None


@dataclass
class _Box:
    """What is posted from one rank to another and has not met its other half."""

    parcels: deque[_Parcel] = field(default_factory=deque)
    slots: deque[_Slot] = field(default_factory=deque)


@dataclass
class LoopbackWorld:
    """What the ranks share. `run` starts them."""

    world_size: int
    timeout_s: float = 60.0
    poison: bool = True
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Who has it has the turn."""
    boxes: dict[tuple[int, int], _Box] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    """What ranks of one process need only once: the weights."""
    failed: tuple[int, BaseException] | None = None

    def __post_init__(self) -> None:
        # One lock, a condition for each rank: who is waited for wakes only who waits for it.
        self._wakes = [threading.Condition(self.lock) for _ in range(self.world_size)]

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
            with self.lock:
                if self.failed is not None:
                    return
                try:
                    results[rank] = fns[rank]()
                except BaseException as error:
                    if self.failed is None:
                        self.failed = (rank, error)
                finally:
                    for wake in self._wakes:
                        wake.notify_all()

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
        if condition():
            return

        def done() -> bool:
            return self.failed is not None or condition()

        if not self._wakes[rank].wait_for(done, timeout=self.timeout_s):
            raise PeerTimeout(f"rank {rank} waited {self.timeout_s:.1f} s for rank {peer}")
        if self.failed is not None:
            raise PeerTimeout(
                f"rank {rank} waited for rank {peer}, but rank {self.failed[0]} failed"
            )

    def post(self, parcel: _Parcel | None, slot: _Slot | None, src: int, dst: int) -> None:
        """A send or a receive between two ranks. The second of a pair wakes the other's rank, and
        without poison copies at once: nobody has to come back for it."""
        box = self.boxes.setdefault((src, dst), _Box())
        if parcel is not None:
            box.parcels.append(parcel)
        if slot is not None:
            box.slots.append(slot)
        while box.parcels and box.slots:
            sent, into = box.parcels.popleft(), box.slots.popleft()
            into.parcel = sent
            if not self.poison:
                into.transport.copy(into)
            self._wakes[dst].notify()
            self._wakes[src].notify()

    def taken(self, parcel: _Parcel) -> None:
        parcel.taken = True
        self._wakes[parcel.src].notify()


class LoopbackTransport(ByMessages):
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
        if self.world.poison:
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)  # what still reads the receive buffers comes first
            self._on_stream(lambda: [as_bytes(tensor).fill_(0xFF) for tensor, _ in recvs])
        posted, slots = [], []
        for tensor, peer in sends:
            parcel = _Parcel(as_bytes(tensor), ready, self.rank)
            posted.append((parcel, peer))
            self.sent_bytes += tensor.nbytes
            self.world.post(parcel, None, self.rank, peer)
        for tensor, peer in recvs:
            slot = _Slot(as_bytes(tensor), ready, self)
            slots.append((slot, peer))
            self.world.post(None, slot, peer, self.rank)
        return _LoopbackPending(self, posted, slots, step)

    def copy(self, slot: _Slot) -> None:
        """A parcel into its slot, on this rank's exchange stream."""
        parcel = slot.parcel
        assert parcel is not None
        if parcel.tensor.numel() != slot.tensor.numel():
            raise ValueError(
                f"rank {self.rank} expected {slot.tensor.numel()} bytes of rank {parcel.src}, "
                f"which sent {parcel.tensor.numel()}"
            )
        if self._stream is None:
            slot.tensor.copy_(parcel.tensor)
        else:
            for ready in (parcel.ready, slot.ready):
                if ready is not None:
                    self._stream.wait_event(ready)
            with torch.cuda.stream(self._stream):
                slot.tensor.copy_(parcel.tensor)
                parcel.copied = torch.cuda.Event()
                parcel.copied.record()
        self.world.taken(parcel)

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
        slots: list[tuple[_Slot, int]],
        step: int,
    ) -> None:
        self._transport, self._posted, self._slots = transport, posted, slots
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
        for slot, peer in self._slots:
            world.wait_for(lambda slot=slot: slot.parcel is not None, transport.rank, peer)  # type: ignore[misc]
            if slot.parcel is not None and not slot.parcel.taken:
                transport.copy(slot)
        for parcel, peer in self._posted:
            world.wait_for(lambda parcel=parcel: parcel.taken, transport.rank, peer)  # type: ignore[misc]
        if transport._stream is not None:
            # Ranks share the compute stream: only what stands still here is this rank's exposure.
            with transport.exposure.waiting(self._step):
                arrived = [slot.parcel for slot, _ in self._slots if slot.parcel is not None]
                for one in (*arrived, *(parcel for parcel, _ in self._posted)):
                    if one.copied is not None:
                        torch.cuda.current_stream().wait_event(one.copied)
        self._posted, self._slots = [], []
        transport.exchange_s += time.perf_counter() - began
