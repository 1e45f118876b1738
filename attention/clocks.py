"""Ranks' programs played against clocks, an event at a time. No threads, no data.

    compute    kernels of a rank follow one another; one begins no earlier than its host launched it
    exchange   begins when both sides have posted it and neither side's link is busy in that
               direction; occupies both for bytes / bandwidth, has arrived a latency later
    wait       moves the rank to the last arrival; what it moves is exposed time

Ranks that share one device (`Link.shared_device`, loopback) have one host and one compute clock
between them, take turns where they wait for a peer that has not posted, and exchange by copies.
One set of programs has one result: ties go to the lower rank.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ringspan.attention.cost import Link
from ringspan.errors import PeerTimeout


class Event(NamedTuple):
    """What happened on the simulated clock. what: dense (before the layer), attend, merge, decode,
    copy; send, wait."""

    rank: int
    what: str
    begin_s: float
    end_s: float
    step: int
    """Of the scheme: the exchange's own, for computing the last one waited for."""
    num_bytes: int = 0
    peer: int = -1


class Simulated(NamedTuple):
    """One layer's attention; all per rank."""

    rank_s: tuple[float, ...]
    """When each rank was done; on a shared device when it had launched all, the last one is it."""
    host_s: tuple[float, ...]
    """That its host spent on calls."""
    exposed_s: tuple[tuple[float, ...], ...]
    """By step: how long computing stood still for an exchange."""
    sent_bytes: tuple[int, ...]
    buffer_bytes: tuple[int, ...]
    """Leased: receive buffers and staging memory."""
    trace: tuple[Event, ...]

    @property
    def seconds(self) -> float:
        return max(self.rank_s)

    @property
    def total_exposed_s(self) -> float:
        """Of the rank that stood still longest."""
        return max(sum(steps) for steps in self.exposed_s)


class Work(NamedTuple):
    what: str
    device_s: float
    host_s: float
    num_bytes: int


class Start(NamedTuple):
    exchange: int
    step: int
    sends: tuple[tuple[int, int], ...]
    """(peer, bytes); messages to one peer are one transfer."""
    recvs: tuple[tuple[int, int], ...]


class Wait(NamedTuple):
    exchange: int


Op = Work | Start | Wait


@dataclass(frozen=True)
class Played:
    """What is played: a program a rank, empty for one that is dead."""

    programs: Sequence[Sequence[Op]]
    link: Link
    timeout_s: float
    dead: frozenset[int] = frozenset()

    def play(self) -> Simulated:
        """Raises PeerTimeout, as the ranks would, where one waits for a peer too long."""
        return (SharedClock if self.link.shared_device else Clocks)(self).play()


class _Transfer:
    """One exchange's bytes from one rank to another; times are None before they are known."""

    __slots__ = ("arrived_s", "dst", "num_bytes", "posted_s", "received_s", "src", "step")

    def __init__(self, src: int, dst: int, num_bytes: int) -> None:
        self.src, self.dst, self.num_bytes, self.step = src, dst, num_bytes, 0
        self.posted_s: float | None = None
        self.received_s: float | None = None
        """When the receiver was ready for it."""
        self.arrived_s: float | None = None


