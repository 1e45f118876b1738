"""Waits that last too long: noticed, told to the others, and blamed on the rank that is silent.

A host wait ends by its own timeout, an exchange between GPUs never does: the host only enqueues
it, and would stand for ever at the next synchronize. So a thread looks at both. An exchange is
overdue when it could begin `timeout_s` ago (its `began` event is done) and is not done: how far the
host ran ahead does not count. Then `lost` is set, and `give_up` is called to free whoever is
blocked, until nothing is.

Who is silent: a rank whose wait lasts says so in the store, with the ranks it waits for. When a
wait fails, ranks that said nothing are dead or stuck elsewhere, and are named; of a peer that waits
itself, the text says for whom. Nothing is written in a run whose waits are short.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from ringspan.errors import PeerTimeout

GRACE_S = 1.5
"""How long a rank whose wait failed gives the others to say that they wait too."""
LASTS_S = 1.0
"""A wait that lasts this long is told to the others."""
EVERY_ONE = "all"


class Mark(Protocol):
    """What is asked of a device event: whether all before it is done."""

    def query(self) -> bool: ...


@dataclass
class Watched:
    """An exchange that was enqueued, between marks of the streams it runs on."""

    began: Mark
    done: tuple[Mark, ...]
    peers: tuple[int, ...]
    also: tuple[Mark, ...] = ()
    """Marks that the exchange needs for itself."""
    what: str = "an exchange"
    late: Callable[[], Sequence[int]] | None = None
    """Which of the peers are behind, where that can be seen."""
    waited: bool = False
    """The compute stream waits for it: its marks may be reused once they are done."""
    since: float | None = None
    """When `began` was first seen done."""


class Watch:
    """One rank's watch over its waits. The thread starts with the first of them."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        store: dist.Store | None = None,
        give_up: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.lost: str | None = None
        self._store = None if store is None else dist.PrefixStore("waits", store)
        self._give_up, self._clock = give_up, clock
        self._host: tuple[tuple[int, ...], float] | None = None
        self._watched: deque[Watched] = deque()
        self._spare: list[Mark] = []
        self._told: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lasts_s(self) -> float:
        return min(LASTS_S, self.timeout_s / 4)

    def check(self) -> None:
        """Raises PeerTimeout once an exchange was overdue: nothing since then may be used."""
        if self.lost is not None:
            raise PeerTimeout(self.lost)

    @contextmanager
    def waiting(self, peers: Sequence[int]) -> Iterator[None]:
        """Around a wait of the host for any of these ranks."""
        self._start()
        self._host = (tuple(peers), self._clock())
        yield
        self._host = None  # not after an error: what it waited for stays told, for its own peers

    def add(self, watched: Watched) -> Watched:
        self._start()
        with self._lock:
            self._watched.append(watched)
        return watched

    def mark(self, make: Callable[[], Any]) -> Any:
        """A mark that no exchange needs any more, or a new one."""
        with self._lock:
            if not self._spare:
                self._reap()
            return self._spare.pop() if self._spare else make()

    def look(self) -> None:
        """What the thread does, every now and then."""
        now = self._clock()
        with self._lock:
            self._reap()
            open_ = [one for one in self._watched if not _done(one)]
        longest: tuple[tuple[int, ...], float] | None = self._host
        for one in open_:
            if one.since is None and one.began.query():
                one.since = now
            if one.since is None:
                continue
            if longest is None or one.since < longest[1]:
                longest = (one.peers, one.since)
            if now - one.since >= self.timeout_s and self.lost is None:
                self._lose(one, now - one.since)
        if self.lost is not None and open_ and self._give_up is not None:
            self._give_up()
        if longest is None:
            if self._told:
                self._tell("")
        elif now - longest[1] >= self.lasts_s:
            self._tell(_names(longest[0], self.world_size))

    def blame(self, peers: Sequence[int]) -> str:
        """After a wait for these ranks failed: `rank 2`, or `rank 2 (which waits for rank 0)`.

        Takes at most GRACE_S: the others get that long to tell that they wait too.
        """
        found: list[str] = [_ranks(peers)]

        def find() -> None:
            self._tell(_names(tuple(peers), self.world_size))
            others = [r for r in range(self.world_size) if r != self.rank]
            until = time.monotonic() + min(GRACE_S, self.timeout_s)
            while True:
                said = {rank: self._said(rank) for rank in others}
                silent = [rank for rank in others if not said[rank]]
                known = len(silent) <= 1 or (len(peers) == 1 and said[peers[0]])
                if known or time.monotonic() > until - 0.2:
                    break
                time.sleep(0.05)
            if len(peers) == 1:
                waits = said[peers[0]]
                if waits and waits != str(self.rank):
                    found.append(f"{_ranks(peers)} (which waits for {_spoken(waits)})")
            elif any(rank in peers for rank in silent):
                found.append(_ranks([rank for rank in silent if rank in peers]))

        if self._store is not None:
            # Not on this thread: the store's host may itself be the one that hangs.
            thread = threading.Thread(target=_quietly, args=(find,), daemon=True)
            thread.start()
            thread.join(GRACE_S)
        return found[-1]

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _lose(self, one: Watched, waited_s: float) -> None:
        peers: Sequence[int] = one.peers
        if one.late is not None:
            peers = one.late() or peers
        self.lost = (
            f"rank {self.rank} lost {self.blame(peers)} in {one.what}: it could begin "
            f"{waited_s:.1f} s ago and is not done"
        )

    def _reap(self) -> None:
        # Oldest first, and no further than it goes: the host may be hundreds of exchanges ahead.
        while self._watched and self._watched[0].waited and _done(self._watched[0]):
            one = self._watched.popleft()
            self._spare += (one.began, *one.done, *one.also)

    def _tell(self, text: str) -> None:
        if self._store is not None and text != self._told:
            self._store.set(str(self.rank), text)
            self._told = text

    def _said(self, rank: int) -> str:
        assert self._store is not None
        key = str(rank)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(max(0.05, self.lasts_s / 4)):
            _quietly(self.look)


def _done(one: Watched) -> bool:
    return all(mark.query() for mark in one.done)


def _quietly(work: Callable[[], None]) -> None:
    """The store goes away with its host; what is missing then is only the better text."""
    with suppress(RuntimeError, ValueError):
        work()


def _names(peers: Sequence[int], world_size: int) -> str:
    return EVERY_ONE if len(peers) >= world_size - 1 > 1 else ",".join(map(str, peers))


def _spoken(said: str) -> str:
    return "all others" if said == EVERY_ONE else _ranks([int(rank) for rank in said.split(",")])


def _ranks(ranks: Sequence[int]) -> str:
    return "rank " + " or ".join(str(rank) for rank in sorted(set(ranks)))
