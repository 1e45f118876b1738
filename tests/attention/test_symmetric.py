"""The protocol of copy-engine exchanges, on a model of the device: memory, queues, counters.

Ranks share nothing but what they write into each other's slots and counters; a queue runs its
operations in order, and which queue goes on next is random. A put that overwrote what was not
taken, or a take of what had not come, would show in the bytes; a wait never met as a deadlock.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from ringspan.attention.arena import Arena, arena_bytes
from ringspan.attention.group import GroupTransport
from ringspan.attention.lanes import CYCLE, Lanes, Piece, cut, reached
from ringspan.attention.symmetric import Place, SymmetricTransport, _islands
from ringspan.attention.transport import Message
from ringspan.errors import PeerTimeout

Exchange = list[list[tuple[int, bytes]]]
"""For each rank what it sends: (peer, bytes)."""


class Rank:
    """Memory that peers write to, and the queues that write it."""

    def __init__(self, world_size: int, num_slots: int, slot_bytes: int, first: int) -> None:
        self.slots = {
            (src, slot): bytearray(slot_bytes)
            for src in range(world_size)
            for slot in range(num_slots)
        }
        self.freed = dict.fromkeys(range(world_size), first % CYCLE)
        self.arrived = dict.fromkeys(range(world_size), first % CYCLE)
        self.lanes = Lanes(num_slots, slot_bytes)
        self.received: list[list[bytearray]] = []


def exchanges(rng: random.Random, world_size: int, count: int, slot_bytes: int) -> list[Exchange]:
    def some_bytes() -> bytes:
        longest = rng.choice((1, slot_bytes, 5 * slot_bytes))
        return rng.randbytes(rng.randint(0, longest))

    made = []
    for _ in range(count):
        kind = rng.choice(("ring", "all", "some"))
        exchange: Exchange = [[] for _ in range(world_size)]
        hop = rng.randrange(1, world_size)
        for rank in range(world_size):
            peers = [(rank + i) % world_size for i in range(1, world_size)]
            if kind == "ring":
                peers = [(rank + hop) % world_size]
            elif kind == "some":
                peers = [peer for peer in peers if rng.random() < 0.5]
            exchange[rank] = [
                (peer, some_bytes()) for peer in peers for _ in range(rng.randint(1, 3))
            ]
        made.append(exchange)
    return made


def enqueue(me: int, ranks: list[Rank], exchange: Exchange, put: Callable, take: Callable) -> None:
    """One rank's operations of an exchange, through `put` and `take`, each onto some queue."""
    mine = ranks[me]
    sends = exchange[me]
    comes = [(src, len(data)) for src, sent in enumerate(exchange) for to, data in sent if to == me]
    into = [bytearray(size) for _, size in comes]
    mine.received.append(into)
    for step in mine.lanes.steps([(peer, len(data)) for peer, data in sends], comes):
        counters = mine.freed if step.put else mine.arrived
        queue = put if step.put else take
        if step.wait is not None:
            queue(lambda s=step, c=counters: reached(c[s.peer], s.wait))
        for piece in step.pieces:

            def copy(step=step, piece=piece) -> bool:
                at = slice(piece.at, piece.at + piece.stop - piece.start)
                if step.put:
                    data = sends[piece.message][1][piece.start : piece.stop]
                    ranks[step.peer].slots[me, step.slot][at] = data
                else:
                    into[piece.message][piece.start : piece.stop] = mine.slots[
                        step.peer, step.slot
                    ][at]
                return True

            queue(copy)

        def say(step=step) -> bool:
            peer = ranks[step.peer]
            (peer.arrived if step.put else peer.freed)[me] = step.say
            return True

        queue(say)


def run(queues: list[deque], rng: random.Random) -> None:
    while any(queues):
        ready = [queue for queue in queues if queue]
        rng.shuffle(ready)
        for queue in ready:
            if queue[0]():
                queue.popleft()
                break
        else:
            raise AssertionError("deadlock: no queue can go on")


