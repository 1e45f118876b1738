"""Transport between GPUs of one host: exchanges are copy-engine copies, no SM is used.

A message goes to slots in the peer's memory, and from there to where it belongs; two counters for
each pair of ranks say which slots are filled and which are free (attention/lanes.py).

Waiting and telling are stream memory operations of the CUDA driver, in the streams of the copies:
the host never blocks, and no kernel spins on an SM that attention wants.

Slots and not the receive buffers themselves: these lie at other offsets on every rank and grow when
that rank needs it, which the others cannot know; addresses would have to be told for each message.
The copy out of a slot reads and writes its bytes once more in local memory, whose bandwidth an
attention bound by arithmetic leaves idle.

Everything else is the process group's: collectives, and exchanges with ranks on other hosts. Never
multicast. Only where it is asked for (`--transport copy-engine`): its protocol is tested, and it
tries itself when it joins, but it has not been measured on several GPUs; until then `auto` is NCCL.

Sources: copies instead of kernels over symmetric memory, the low-contention collectives of
torch.distributed._symmetric_memory; stream memory operations,
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ringspan.attention.arena import Arena, Island, StreamMemory, shared_arena
from ringspan.attention.group import GroupTransport, Posted
from ringspan.attention.lanes import NUM_SLOTS, SLOT_BYTES, Lanes, Step, reached
from ringspan.attention.transport import Message, as_bytes
from ringspan.attention.watch import Watched

COPY_ENGINE = "copy-engine"
"""The name it is asked for by."""
TRY_S = 20.0
"""For the exchange that proves the transport when it joins."""
log = logging.getLogger(__name__)


def with_copy_engine(group: GroupTransport, store: dist.Store) -> GroupTransport:
    """A transport of the same ranks that uses copy engines between those that share a host, or
    `group` itself, with a line in the log, where that does not work; all ranks call it, and get the
    same. Multicast stays off.

    Decided by trying: memory is shared, and an exchange of odd sizes arrives as it was sent.
    """
    places = _places(group, store) if group.device.type == "cuda" else []
    islands = _islands(places)
    if not islands:
        log.warning("rank %d exchanges through %s: no GPUs on one host", group.rank, group.name)
        return group
    joined = SymmetricTransport(group, store)
    steps: tuple[Callable[[], None], ...] = (
        lambda: joined.share(_island_of(islands, group), places),
        joined.prove,
    )
    for step in steps:
        why = _tried(step)
        if not _all_agree(group, why is None):
            log.warning(
                "rank %d exchanges through %s, not by copy engines: %s",
                group.rank,
                group.name,
                why or "they do not work on another rank, whose log says why",
            )
            joined.withdraw()
            return group
    group.watch.close()
    return joined


class SymmetricTransport(GroupTransport):
    """Made by `with_copy_engine`."""

    def __init__(self, group: GroupTransport, store: dist.Store) -> None:
        super().__init__(group.rank, group.world_size, group.device, group.watch.timeout_s, store)
        # Above the kernels' priority: such streams do not share hardware queues with them.
        self._puts, self._takes, self._aside = (
            torch.cuda.Stream(group.device, priority=-1) for _ in range(3)
        )
        self._lanes = Lanes()
        self._arena: Arena | None = None

    @property
    def name(self) -> str:
        return f"nccl+{COPY_ENGINE}"

    def share(self, island: Island | None, places: Sequence[Place]) -> None:
        """Memory shared with the ranks of this host, where there are any. Raises RuntimeError where
        the GPUs cannot reach each other's memory."""
        if island is None:
            return
        self._memory = StreamMemory()
        _check_peer_access(self.device, [places[rank].board for rank in island.ranks])
        self._arena = shared_arena(self.rank, island, self.device)

    def prove(self) -> None:
        """An exchange with every peer at once, of odd sizes and of more than all slots."""
        if self._arena is None:
            return
        sizes = (1, 4099, NUM_SLOTS * SLOT_BYTES + 12345)
        peers = self._arena.peers
        sent = [_pattern(self.rank, size, self.device) for size in sizes]
        came = [[torch.zeros_like(one) for one in sent] for _ in peers]
        watched = self._copy(
            [Message(one, peer) for peer in peers for one in sent],
            [Message(one, peer) for peer, of in zip(peers, came, strict=True) for one in of],
        )
        until = time.monotonic() + TRY_S
        while not all(mark.query() for mark in watched.done):
            if time.monotonic() > until:
                raise RuntimeError(f"an exchange did not arrive within {TRY_S:g} s")
            time.sleep(1e-3)
        watched.waited = True
        for peer, of in zip(peers, came, strict=True):
            for one, size in zip(of, sizes, strict=True):
                if not torch.equal(one, _pattern(peer, size, self.device)):
                    raise RuntimeError(f"{size} bytes of rank {peer} did not arrive as sent")

    def synchronize(self) -> None:
        super().synchronize()
        if self._arena is not None and (quitter := self._arena.counters(self._aside)[-1]):
            self.watch.lost = (
                f"rank {self.rank}: rank {quitter - 1} gave up on an exchange, what it sent since "
                "then is not to be used"
            )
            self.watch.check()

    def withdraw(self) -> None:
        """It is not used after all: frees what waits, stops watching; the group stays."""
        if self._arena is not None:
            self._release()
            torch.cuda.synchronize(self.device)
            self._arena = None
        self.watch.close()

    def close(self) -> None:
        if self._arena is not None:
            if self.watch.lost is None:
                torch.cuda.synchronize(self.device)
            self._arena = None
        super().close()

    def _post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> tuple[Posted, ...]:
        near = () if self._arena is None else self._arena.peers
        far = super()._post(
            [m for m in sends if m.peer not in near], [m for m in recvs if m.peer not in near]
        )
        sends = [m for m in sends if m.peer in near and m.tensor.numel()]
        recvs = [m for m in recvs if m.peer in near and m.tensor.numel()]
        return (*far, self._copy(sends, recvs)) if sends or recvs else far

    def _copy(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Watched:
        """Enqueues the exchange; the tensors must stay until it was waited for."""
        arena = self._arena
        assert arena is not None
        steps = self._lanes.steps(
            [(m.peer, m.tensor.nbytes) for m in sends], [(m.peer, m.tensor.nbytes) for m in recvs]
        )
        outgoing = [as_bytes(m.tensor) for m in sends]
        incoming = [as_bytes(m.tensor) for m in recvs]
        ready = self._mark()
        for stream in (self._puts, self._takes):
            stream.wait_event(ready)
        with torch.cuda.stream(self._takes):
            began = self._mark()
        for step in steps:
            stream = self._puts if step.put else self._takes
            if step.wait is not None:
                self._memory.wait(stream, arena.counter(self.rank, step.put, step.peer), step.wait)
            with torch.cuda.stream(stream):
                if step.put:
                    slot = arena.slot(step.peer, self.rank, step.slot)
                    for message, start, stop, at in step.pieces:
                        piece = slot[at : at + stop - start]
                        piece.copy_(outgoing[message][start:stop], non_blocking=True)
                else:
                    slot = arena.slot(self.rank, step.peer, step.slot)
                    for message, start, stop, at in step.pieces:
                        piece = slot[at : at + stop - start]
                        incoming[message][start:stop].copy_(piece, non_blocking=True)
            self._memory.write(stream, arena.counter(step.peer, not step.put, self.rank), step.say)
        marks = []
        for stream in (self._puts, self._takes):
            with torch.cuda.stream(stream):
                marks.append(self._mark())
        peers = tuple(dict.fromkeys(step.peer for step in steps))
        return self.watch.add(
            Watched(began, tuple(marks), peers, (ready,), late=lambda: self._late(steps))
        )

    def _late(self, steps: Sequence[Step]) -> list[int]:
        """The peers whose counters are behind what these steps wait for."""
        arena = self._arena
        assert arena is not None
        with torch.cuda.device(self.device):
            counters = arena.counters(self._aside)
        late = [
            step.peer
            for step in steps
            if step.wait is not None
            and not reached(counters[arena.index(step.put, step.peer)], step.wait)
        ]
        return list(dict.fromkeys(late))

    def _give_up(self) -> None:
        with torch.cuda.device(self.device):
            self._release()
        super()._give_up()

    def _release(self) -> None:
        """Lets everything that waits go on, so that this process can.

        What is then copied may be anything, so the peers are told first: their next `synchronize`
        refuses what they have.
        """
        arena = self._arena
        if arena is None:
            return
        for peer in arena.peers:
            self._memory.write(self._aside, arena.quitter(peer), self.rank + 1)
        self._aside.synchronize()
        for peer in arena.peers:
            for put in (True, False):
                far_ahead = self._lanes.far_ahead(put, peer)
                self._memory.write(self._aside, arena.counter(self.rank, put, peer), far_ahead)
        self._aside.synchronize()


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    """The same for ranks of one running system."""
    board: str
    """The GPU's UUID."""


def _places(group: GroupTransport, store: dist.Store) -> list[Place]:
    """Of every rank."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    board = torch.cuda.get_device_properties(group.device).uuid
    store.set(f"copy-engine/{group.rank}", f"{socket.gethostname()} {boot}|{board}")
    told = [store.get(f"copy-engine/{rank}").decode() for rank in range(group.world_size)]
    return [Place(*one.rsplit("|", 1)) for one in told]


def _islands(places: Sequence[Place]) -> list[tuple[int, ...]]:
    """The ranks of each host that has several GPUs of the gang. Ranks that share a GPU have no
    copy engine between them: their host is none of these."""
    islands = []
    for host in dict.fromkeys(place.host for place in places):
        ranks = tuple(rank for rank, place in enumerate(places) if place.host == host)
        if len(ranks) > 1 and len({places[rank].board for rank in ranks}) == len(ranks):
            islands.append(ranks)
    return islands


def _island_of(islands: Sequence[tuple[int, ...]], group: GroupTransport) -> Island | None:
    """This rank's; None if it is on none. All ranks call it: making a group is a collective."""
    mine = None
    for ranks in islands:
        whole = len(ranks) == group.world_size
        made = dist.group.WORLD if whole else dist.new_group(list(ranks), backend="gloo")
        if group.rank in ranks:
            assert isinstance(made, dist.ProcessGroup)
            mine = Island(ranks, str(made.group_name))
    return mine


def _check_peer_access(device: torch.device, boards: Sequence[str]) -> None:
    """Of this GPU to the others that this process sees; the rest shows when memory is shared."""
    for other in range(torch.cuda.device_count()):
        board = str(torch.cuda.get_device_properties(other).uuid)
        if other == device.index or board not in boards:
            continue
        if not torch.cuda.can_device_access_peer(device, other):
            raise RuntimeError(f"{device} has no access to the memory of cuda:{other}")


def _tried(step: Callable[[], None]) -> str | None:
    """None if it worked, else why not."""
    try:
        step()
    except (RuntimeError, OSError, AttributeError, ImportError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return None


def _all_agree(group: GroupTransport, well: bool) -> bool:
    answer = torch.tensor([int(well)], device=group.device)
    return bool(group.all_gather(answer).min().item())


def _pattern(rank: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes that tell their rank and their place."""
    at = torch.arange(num_bytes, device=device)
    return ((at * 7 + (at >> 8) + 31 * rank) % 251).to(torch.uint8)