class _Player:
    """Common to both kinds of clocks: programs, and the matching of sends with receives."""

    def __init__(self, played: Played) -> None:
        size = len(played.programs)
        self.played, self.programs, self.link = played, played.programs, played.link
        self.at = [0] * size
        """Of each rank's program, which operation is next."""
        self.host = [0.0] * size
        self.step = [0] * size
        self.exposed: list[dict[int, float]] = [{} for _ in range(size)]
        self.sent_bytes = [0] * size
        self.events: list[Event] = []
        self.unmatched: dict[tuple[int, int, bool], deque[_Transfer]] = {}
        """Of a pair of ranks, in order: those that only the sender (True) has posted, or only the
        receiver."""
        self.open: list[dict[int, tuple[int, list[_Transfer], list[_Transfer]]]] = [
            {} for _ in range(size)
        ]
        """By exchange: its step, what comes, what goes."""

    def post(self, rank: int, op: Start, now: float) -> tuple[list[_Transfer], list[_Transfer]]:
        """What comes and what goes."""
        coming = [self._match(peer, rank, num_bytes, False) for peer, num_bytes in op.recvs]
        going = [self._match(rank, peer, num_bytes, True) for peer, num_bytes in op.sends]
        for one in coming:
            one.received_s = now
        for one in going:
            one.posted_s, one.step = now, op.step
            self.sent_bytes[rank] += one.num_bytes
        self.open[rank][op.exchange] = (op.step, coming, going)
        return coming, going

    def _match(self, src: int, dst: int, num_bytes: int, sending: bool) -> _Transfer:
        """Messages of one pair match in order."""
        theirs = self.unmatched.get((src, dst, not sending))
        if theirs:
            one = theirs.popleft()
            if one.num_bytes != num_bytes:
                sent, wanted = (num_bytes, one.num_bytes)[:: 1 if sending else -1]
                raise ValueError(
                    f"rank {dst} expected {wanted} bytes of rank {src}, which sent {sent}"
                )
            return one
        one = _Transfer(src, dst, num_bytes)
        self.unmatched.setdefault((src, dst, sending), deque()).append(one)
        return one

    def expose(self, rank: int, step: int, begin: float, end: float) -> None:
        self.exposed[rank][step] = self.exposed[rank].get(step, 0.0) + max(0.0, end - begin)
        self.step[rank] = step
        if end > begin:
            self.events.append(Event(rank, "wait", begin, end, step))

    def silent(self, rank: int, peer: int) -> PeerTimeout:
        why = ", which is dead" if peer in self.played.dead else ""
        return PeerTimeout(
            f"rank {rank} waited {self.played.timeout_s:.1f} s for rank {peer}{why} (simulated)"
        )

    def result(self, rank_s: Sequence[float]) -> Simulated:
        return Simulated(
            tuple(rank_s),
            tuple(self.host),
            tuple(
                tuple(steps.get(step, 0.0) for step in range(max(steps, default=-1) + 1))
                for steps in self.exposed
            ),
            tuple(self.sent_bytes),
            (0,) * len(self.at),
            tuple(sorted(self.events, key=lambda event: (event.begin_s, event.end_s, event[:2]))),
        )


class Clocks(_Player):
    """Each rank has a device and a host; each rank's link sends and receives one at a time."""

    def __init__(self, played: Played) -> None:
        super().__init__(played)
        size = len(played.programs)
        self.device = [0.0] * size
        self.egress, self.ingress = [0.0] * size, [0.0] * size
        self.queues: list[deque[_Transfer]] = [deque() for _ in range(size)]
        self.ready: list[tuple[float, int]] = []
        """Heap of (earliest begin as far as known, sender) of transfers that both sides posted."""
        self.blocked: dict[int, list[_Transfer]] = {}

    def play(self) -> Simulated:
        """Always what comes first: a rank that can go on, or a transfer that can begin. So no
        transfer begins before one that was posted earlier had its chance."""
        going = [(0.0, rank) for rank, program in enumerate(self.programs) if program]
        while going or self.ready:
            if self.ready and (not going or self.ready[0][0] <= going[0][0]):
                freed = self._transfer()
            else:
                rank = heapq.heappop(going)[1]
                freed = [rank] if self._run(rank) else []
            for rank in freed:
                heapq.heappush(going, (self.device[rank], rank))
        if self.blocked:
            rank = min(self.blocked)
            raise self.silent(rank, self._culprit(rank))
        return self.result(self.device)

    def _run(self, rank: int) -> bool:
        """Until something is posted or waited for; whether the rank can go on from there."""
        program = self.programs[rank]
        while self.at[rank] < len(program):
            op = program[self.at[rank]]
            if isinstance(op, Wait):
                _, coming, going = self.open[rank][op.exchange]
                missing = [one for one in (*coming, *going) if one.arrived_s is None]
                if missing:
                    self.blocked[rank] = missing
                    return False
                self._end(rank, op)
                self.at[rank] += 1
                return True
            self.at[rank] += 1
            self.host[rank] += self.link.call_s if isinstance(op, Start) else op.host_s
            begin = max(self.device[rank], self.host[rank])
            if isinstance(op, Start):
                self.device[rank] = begin
                self._post(rank, op)
                return True
            self.device[rank] = end = begin + op.device_s
            step = self.step[rank]
            self.events.append(Event(rank, op.what, begin, end, step, op.num_bytes))
        return False

    def _post(self, rank: int, op: Start) -> None:
        coming, going = self.post(rank, op, self.device[rank])
        first = not self.queues[rank]
        self.queues[rank] += going
        if first and going:
            self._offer(rank)
        for one in coming:
            if self.queues[one.src] and self.queues[one.src][0] is one:
                self._offer(one.src)

    def _end(self, rank: int, op: Wait) -> None:
        """All of an exchange that the rank waits for has arrived, some of it maybe too late."""
        step, coming, going = self.open[rank].pop(op.exchange)
        begin = end = self.device[rank]
        for one in (*coming, *going):
            arrived_s = one.arrived_s or 0.0
            if arrived_s - begin > self.played.timeout_s:
                raise self.silent(rank, one.dst if one.src == rank else one.src)
            end = max(end, arrived_s)
        self.device[rank] = end
        self.expose(rank, step, begin, end)

    def _offer(self, src: int) -> None:
        """The first transfer in src's queue, if the receiver is ready for it."""
        one = self.queues[src][0]
        if one.received_s is not None:
            heapq.heappush(self.ready, (self._begin(one), src))

    def _begin(self, one: _Transfer) -> float:
        posted = max(one.posted_s or 0.0, one.received_s or 0.0)
        return max(posted, self.egress[one.src], self.ingress[one.dst])

    def _transfer(self) -> list[int]:
        """The first transfer of the heap, unless its link was taken meanwhile; the ranks that
        waited for nothing else."""
        begin, src = heapq.heappop(self.ready)
        one = self.queues[src][0]
        now = self._begin(one)
        if now > begin:
            heapq.heappush(self.ready, (now, src))
            return []
        end = begin + one.num_bytes / self.link.bytes_per_s
        self.egress[src] = self.ingress[one.dst] = end
        one.arrived_s = end + self.link.latency_s
        self.events.append(
            Event(src, "send", begin, one.arrived_s, one.step, one.num_bytes, one.dst)
        )
        self.queues[src].popleft()
        if self.queues[src]:
            self._offer(src)
        freed = []
        for rank in (one.dst, src):
            missing = self.blocked.get(rank, [])
            if one in missing:
                missing.remove(one)
                if not missing:
                    del self.blocked[rank]
                    freed.append(rank)
        return freed

    def _culprit(self, rank: int) -> int:
        """Whoever waits for somebody who waits is not the one to blame."""
        seen: set[int] = set()
        while rank in self.blocked and rank not in seen:
            seen.add(rank)
            one = self.blocked[rank][0]
            rank = one.dst if one.src == rank else one.src
        return rank