def started_at(ranks: list[Rank], first: int) -> None:
    for rank in ranks:
        for peer in range(len(ranks)):
            rank.lanes._next[True, peer] = rank.lanes._next[False, peer] = first


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("queues", ["two a rank", "one a rank"])
@pytest.mark.parametrize("first", [0, CYCLE - 7], ids=["from-zero", "over-the-end-of-the-counter"])
def test_what_was_sent_arrives_in_any_order_of_the_queues(
    world_size: int, num_slots: int, queues: str, first: int
) -> None:
    slot_bytes = 512
    for seed in range(12):
        rng = random.Random(f"{seed} {world_size} {num_slots}")
        todo = exchanges(rng, world_size, 6, slot_bytes)
        ranks = [Rank(world_size, num_slots, slot_bytes, first) for _ in range(world_size)]
        started_at(ranks, first)
        every: list[deque] = []
        for me in range(world_size):
            puts: deque = deque()
            takes: deque = puts if queues == "one a rank" else deque()
            for exchange in todo:
                enqueue(me, ranks, exchange, puts.append, takes.append)
            every += [puts] if puts is takes else [puts, takes]
        run(every, rng)
        for me, rank in enumerate(ranks):
            for exchange, into in zip(todo, rank.received, strict=True):
                wanted = [data for sent in exchange for to, data in sent if to == me]
                assert [bytes(one) for one in into] == wanted


def test_a_rank_that_stops_stops_only_those_who_need_it() -> None:
    ranks = [Rank(3, 2, 512, 0) for _ in range(3)]
    rng = random.Random(1)
    todo = exchanges(rng, 3, 4, 512)
    todo[0] = [[(1, b"x" * 9000)], [(2, b"y" * 9000)], [(0, b"z" * 9000)]]
    queues = []
    for me in (0, 1):  # rank 2 never starts anything
        puts: deque = deque()
        takes: deque = deque()
        for exchange in todo:
            enqueue(me, ranks, exchange, puts.append, takes.append)
        queues += [puts, takes]
    with pytest.raises(AssertionError, match="deadlock"):
        run(queues, rng)
    assert ranks[1].received[0] == [b"x" * 9000]  # between the living it arrived
    assert all(not any(data) for data in ranks[0].received[0])


SIZES = ([0], [1], [512], [513], [0, 3, 0, 700], [100] * 40, [256, 256, 1], [4096, 1])


@pytest.mark.parametrize("of", SIZES, ids=lambda of: "-".join(map(str, of[:4])))
def test_slots_hold_every_byte_once_aligned_and_in_order(of: list[int]) -> None:
    slots = cut(list(enumerate(of)), 512)
    pieces: list[Piece] = [piece for slot in slots for piece in slot]
    assert all(slots), "an empty slot would be waited for"
    for message, size in enumerate(of):
        mine = [piece for piece in pieces if piece.message == message]
        assert [piece.start for piece in mine] == [0, *(piece.stop for piece in mine[:-1])][
            : len(mine)
        ]
        assert sum(piece.stop - piece.start for piece in mine) == size
    for slot in slots:
        end = 0
        for piece in slot:
            assert piece.at % 256 == piece.start % 256 == 0
            assert end <= piece.at
            end = piece.at + piece.stop - piece.start
            assert end <= 512


def test_counters_compare_around_the_end() -> None:
    assert reached(5, 5)
    assert not reached(4, 5)
    assert reached(2, CYCLE - 3)
    assert not reached(CYCLE - 3, 2)


def test_a_counter_far_ahead_frees_every_wait_so_far() -> None:
    lanes = Lanes(2, 512)
    waits = [
        step.wait
        for _ in range(3)
        for step in lanes.steps([(1, 5000)], [(1, 5000)])
        if step.wait is not None
    ]
    for put in (True, False):
        assert all(reached(lanes.far_ahead(put, 1), wait) for wait in waits)


