"""Hosts of ranks: what stands between a gang and its rank objects, in one process.

A host runs one rank (`RankHost`) or all ranks of a loopback gang (`LoopbackHost`). Both answer
with one result per rank they hold, and turn whatever a rank raises into `RanksFailed`, which can
cross a process boundary. Plain classes: `ray_gang` makes actors of them, tests build them.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ringspan.cluster.faults import Fault, FaultKind, Member, RanksFailed, bare, fault_of, is_benign
from ringspan.cluster.gang import RankFactory
from ringspan.cluster.messages import GangSpec


class Host(Protocol):
    def where(self) -> Member: ...

    def invoke(self, method: str, *args: Any) -> list[Any]:
        """The gang, on every host: calls the method on each rank held, or one of the host's own
        stream methods."""


class Streams:
    """The generators that one rank has open."""

    def __init__(self, rank_object: Any) -> None:
        self._rank = rank_object
        self._open: dict[int, Iterator[Any]] = {}

    def open_stream(self, stream_id: int, method: str, *args: Any) -> None:
        self._open[stream_id] = getattr(self._rank, method)(*args)

    def advance_stream(self, stream_id: int) -> list[Any]:
        """The next item, or an empty list once there is none (may be repeated)."""
        generator = self._open.get(stream_id)
        if generator is None:
            return []
        try:
            return [next(generator)]
        except BaseException as error:
            del self._open[stream_id]
            if isinstance(error, StopIteration):
                return []
            raise

    def close_stream(self, stream_id: int) -> None:
        generator = self._open.pop(stream_id, None)
        if generator is not None:
            generator.close()  # type: ignore[attr-defined]

    @property
    def rank(self) -> Any:
        return self._rank

    def method(self, name: str) -> Callable[..., Any]:
        """One of the three above, or the rank's own."""
        if name in ("open_stream", "advance_stream", "close_stream"):
            return getattr(self, name)
        return getattr(self._rank, name)


class RankHost:
    """One rank. Its constructor only stores; the rank is made by the first call."""

    def __init__(self, rank: int, spec: GangSpec, rank_class: RankFactory) -> None:
        self._rank = rank
        self._spec = spec
        self._rank_class = rank_class
        self._streams: Streams | None = None

    def where(self) -> Member:
        return Member(socket.gethostname(), os.getpid())

    def use_device(self, index: int) -> None:
        """The gang, before anything else on a GPU: makes this device the process's current one."""
        import torch

        torch.cuda.set_device(index)

    def invoke(self, method: str, *args: Any) -> list[Any]:
        try:
            if self._streams is None:
                self._streams = Streams(self._rank_class(self._rank, self._spec))
            return [self._streams.method(method)(*args)]
        except Exception as error:
            fault = bare(fault_of(self._rank, error))
        # Outside of the handler: its error keeps frames, and they keep what the group's
        # connections hang on. Peers that wait for this rank are to hear of it.
        if not is_benign([fault]):
            self._leave(fault.text)
        raise RanksFailed((fault,))

    def _leave(self, why: str) -> None:
        leave = getattr(self._streams.rank, "leave", None) if self._streams else None
        if leave is not None:
            leave(why)
            gc.collect()


class LoopbackHost:
    """All ranks of a gang, as threads of this process on one device, one running at a time."""

    def __init__(self, spec: GangSpec, rank_class: RankFactory) -> None:
        self._spec = spec
        self._rank_class = rank_class
        self._streams: list[Streams] = []
        self._world: Any = None
        self._device: int | None = None

    def where(self) -> Member:
        return Member(socket.gethostname(), os.getpid())

    def use_device(self, index: int) -> None:
        """The gang, before anything else on a GPU. The current device belongs to a thread, so
        every rank's thread sets it."""
        self._device = index

    def start(self) -> list[Any]:
        """The gang, once: builds and starts every rank; their RankReady."""
        from ringspan.attention.loopback import LoopbackWorld

        self._world = LoopbackWorld(self._spec.world_size, self._spec.timeout_s, poison=False)
        ranks = range(self._spec.world_size)
        self._streams = [Streams(self._rank_class(rank, self._spec)) for rank in ranks]
        return self.invoke("start", self._world)

    def replace(self, ranks: Sequence[int]) -> list[Any]:
        """The gang, when these ranks failed: new ones take their places, with nothing but the
        weights, and all join again; the new ones' RankReady."""
        made: list[Any] = []
        for rank in ranks:
            self._streams[rank] = Streams(self._rank_class(rank, self._spec))

        def load(rank: int) -> Any:
            return self._streams[rank].rank.load(self._world) if rank in ranks else None

        made = self._run(load)
        self.invoke("join", self._world)
        return [ready for ready in made if ready is not None]

    def invoke(self, method: str, *args: Any) -> list[Any]:
        return self._run(lambda rank: self._streams[rank].method(method)(*args))

    def _run(self, act: Callable[[int], Any]) -> list[Any]:
        """`act` as every rank, in rank order."""
        faults: list[Fault] = []

        def guarded(rank: int) -> Any:
            try:
                if self._device is not None:
                    import torch

                    torch.cuda.set_device(self._device)
                return act(rank)
            except Exception as error:
                # a rank that was released because another failed speaks of that other one
                faults.append(fault_of(rank, error))
                raise

        def bound(rank: int) -> Callable[[], Any]:
            return lambda: guarded(rank)

        try:
            return self._world.run([bound(rank) for rank in range(len(self._streams))])
        except Exception as error:
            if not faults:  # the world itself gave up: no rank raised anything
                faults.append(Fault(0, FaultKind.PEER, str(error)))
            raise RanksFailed(tuple(faults)) from None
