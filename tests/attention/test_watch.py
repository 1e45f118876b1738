"""The watch over waits, with marks and a clock that the test moves."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from ringspan.attention.watch import Watch, Watched
from ringspan.errors import PeerTimeout


class Mark:
    def __init__(self, done: bool = False) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watch(clock: Clock, rank: int = 0, store: dist.Store | None = None, **more: object) -> Watch:
    made = Watch(rank, 3, 8.0, store, clock=clock, **more)  # type: ignore[arg-type]
    made._thread = object()  # type: ignore[assignment]  # no thread: the test looks itself
    return made


def test_an_exchange_is_overdue_from_when_it_could_begin() -> None:
    clock, freed = Clock(), []
    seen = watch(clock, give_up=lambda: freed.append(clock.now))
    began, done = Mark(), Mark()
    seen.add(Watched(began, (done,), (2,)))
    clock.now += 1000.0  # the host ran far ahead of the device
    seen.look()
    seen.check()
    began.done = True
    seen.look()
    clock.now += 7.9
    seen.look()
    seen.check()
    assert not freed
    clock.now += 0.2
    seen.look()
    assert freed
    with pytest.raises(PeerTimeout, match=r"rank 0 lost rank 2 in an exchange: .* 8\.1 s ago"):
        seen.check()


def test_only_the_peers_that_are_behind_are_named() -> None:
    clock = Clock()
    seen = watch(clock)
    seen.add(Watched(Mark(True), (Mark(),), (1, 2), late=lambda: [1]))
    seen.look()
    clock.now += 9.0
    seen.look()
    with pytest.raises(PeerTimeout, match="lost rank 1 in an exchange"):
        seen.check()


def test_an_exchange_in_time_is_forgotten_and_its_marks_are_lent_again() -> None:
    clock = Clock()
    seen = watch(clock)
    began, one, other, ready = Mark(True), Mark(), Mark(True), Mark(True)
    watched = seen.add(Watched(began, (one, other), (1,), (ready,)))
    seen.look()
    assert seen.mark(lambda: "new") == "new"
    one.done = True
    seen.look()
    assert seen.mark(lambda: "new") == "new", "the compute stream does not wait for it yet"
    watched.waited = True
    clock.now += 100.0
    seen.look()
    seen.check()
    lent = {id(seen.mark(lambda: "new")) for _ in range(4)}
    assert lent == {id(mark) for mark in (began, one, other, ready)}
    assert seen.mark(lambda: "new") == "new"


def test_a_wait_that_lasts_is_told_and_taken_back() -> None:
    clock, store = Clock(), dist.HashStore()
    seen, other = watch(clock, 0, store), watch(clock, 1, store)
    with seen.waiting((2,)):
        clock.now += 0.5
        seen.look()
        assert other._said(0) == ""
        clock.now += 0.6
        seen.look()
        assert other._said(0) == "2"
    seen.look()
    assert other._said(0) == ""


def test_the_silent_one_of_several_is_blamed() -> None:
    clock, store = Clock(), dist.HashStore()
    zero, one = watch(clock, 0, store), watch(clock, 1, store)
    with pytest.raises(ValueError, match="stop"), one.waiting((0, 2)):
        raise ValueError("stop")
    clock.now += 1.0
    one.look()  # what it waited for when it failed is still told
    assert zero.blame((1, 2)) == "rank 2"
    assert zero.blame((1,)) == "rank 1 (which waits for all others)"
    assert one.blame((0,)) == "rank 0", "that it waits for us is no news"


def test_blame_ends_soon_though_the_store_hangs() -> None:
    class Hanging(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            time.sleep(30)

    zero = watch(Clock(), 0, None)
    zero._store = Hanging()  # type: ignore[assignment]
    began = time.monotonic()
    assert zero.blame((1, 2)) == "rank 1 or 2"
    assert time.monotonic() - began < 2.0