def test_islands_are_ranks_of_one_host_on_different_gpus() -> None:
    places = [Place("a", "0"), Place("b", "1"), Place("a", "2"), Place("c", "3"), Place("c", "3")]
    assert _islands(places) == [(0, 2)]
    assert _islands([]) == []


class HostMemory:
    """Stream memory operations on the host's memory, at once: a rank is one queue."""

    def wait(self, stream: object, address: int, value: int) -> None:
        deadline = time.monotonic() + 20
        while not reached(ctypes.c_uint32.from_address(address).value, value):
            assert time.monotonic() < deadline, "a wait that nobody meets"
            time.sleep(0)

    def write(self, stream: object, address: int, value: int) -> None:
        ctypes.c_uint32.from_address(address).value = value


class Stream:
    """A CUDA stream or event whose work is done as it is enqueued."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record(self, *stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "Event", "stream", "current_stream", "device"):
        monkeypatch.setattr(torch.cuda, name, Stream)


def transports(world_size: int, num_slots: int, slot_bytes: int) -> list[SymmetricTransport]:
    size = arena_bytes(world_size, num_slots, slot_bytes)
    memory = {rank: torch.zeros(size, dtype=torch.uint8) for rank in range(world_size)}
    ends = []
    for rank in range(world_size):
        group = GroupTransport(rank, world_size, torch.device("cpu"), 20.0)
        end = SymmetricTransport(group, dist.HashStore())
        end._memory = HostMemory()  # type: ignore[assignment]
        end._arena = Arena(rank, memory, num_slots, slot_bytes)
        end._lanes = Lanes(num_slots, slot_bytes)
        ends.append(end)
    return ends


def in_threads(bodies: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(bodies)) as pool:
        for future in [pool.submit(body) for body in bodies]:
            future.result()


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_messages_of_any_dtype_and_size_go_through_the_slots(world_size: int) -> None:
    ends = transports(world_size, 2, 512)

    def tensors(src: int, to: int, turn: int) -> list[torch.Tensor]:
        rng = torch.Generator().manual_seed(100 * turn + 10 * src + to)
        return [
            torch.randn(7 * turn, 3, generator=rng),
            torch.randint(-9, 9, (turn, 100 + src), generator=rng, dtype=torch.int8),
            torch.randn(0, 5),
            torch.randn(1 + to, 90, generator=rng).to(torch.bfloat16),
        ]

    def body(end: SymmetricTransport) -> None:
        others = [(end.rank + i) % world_size for i in range(1, world_size)]
        for turn in range(6):
            into = {
                src: list(map(torch.zeros_like, tensors(src, end.rank, turn))) for src in others
            }
            sent = [Message(t, to) for to in others for t in tensors(end.rank, to, turn)]
            end.start(sent, [Message(t, src) for src in others for t in into[src]]).wait()
            for src in others:
                for got, wanted in zip(into[src], tensors(src, end.rank, turn), strict=True):
                    assert torch.equal(got, wanted)

    in_threads([lambda end=end: body(end) for end in ends])  # type: ignore[misc]
    for end in ends:
        end.watch.check()
        end.watch.close()


@pytest.mark.usefixtures("on_host")
def test_giving_up_frees_the_waits_and_tells_the_peers() -> None:
    zero, one = transports(2, 2, 512)
    into = torch.zeros(4000, dtype=torch.uint8)
    assert zero._arena is not None
    waiting = threading.Thread(target=lambda: zero.start([], [Message(into, 1)]).wait())
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert one._arena is not None
    assert one._arena.counters(Stream())[-1] == 0  # type: ignore[arg-type]
    steps = Lanes(2, 512).steps([], [(1, 4000)])
    assert zero._late(steps) == [1]
    zero._give_up()
    waiting.join(5)
    assert not waiting.is_alive()
    with pytest.raises(PeerTimeout, match="rank 1: rank 0 gave up on an exchange"):
        one.synchronize()
    for end in (zero, one):
        end.watch.close()
