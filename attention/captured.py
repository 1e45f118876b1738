"""A rank's fixed-shape work as a CUDA graph, collectives over NCCL included.

A layer of a decode step is some twenty launches. From Python they take longer than the device:
41 ms a token for an 8B model over 262,144 tokens on an H200. A graph holds the same kernels, copies
and exchanges, so what it computes is what was computed without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ringspan.attention.group import GroupTransport
from ringspan.attention.loopback import LoopbackTransport
from ringspan.attention.transport import Transport
from ringspan.attention.watch import Watched


class InGraph:
    """A GroupTransport's collectives, to be captured: without events that are waited for by the
    host, since within a graph they are none. The replay is watched as a whole."""

    def __init__(self, group: GroupTransport) -> None:
        self.rank, self.world_size = group.rank, group.world_size

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((self.world_size, *x.shape))
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1))
        return out

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        dist.broadcast(x, src)


def why_not_captured(transport: Transport, device: torch.device) -> str | None:
    """Why this rank's work runs launch by launch; None where it can be a graph."""
    if device.type != "cuda":
        return "CUDA graphs are of GPUs"
    if transport.world_size == 1:
        return None
    if isinstance(transport, LoopbackTransport):
        return "loopback ranks take turns on one device"
    if not isinstance(transport, GroupTransport) or transport.name == "gloo":
        return "its exchanges go through the host"
    return None


class Captured:
    """Work that was captured; `replay` it on the current stream."""

    def __init__(self, graph: torch.cuda.CUDAGraph, transport: Transport) -> None:
        self._graph = graph
        self._group = transport if isinstance(transport, GroupTransport) else None

    def replay(self) -> None:
        """Enqueues the work. With other ranks it is watched: `group.synchronize` raises PeerTimeout
        where it is overdue."""
        group = self._group
        if group is None:
            self._graph.replay()
            return
        group.watch.check()
        others = tuple(rank for rank in range(group.world_size) if rank != group.rank)
        began, done = (group.watch.mark(torch.cuda.Event) for _ in range(2))
        began.record()
        self._graph.replay()
        done.record()
        group.watch.add(Watched(began, (done,), others, what="a decode step", waited=True))


def capture(
    work: Callable[[Any], object],
    transport: Transport,
    why_not: str = "",
) -> tuple[Captured | None, str]:
    """work(collectives) as a graph, or None and why it cannot be one.

    The work ran before: nothing is left to compile, nor to allocate for good. All ranks call it;
    where one of them cannot, or says `why_not`, none has a graph. Every graph has its own pool of
    memory: torch refuses a pool whose last graph is gone.
    """
    several = isinstance(transport, GroupTransport)
    device = torch.device("cuda", torch.cuda.current_device())
    graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
    reason = why_not
    if why_not:
        graph = None
    try:
        # Other threads (NCCL's and our watch) look at events meanwhile.
        if graph is not None:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                work(InGraph(transport) if isinstance(transport, GroupTransport) else transport)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        graph = None
        with contextlib.suppress(RuntimeError):  # what the broken capture left behind
            torch.cuda.synchronize(device)
    if several:
        well = torch.tensor([graph is not None], dtype=torch.int32, device=device)
        if not bool(transport.all_gather(well).all()):
            return None, reason or "another rank's work could not be captured"
    return (None, reason) if graph is None else (Captured(graph, transport), "")
