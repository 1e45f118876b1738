"""A gang of real Ray actors, with ranks that do next to nothing: calls, streams, deaths, hangs."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import ray
import torch
from ray.cloudpickle import register_pickle_by_value
from ray.util import placement_group_table

from ringspan.attention.models.load import load_model
from ringspan.cluster.controller import Controller
from ringspan.cluster.events import (
    PauseEvent,
    PrefillPaused,
    PrefillProgress,
    PrefillResumed,
)
from ringspan.cluster.gang import Gang
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec, PrefillPlan
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.ray_cluster import connect
from ringspan.cluster.ray_gang import RayGang
from ringspan.errors import PeerTimeout, RankLost, StoreError, TooLarge, UnknownName
from ringspan.kvstore.folder import Store

pytestmark = pytest.mark.ray

register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with connect(num_cpus=4):
        yield


class ToyRank:
    """Does what it is told to, slowly or badly if need be."""

    def __init__(self, rank: int, spec: GangSpec) -> None:
        self.rank, self.items, self.closed = rank, 0, False
        self.threads = (spec.threads, os.environ["OMP_NUM_THREADS"])

    def host_store(self, address: str = "") -> tuple[str, int]:
        return "here", 1

    def start(self, rendezvous: Any) -> tuple[int, Any]:
        return self.rank, rendezvous if isinstance(rendezvous, tuple) else "world"

    def double(self, x: int) -> int:
        return 2 * x + self.rank

    def about(self) -> tuple[int, tuple[int, str]]:
        return os.getpid(), self.threads

    def fail(self, errors: dict[int, Exception]) -> None:
        if self.rank in errors:
            raise errors[self.rank]

    def die(self, who: int) -> None:
        """The others complain at once, as peers do whose connection is reset."""
        if self.rank == who:
            time.sleep(0.3)  # so that the complaints are the first to arrive
            os.kill(os.getpid(), signal.SIGKILL)
        raise PeerTimeout(f"rank {self.rank} lost rank {who}")

    def hang(self, who: int) -> None:
        if self.rank == who:
            time.sleep(60)

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


def spec(world_size: int, **kwargs: Any) -> GangSpec:
    return GangSpec(
        world_size=world_size, model=ModelSpec(name="none"), device="cpu", threads=1, **kwargs
    )


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def reservations() -> list[str]:
    table: dict[str, dict[str, Any]] = placement_group_table()
    return [group["state"] for group in table.values() if group["state"] != "REMOVED"]


def test_calls_streams_and_a_full_disk_on_a_healthy_gang() -> None:
    with RayGang(spec(2), rank_class=ToyRank) as gang:
        assert gang.ready == ((0, ("here", 1)), (1, ("here", 1)))  # type: ignore[comparison-overlap]
        pending = [gang.submit("double", x, what="doubling") for x in range(3)]
        assert [p.result(20) for p in pending] == [[0, 1], [2, 3], [4, 5]]

        items: list[Any] = list(gang.stream("count", 4, timeout_s=20, what="counting"))
        assert items == [0, 1, 2, 3]
        stream = gang.stream("count", 1000, timeout_s=20, what="counting")
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        seen = gang.call("seen", timeout_s=20, what="looking")
        assert seen[0] == seen[1]
        assert seen[0][0] <= 2
        assert seen[0][1]

        with pytest.raises(StoreError, match=r"rank 1 .* in saving: disk full"):
            gang.call("fail", {1: StoreError("disk full")}, timeout_s=20, what="saving")
        with pytest.raises(UnknownName, match=r"unknown codec 'x'; known: raw$"):
            gang.call("fail", {0: UnknownName("codec", "x", ["raw"])}, timeout_s=20, what="begin")

        late = RayGang(spec(3), rank_class=ToyRank, placement_timeout_s=0.5)
        with pytest.raises(TooLarge, match=r"3 ranks asked for.* 2 CPUs .* free .* in 0\.5 s"):
            late.start()
        assert reservations() == ["CREATED"]

        about = gang.call("about", timeout_s=20, what="looking")  # it lives on
        pids = [pid for pid, _ in about]
        assert about[0][1] == (1, "1")
        assert len(set(pids)) == 2
    assert not any(is_alive(pid) for pid in pids)
    assert reservations() == []


def test_the_rank_that_died_is_named_though_its_peers_complain_first() -> None:
    with RayGang(spec(2), rank_class=ToyRank) as gang:
        began = time.monotonic()
        with pytest.raises(RankLost, match=r"^rank 1 \(host .*, pid \d+\) died in prefill chunk 3"):
            gang.call("die", 1, timeout_s=60, what="prefill chunk 3 [12288, 16384)")
        assert time.monotonic() - began < 20
        assert gang.lost
    assert reservations() == []


def test_a_rank_that_hangs_is_named_when_the_deadline_ends() -> None:
    with RayGang(spec(2), rank_class=ToyRank) as gang:
        pids = [pid for pid, _ in gang.call("about", timeout_s=20, what="looking")]
        with pytest.raises(RankLost, match=r"^rank 1 \(.*\) did not answer in chunk 0: waited 1.0"):
            gang.call("hang", 1, timeout_s=1.0, what="chunk 0")
    assert not any(is_alive(pid) for pid in pids)


def test_loopback_ranks_share_one_actor() -> None:
    with RayGang(spec(3, transport="loopback"), rank_class=ToyRank) as gang:
        about = gang.call("about", timeout_s=20, what="looking")
        assert len({pid for pid, _ in about}) == 1
        assert gang.call("double", 2, timeout_s=20, what="doubling") == [4, 5, 6]
        items: list[Any] = list(gang.stream("count", 3, timeout_s=20, what="counting"))
        assert items == [0, 1, 2]
        errors = {2: ValueError("shapes")}
        with pytest.raises(RankLost, match=r"^rank 2 .* failed in chunk 1: ValueError: sh") as e:
            gang.call("fail", errors, timeout_s=20, what="chunk 1")
        assert "Traceback" in str(e.value.__cause__)


def test_more_ranks_than_the_cluster_has_are_refused_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(TooLarge, match="5 ranks asked for, the cluster has 4 CPUs"):
        RayGang(spec(5), rank_class=ToyRank).start()
    assert time.monotonic() - began < 5
    assert reservations() == []


def test_a_start_that_fails_leaves_nothing() -> None:
    class Broken(ToyRank):
        def start(self, rendezvous: Any) -> Any:
            raise UnknownName("model", "gpt-9", ["smollm2"])

    with pytest.raises(UnknownName, match="unknown model 'gpt-9'"):
        RayGang(spec(2), rank_class=Broken).start()
    assert reservations() == []
    assert threading.active_count() < 50
    assert ray.is_initialized()


def pages(store: Store, name: str) -> list[str]:
    return [page.xxh3 for page in store.manifest(name).pages]


def check_logits(gang: Gang, plan: PrefillPlan, tokens: np.ndarray) -> None:
    """Processes over gloo give the logits of the unmodified transformers model in one process."""
    model = load_model(gang.spec.model, torch.device("cpu")).model
    with torch.inference_mode():
        want = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    gang.call("begin_prefill", plan, tokens, timeout_s=60, what="begin")
    for index in range(len(plan.chunks)):
        for spans, rows in gang.call(
            "chunk_logits", plan.context_id, index, timeout_s=60, what="logits"
        ):
            held = [i for span in spans for i in range(span.start, span.stop)]
            if not held:  # the short last chunk is one page, which one rank has
                continue
            assert np.abs(rows - want[held]).max() <= 1e-5 * np.abs(want).max()
    gang.call("drop", plan.context_id, timeout_s=60, what="drop")


def test_real_ranks_prefill_over_gloo_and_one_that_is_killed_is_replaced(
    tmp_path: Path,
) -> None:
    tokens = np.random.default_rng(5).integers(0, 256, size=1100, dtype=np.int32)
    options = PrefillOptions(chunk_tokens=256)
    model = ModelSpec(name="random:tiny", seed=2)
    store = Store(tmp_path / "store")
    real = GangSpec(world_size=2, model=model, device="cpu", threads=1, timeout_s=30.0)

    def answer(controller: Controller) -> list[int]:
        session = controller.begin_session(name)
        return [t.token_id for t in controller.ask(session, name, (7, 8), max_tokens=5)]

    with RayGang(real) as gang:
        controller = Controller(gang, store)
        assert {ready.transport for ready in gang.ready} == {"gloo"}
        check_logits(gang, controller.plan(tokens, options), tokens)
        name = controller.prefill(tokens, options).context_id
        expected = answer(controller)

        sealed = pages(store, name)
        before = [ready.pid for ready in gang.ready]
        events: list[PrefillProgress] = []
        pauses: list[PauseEvent] = []

        def kill_after_the_first_chunk(event: PrefillProgress) -> None:
            events.append(event)
            if len(events) == 1:
                os.kill(before[1], signal.SIGKILL)

        done = controller.prefill(
            tokens, options, on_event=kill_after_the_first_chunk, on_pause=pauses.append, again=True
        )
        paused, resumed = pauses
        assert isinstance(paused, PrefillPaused)
        lost = rf"^rank 1 \(host .*, pid {before[1]}\) died in prefill chunk \d \[.*\): its process"
        assert re.match(lost, paused.reason)
        assert done.resumed == (resumed,)
        assert isinstance(resumed, PrefillResumed)
        assert resumed.replaced == (1,)
        assert resumed.recomputed_tokens <= 256
        assert resumed.restored_pages >= 1
        after = [ready.pid for ready in gang.ready]
        assert (after[0] == before[0], after[1] == before[1]) == (True, False)
        assert pages(store, name) == sealed
        assert answer(controller) == expected
    assert not any(is_alive(pid) for pid in (*before, *after))
    assert reservations() == []
    assert store.ids() == [name]
    assert list((store.root / "staging").glob("*")) == []

    with LocalGang(msgspec.structs.replace(real, world_size=3)) as local:
        controller = Controller(local, store)
        controller.open(name)
        assert answer(controller) == expected
