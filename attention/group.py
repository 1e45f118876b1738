"""Transport over torch.distributed: NCCL between GPUs, gloo between CPUs.

On a GPU exchanges run on a stream of their own, beside the kernels; a wait makes the current
stream wait, not the host, and `synchronize` is where a silent peer shows. On a CPU a wait blocks,
at most `timeout_s`. Both name the peer (attention/watch.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from ringspan.attention.exposure import Exposure
from ringspan.attention.transport import Message, Transport, as_bytes
from ringspan.attention.watch import Watch, Watched
from ringspan.errors import PeerTimeout

NCCL_TIMEOUT_S = 1800.0
"""NCCL counts an exchange's time from when the host enqueued it, which can be a whole chunk ahead
of the GPU, and then ends the process; the watch counts from when it could begin, and does not."""
POLL_S = 2e-4
"""Between two looks at the device in `synchronize`."""


def join_group(
    backend: str,
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
) -> GroupTransport:
    """Join the process group of a gang. Blocks until all ranks came, as long as the store waits."""
    nccl = backend == "nccl"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=NCCL_TIMEOUT_S if nccl else timeout_s),
        device_id=device if nccl else None,
    )
    return GroupTransport(rank, world_size, device, timeout_s, store)


def synchronize(transport: Transport, device: torch.device) -> None:
    """Blocks until the device is idle. Raises PeerTimeout, which names the peer, where an exchange
    was overdue on the way; then nothing that was computed since the last call may be used."""
    if isinstance(transport, GroupTransport):
        transport.synchronize()
    elif device.type == "cuda":
        torch.cuda.synchronize(device)


class Work(NamedTuple):
    """A send or a receive that the host waits for."""

    work: dist.Work
    peer: int


Posted = Work | Watched
"""What an exchange has under way, on the host or on the device."""


class GroupTransport:
    """One rank's end of the default process group."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout_s: float,
        store: dist.Store | None = None,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.exchange_s, self.sent_bytes = 0.0, 0
        self.exposure = Exposure(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A connection of its own: the group may block in the other one.
        apart = store.clone() if isinstance(store, dist.TCPStore) else store
        self.watch = Watch(rank, world_size, timeout_s, apart, self._give_up)

    @property
    def name(self) -> str:
        """What moves the bytes: `nccl` or `gloo`."""
        return "gloo" if self._stream is None else "nccl"

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0) -> Exchange:
        self.watch.check()
        self.sent_bytes += sum(m.tensor.nbytes for m in sends)
        return Exchange(self, step, (*sends, *recvs), self._post(sends, recvs))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        x = x.contiguous()
        rows = [as_bytes(row) for row in out.unbind(0)]
        self._collective(lambda: dist.all_gather(rows, as_bytes(x), async_op=True))
        self.sent_bytes += x.nbytes * (self.world_size - 1)
        return out

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        self._collective(lambda: dist.broadcast(x, src, async_op=True))

    def synchronize(self) -> None:
        """Blocks until the device is idle; see `synchronize` above."""
        if self._stream is not None:
            idle = torch.cuda.Event()
            idle.record(torch.cuda.current_stream(self.device))
            while not idle.query():
                self.watch.check()
                time.sleep(POLL_S)
            torch.cuda.synchronize(self.device)
        self.watch.check()

    def leave(self, why: str) -> None:
        """Gives the group up after an exchange that failed: connections close, so that those who
        wait for this rank hear of it now and not by their timeouts. Each later exchange raises
        PeerTimeout with `why`. The process and its memory live on; it may join another group."""
        self.watch.lost = self.watch.lost or why
        self._give_up()
        self.close()

    def close(self) -> None:
        self.watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> tuple[Posted, ...]:
        """Begins the exchange; what is there to wait for."""
        # One tag per place in the list: gloo then matches several tensors of one pair in order.
        ops: list[dist.P2POp] = []
        seen: dict[tuple[bool, int], int] = {}
        for op, messages in ((dist.isend, sends), (dist.irecv, recvs)):
            for tensor, peer in messages:
                tag = seen.get((op is dist.isend, peer), 0)
                seen[op is dist.isend, peer] = tag + 1
                if tensor.numel():
                    ops.append(dist.P2POp(op, as_bytes(tensor), peer, tag=tag))
        if not ops:
            return ()
        peers = tuple(op.peer for op in ops)
        with self.naming(peers, "an exchange"):
            if self._stream is None:
                works = dist.batch_isend_irecv(ops)
                return tuple(Work(work, peer) for work, peer in zip(works, peers, strict=True))
            ready = self._mark()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                began = self._mark()
                for work in dist.batch_isend_irecv(ops):
                    work.wait()
                done = self._mark()
        return (self.watch.add(Watched(began, (done,), _each(peers), (ready,))),)

    def _collective(self, start: Callable[[], dist.Work]) -> None:
        self.watch.check()
        others = tuple(rank for rank in range(self.world_size) if rank != self.rank)
        entered = time.perf_counter()
        with self.naming(others, "a collective"):
            if self._stream is None:
                with self.watch.waiting(others):
                    start().wait(timedelta(seconds=self.watch.timeout_s))
            else:
                began = self._mark()
                start().wait()
                done = self._mark()
                self.watch.add(Watched(began, (done,), others, what="a collective", waited=True))
        self.exchange_s += time.perf_counter() - entered

    def _mark(self) -> torch.cuda.Event:
        """An event, recorded on the current stream; the watch takes it back and lends it again."""
        mark: torch.cuda.Event = self.watch.mark(torch.cuda.Event)
        mark.record()
        return mark

    @contextmanager
    def naming(self, peers: Sequence[int], what: str) -> Iterator[None]:
        """torch.distributed says what broke, we say who."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.watch.check()  # given up by the watch in the meantime: it knows more
            raise PeerTimeout(
                f"rank {self.rank} lost {self.watch.blame(_each(peers))} in {what}: {_line(error)}"
            ) from error

    def _give_up(self) -> None:
        """Frees this rank's host and device from what they wait for; on the watch's thread."""
        if self._stream is not None and dist.is_initialized():
            # The communicator's kernels end; whoever stands at the device goes on.
            dist.distributed_c10d._abort_process_group()


class Exchange:
    """A started exchange of a GroupTransport; keeps its tensors alive until it was waited for."""

    def __init__(
        self,
        transport: GroupTransport,
        step: int,
        messages: Sequence[Message],
        posted: Sequence[Posted],
    ) -> None:
        self._transport, self._step = transport, step
        self._messages, self._posted = messages, posted

    def wait(self) -> None:
        transport = self._transport
        with transport.exposure.waiting(self._step):
            works = []
            for posted in self._posted:
                if isinstance(posted, Watched):
                    for mark in posted.done:  # this exchange alone: later ones may go on
                        torch.cuda.current_stream(transport.device).wait_event(mark)
                    posted.waited = True
                else:
                    works.append(posted)
            self._wait(works)
        self._messages, self._posted = (), ()

    def _wait(self, works: Sequence[Work]) -> None:
        """Blocks the host; all works together have the transport's timeout."""
        transport = self._transport
        entered = time.perf_counter()
        for work, peer in works:
            left_s = transport.watch.timeout_s - (time.perf_counter() - entered)
            with transport.naming((peer,), "an exchange"), transport.watch.waiting((peer,)):
                work.wait(timedelta(seconds=max(left_s, 1e-3)))
        transport.exchange_s += time.perf_counter() - entered


def _each(peers: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(peers))


def _line(error: BaseException) -> str:
    """What happened, without gloo's place in its source and its advice."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S*\] ", "", text).split(". This is typically")[0]