class SharedClock(_Player):
    """Ranks take turns on one device: one host, one compute stream, copies beside it."""

    def __init__(self, played: Played) -> None:
        super().__init__(played)
        self.now = self.device = self.copies = 0.0

    def play(self) -> Simulated:
        programs, ranks = self.programs, range(len(self.at))
        while any(self.at[rank] < len(programs[rank]) for rank in ranks):
            before = list(self.at)
            for rank in ranks:
                while self.at[rank] < len(programs[rank]) and self._run(rank):
                    self.at[rank] += 1
            if self.at == before:
                self._stuck()
        return self.result([max(self.device, self.now)] * len(self.at))

    def _run(self, rank: int) -> bool:
        """One operation, if it can be done now."""
        op = self.programs[rank][self.at[rank]]
        if isinstance(op, Wait):
            return self._wait(rank, op)
        host_s = self.link.call_s if isinstance(op, Start) else op.host_s
        self.now += host_s
        self.host[rank] += host_s
        begin = max(self.device, self.now)
        if isinstance(op, Start):
            self.post(rank, op, begin)
        else:
            self.device = begin + op.device_s
            step = self.step[rank]
            self.events.append(Event(rank, op.what, begin, self.device, step, op.num_bytes))
        return True

    def _wait(self, rank: int, op: Wait) -> bool:
        step, coming, going = self.open[rank][op.exchange]
        if any(one.posted_s is None for one in coming):
            return False
        begin = max(self.device, self.now)
        for one in coming:
            if one.arrived_s is None:
                self._copy(one)
        if any(one.arrived_s is None for one in going):
            return False  # the receiver copies, when it waits
        del self.open[rank][op.exchange]
        self.device = max([begin, self.device, *(one.arrived_s or 0.0 for one in coming + going)])
        self.expose(rank, step, begin, self.device)
        return True

    def _copy(self, one: _Transfer) -> None:
        posted = max(one.posted_s or 0.0, one.received_s or 0.0)
        beside = max(posted, self.copies, self.now)
        begin = beside if self.link.overlaps else max(beside, self.device)
        self.copies = one.arrived_s = begin + self.link.seconds(one.num_bytes)
        if not self.link.overlaps:
            self.device = one.arrived_s
        self.events.append(
            Event(one.src, "send", begin, one.arrived_s, one.step, one.num_bytes, one.dst)
        )

    def _stuck(self) -> None:
        """Blames whoever has come to its end, or never began, and is waited for."""
        for rank, waits in enumerate(self.open):
            for _, coming, going in waits.values():
                for one in (*coming, *going):
                    peer = one.dst if one.src == rank else one.src
                    if self.at[peer] == len(self.programs[peer]):
                        raise self.silent(rank, peer)
        raise self.silent(0, 0)
