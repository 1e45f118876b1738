"""Transport over torch.distributed: NCCL between GPUs, gloo between CPUs.

On a GPU exchanges run on a stream of their own, beside the kernels; a wait makes the current
stream wait, not the host. On a CPU a wait blocks, at most `timeout_s`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ringspan.attention.exposure import Exposure
from ringspan.attention.transport import Message, as_bytes
from ringspan.errors import PeerTimeout


def join_group(
    backend: str,
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
) -> GroupTransport:
    """Join the process group of a gang. Blocks until all ranks came, at most `timeout_s`."""
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if backend == "nccl" else None,
    )
    return GroupTransport(rank, world_size, device, timeout_s)


class GroupTransport:
    """One rank's end of the default process group."""

    def __init__(self, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.exchange_s, self.sent_bytes = 0.0, 0
        self.exposure = Exposure(device)
        self._timeout = timedelta(seconds=timeout_s)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(
        self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0
    ) -> _GroupPending:
        # One tag per place in the list: gloo then matches several tensors of one pair in order.
        ops: list[dist.P2POp] = []
        seen: dict[tuple[bool, int], int] = {}
        for op, messages in ((dist.isend, sends), (dist.irecv, recvs)):
            for tensor, peer in messages:
                tag = seen.get((op is dist.isend, peer), 0)
                seen[op is dist.isend, peer] = tag + 1
                if tensor.numel():
                    ops.append(dist.P2POp(op, as_bytes(tensor), peer, tag=tag))
        self.sent_bytes += sum(m.tensor.nbytes for m in sends)
        if not ops:
            return _GroupPending(self, [], [], step)
        peers = [op.peer for op in ops]
        if self._stream is None:
            return _GroupPending(self, dist.batch_isend_irecv(ops), peers, step)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        done = torch.cuda.Event()
        done.record(self._stream)
        return _GroupPending(self, [], peers, step, done)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        x = x.contiguous()
        self._blocking(
            lambda: dist.all_gather(
                [as_bytes(row) for row in out.unbind(0)], as_bytes(x), async_op=True
            )
        )
        self.sent_bytes += x.nbytes * (self.world_size - 1)
        return out

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        self._blocking(lambda: dist.broadcast(x, src, async_op=True))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _blocking(self, collective: object) -> None:
        began = time.perf_counter()
        try:
            work = collective()  # type: ignore[operator]
            work.wait(self._timeout) if self._stream is None else work.wait()
        except RuntimeError as error:
            raise PeerTimeout(f"rank {self.rank}: a collective failed: {_line(error)}") from error
        self.exchange_s += time.perf_counter() - began


class _GroupPending:
    def __init__(
        self,
        transport: GroupTransport,
        works: list[dist.Work],
        peers: list[int],
        step: int,
        done: torch.cuda.Event | None = None,
    ) -> None:
        self._transport, self._works, self._peers, self._step = transport, works, peers, step
        self._done = done

    def wait(self) -> None:
        transport = self._transport
        with transport.exposure.waiting(self._step):
            if transport._stream is None:
                self._wait()
            elif self._done is not None:  # this exchange alone: later ones may go on
                torch.cuda.current_stream().wait_event(self._done)

    def _wait(self) -> None:
        transport = self._transport
        began = time.perf_counter()
        for work, peer in zip(self._works, self._peers, strict=True):
            try:
                work.wait(transport._timeout)
            except RuntimeError as error:
                raise PeerTimeout(
                    f"rank {transport.rank} lost rank {peer} in an exchange: {_line(error)}"
                ) from error
        self._works, self._peers = [], []
        transport.exchange_s += time.perf_counter() - began


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
