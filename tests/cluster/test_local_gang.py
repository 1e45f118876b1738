"""A gang of loopback ranks, with ranks that do next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.errors import RankLost, StoreError

SPEC = GangSpec(world_size=3, model=ModelSpec(name="none"), timeout_s=5.0)


class ToyRank:
    """Answers with what it was asked."""

    def __init__(self, rank: int, spec: GangSpec) -> None:
        self.rank, self.items, self.closed = rank, 0, False

    def start(self, world: Any) -> str:
        return f"rank {self.rank} ready"

    def double(self, x: int) -> int:
        return 2 * x + self.rank

    def fail(self, who: int, error: Exception) -> None:
        if self.rank == who:
            raise error

    def count(self, stop: int) -> Iterator[int]:
        try:
            for i in range(stop):
                self.items = i
                yield i if self.rank == 0 else -1
        finally:
            self.closed = True

    def seen(self) -> tuple[int, bool]:
        return self.items, self.closed

    def stop(self) -> None:
        pass


@pytest.fixture
def gang() -> Iterator[LocalGang]:
    with LocalGang(SPEC, rank_class=ToyRank) as gang:
        yield gang


def test_every_rank_is_called_and_answers_in_rank_order(gang: LocalGang) -> None:
    assert gang.ready == ("rank 0 ready", "rank 1 ready", "rank 2 ready")  # type: ignore[comparison-overlap]
    assert gang.call("double", 5, timeout_s=5, what="doubling") == [10, 11, 12]


def test_calls_run_in_the_order_in_which_they_were_submitted(gang: LocalGang) -> None:
    pending = [gang.submit("double", x, what="doubling") for x in range(4)]
    assert [p.result(5)[0] for p in pending] == [0, 2, 4, 6]


def test_a_stream_gives_rank_0s_items(gang: LocalGang) -> None:
    items: list[Any] = list(gang.stream("count", 5, timeout_s=5, what="counting"))
    assert items == [0, 1, 2, 3, 4]
    assert gang.call("seen", timeout_s=5, what="looking") == [(4, True)] * 3


def test_a_stream_left_early_ends_at_the_same_item_on_every_rank(gang: LocalGang) -> None:
    stream = gang.stream("count", 1000, timeout_s=5, what="counting")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    seen = gang.call("seen", timeout_s=5, what="looking")
    assert len(set(seen)) == 1
    assert seen[0][0] <= 2
    assert seen[0][1]


def test_a_failing_rank_is_named_and_ends_the_gang(gang: LocalGang) -> None:
    with pytest.raises(RankLost, match=r"rank 1 \(host .*, pid \d+\) failed in chunk 3: Value"):
        gang.call("fail", 1, ValueError("no"), timeout_s=5, what="chunk 3")
    assert gang.lost
    with pytest.raises(RankLost, match="chunk 4: the gang has lost a rank"):
        gang.call("double", 1, timeout_s=5, what="chunk 4")


def test_a_full_disk_leaves_the_gang_alive(gang: LocalGang) -> None:
    with pytest.raises(StoreError, match=r"rank 2 .* in saving: disk full"):
        gang.call("fail", 2, StoreError("disk full"), timeout_s=5, what="saving")
    assert gang.call("double", 1, timeout_s=5, what="doubling") == [2, 3, 4]


def test_an_error_in_a_stream_ends_it(gang: LocalGang) -> None:
    with pytest.raises(RankLost, match="TypeError"):
        list(gang.stream("count", "x", timeout_s=5, what="counting"))


def test_a_gang_may_be_closed_twice(gang: LocalGang) -> None:
    gang.close()
    gang.close()
    assert gang.lost
