from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import ChunkDone, Findings, GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.cluster.slow import SlowRank, SlowRanks, pace_ratios
from ringspan.deploy.watching import Watching
from ringspan.types import Span


def done(rank, elapsed_s, exchange_s=0.0, exposed_s=(), tokens=128, index=0):
    return ChunkDone(
        context_id="c",
        rank=rank,
        chunk_index=index,
        span=Span(0, 512),
        rank_tokens=tokens,
        elapsed_s=elapsed_s,
        exchange_s=exchange_s,
        findings=Findings(exposed_s=exposed_s),
        sent_bytes=0,
        kv_bytes=0,
    )


def test_waiting_is_not_being_busy_on_the_host_or_on_the_device():
    ranks = [done(0, 4.0, exchange_s=3.0), done(1, 4.0, exposed_s=(2.0, 1.0)), done(2, 4.0)]
    assert pace_ratios(ranks) == {0: 1.0, 1: 1.0, 2: 4.0}


def test_a_rank_with_fewer_tokens_is_judged_by_the_token_and_one_without_any_not_at_all():
    ranks = [done(0, 2.0), done(1, 2.0), done(2, 1.0, tokens=64), done(3, 1.0, tokens=0)]
    assert pace_ratios(ranks) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_a_rank_is_slow_after_two_chunks_and_well_again_after_one():
    slow = SlowRanks()
    bad = [done(0, 1.0), done(1, 3.0), done(2, 1.0)]
    assert slow.add(bad) == ()
    assert slow.add(bad) == (SlowRank(1, 3.0, 0),)
    assert slow.add(bad) == ()
    assert slow.slow == {1}
    assert slow.add([done(rank, 1.0) for rank in range(3)]) == (SlowRank(1, 1.0, 0),)
    assert slow.slow == frozenset()


@pytest.mark.parametrize(("ratio", "found"), [(2.9, 0), (3.1, 1)])
def test_of_two_ranks_one_is_slow_at_three_times_the_other(ratio, found):
    slow = SlowRanks()
    slow.add([done(0, 1.0), done(1, ratio)])
    assert len(slow.add([done(0, 1.0), done(1, ratio)])) == found


class Hindered(Rank):
    """Rank 1 stands still in every forward, as on a device that is throttled."""

    def __init__(self, rank: int, spec: GangSpec) -> None:
        super().__init__(rank, spec)
        if rank == 1:
            forward = self._runtime.forward

            def slowly(*args, **kwargs):
                time.sleep(0.5)
                return forward(*args, **kwargs)

            self._runtime.forward = slowly


def test_a_slow_rank_of_a_real_gang_is_told_by_name(tmp_path: Path, caplog):
    spec = GangSpec(world_size=3, model=ModelSpec(name="retriever"), device="cpu", threads=1)
    watch = Watching(None, None, tmp_path / "decisions", None)
    tokens = np.random.default_rng(0).integers(0, 200, 1536).astype(np.int32)
    with LocalGang(spec, rank_class=Hindered) as gang:
        Controller(gang).prefill(tokens, PrefillOptions(chunk_tokens=384), on_event=watch.on_event)
    assert "rank 1 is slow" in caplog.text
    assert "rank 0" not in caplog.text
    assert "rank 2" not in caplog.text
    assert '"kind":"slow"' in (tmp_path / "decisions").read_text()
    read = text_string_to_metric_families(watch.metrics.render().decode())
    found = {family.name: family for family in read}
    assert found["ringspan_slow_ranks"].samples[0].value == 1
    paces = {s.labels["rank"]: s.value for s in found["ringspan_rank_pace_ratio"].samples}
    assert paces["1"] > 1.5
