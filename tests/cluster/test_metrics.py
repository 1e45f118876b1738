from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ringspan.cluster.events import (
    PrefillDone,
    PrefillProgress,
    PrefillResumed,
    PrefillTimings,
)
from ringspan.cluster.handing import HandedOver
from ringspan.cluster.messages import Findings, PrefillPlan
from ringspan.cluster.metrics import DecisionLog, Metrics, write_metrics
from ringspan.errors import CorruptPage, StoreError
from ringspan.kvstore.handoff import Moved
from ringspan.types import Span

PLAN = PrefillPlan(
    context_id="c" * 16,
    num_tokens=1000,
    page_tokens=128,
    chunk_tokens=512,
    layout="zigzag",
    scheme="ring",
    codec="raw",
    predicted_s=2.0,
    reused_tokens=128,
)


def progress(index: int, span: Span, sent_bytes: int) -> PrefillProgress:
    return PrefillProgress(
        context_id=PLAN.context_id,
        chunk_index=index,
        num_chunks=2,
        span=span,
        tokens_done=span.stop,
        num_tokens=1000,
        elapsed_s=float(index + 1),
        chunk_s=1.0,
        tokens_per_s=400.0,
        left_s=5.0 - index,
        kv_bytes=100,
        sent_bytes=sent_bytes,
    )


def values(metrics: Metrics) -> dict[str, float]:
    """`name{label=value}` -> value, as a Prometheus server would read them."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_a_prefill_is_counted_once_whatever_it_went_through() -> None:
    metrics = Metrics()
    metrics.prefill_began()
    metrics.prefill_progress(progress(0, Span(128, 640), 1000))
    assert values(metrics)["ringspan_prefills_running"] == 1
    metrics.prefill_paused(
        PrefillResumed(
            context_id=PLAN.context_id,
            chunk_index=0,
            num_chunks=2,
            reason="rank 1 died",
            replaced=(1,),
            recomputed_tokens=512,
            restored_pages=0,
            load_s=1.0,
            pause_s=3.0,
        )
    )
    metrics.prefill_progress(progress(0, Span(128, 640), 1000))  # the chunk once more
    metrics.prefill_progress(progress(1, Span(640, 1000), 1800))
    metrics.prefill_ended(
        PrefillDone(
            context_id=PLAN.context_id,
            plan=PLAN,
            saved=True,
            findings=Findings(exposed_s=(0.1, 0.2)),
            timings=PrefillTimings(prefill_s=2.5, save_s=0.3),
        )
    )
    found = values(metrics)
    assert found["ringspan_prefills_running"] == 0
    assert found["ringspan_prefills_total{outcome=computed}"] == 1
    assert found["ringspan_prefill_chunks_total"] == 3
    assert found["ringspan_prefill_tokens_total{source=computed}"] == 1000 - 128
    assert found["ringspan_prefill_tokens_total{source=prefix}"] == 128
    assert found["ringspan_exchange_bytes_total"] == 1800
    assert found["ringspan_exposed_communication_seconds_total"] == pytest.approx(0.3)
    assert found["ringspan_prefill_prediction_ratio"] == 1.25
    assert found["ringspan_faults_total"] == 1
    assert found["ringspan_recomputed_tokens_total"] == 512
    assert found["ringspan_pause_seconds_sum"] == 3.0
    assert found["ringspan_prefill_seconds_bucket{le=2.5}"] == 1
    assert found["ringspan_prefill_seconds_bucket{le=1.0}"] == 0
    metrics.prefill_began()
    metrics.prefill_failed(PLAN.context_id, CorruptPage("x"))
    assert values(metrics)["ringspan_prefills_total{outcome=corruptpage}"] == 1
    assert values(metrics)["ringspan_prefills_running"] == 0


def test_time_per_token_leaves_the_first_token_out() -> None:
    metrics = Metrics()
    metrics.answered(1, first_token_s=0.5, elapsed_s=0.5, why="length")
    assert values(metrics)["ringspan_time_per_output_token_seconds_count"] == 0
    metrics.answered(11, first_token_s=0.5, elapsed_s=1.5, why="stop")
    found = values(metrics)
    assert found["ringspan_time_per_output_token_seconds_sum"] == pytest.approx(0.1)
    assert found["ringspan_time_to_first_token_seconds_count"] == 2
    assert found["ringspan_generated_tokens_total"] == 12
    assert found["ringspan_answers_total{outcome=stop}"] == 1


def test_pages_tiers_queue_and_hand_offs() -> None:
    metrics = Metrics()
    metrics.pages({"verified": {"disk": 7}, "quarantined": {"host": 1}})
    metrics.pages({"verified": {"disk": 3}})
    metrics.tiers({"host": 5, "disk": 9})
    metrics.tiers({"host": 4})
    metrics.queue({"batch": 3})
    moved = (Moved(rank=0, payload_bytes=10, bad_pages=1), Moved(rank=1, payload_bytes=20))
    metrics.handed_over(HandedOver("c", 1, moved, moved, ()))
    metrics.handoff_failed(CorruptPage("x"))
    found = values(metrics)
    assert found["ringspan_pages_total{fate=verified,road=disk}"] == 10
    assert found["ringspan_pages_total{fate=quarantined,road=host}"] == 1
    assert found["ringspan_tier_bytes{tier=host}"] == 4
    assert found["ringspan_tier_bytes{tier=disk}"] == 9
    assert found["ringspan_requests_waiting{priority=batch}"] == 3
    assert found["ringspan_handoff_bytes_total"] == 30
    assert found["ringspan_handoff_bad_pages_total"] == 1
    assert found["ringspan_handoffs_total{outcome=corruptpage}"] == 1


def test_a_priority_whose_last_one_has_begun_is_told_as_empty() -> None:
    metrics = Metrics()
    looks = iter([{"0": 2, "5": 1}, {"5": 1}, {}])
    metrics.look = lambda: metrics.queue(next(looks))
    for zero, five in ((2, 1), (0, 1), (0, 0)):
        found = values(metrics)
        assert found["ringspan_requests_waiting{priority=0}"] == zero
        assert found["ringspan_requests_waiting{priority=5}"] == five
    metrics.look = lambda: metrics.holding(3, 2, {"named": 1, "plain": 4})
    found = values(metrics)
    assert (found["ringspan_answers_running"], found["ringspan_sessions"]) == (3, 2)
    assert found["ringspan_contexts_held{kind=named}"] == 1
    assert found["ringspan_contexts_held{kind=plain}"] == 4


def test_every_name_is_ours_and_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for family in Metrics().registry.collect():
        assert family.name.startswith("ringspan_")
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}`" in text, f"{name} is not in docs/metrics.md"


def test_a_metrics_file_is_whole_or_refused(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.tiers({"disk": 1})
    path = tmp_path / "metrics.prom"
    write_metrics(metrics, path)
    assert 'ringspan_tier_bytes{tier="disk"} 1.0' in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.prom"]
    with pytest.raises(StoreError, match="cannot write the metrics"):
        write_metrics(metrics, tmp_path / "no" / "folder")


def test_a_decision_log_keeps_every_line_whole_while_it_is_rotated(tmp_path: Path) -> None:
    metrics = Metrics()
    log = DecisionLog(tmp_path / "decisions.jsonl", most_bytes=4000, kept=2, metrics=metrics)

    def write(thread: int) -> None:
        for index in range(20):
            log.write("plan", f"r-{thread}-{index}", PLAN)

    threads = [threading.Thread(target=write, args=(t,)) for t in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["decisions.jsonl", "decisions.jsonl.1", "decisions.jsonl.2"]
    seen = set()
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 4000
        for line in path.read_bytes().splitlines():
            row = msgspec.json.decode(line)
            assert row["kind"] == "plan"
            assert row["decision"]["num_tokens"] == 1000
            assert row["of"] not in seen
            seen.add(row["of"])
    newest = (tmp_path / "decisions.jsonl").read_bytes().splitlines()[-1]
    assert msgspec.json.decode(newest)["of"].endswith("-19")
    assert values(metrics)["ringspan_decisions_total{kind=plan}"] == 60
    with pytest.raises(StoreError, match="cannot write the decision log"):
        DecisionLog(tmp_path / "no" / "log").write("plan", "r", PLAN)


def test_a_log_that_keeps_nothing_old_begins_anew(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", most_bytes=120, kept=0)
    for index in range(10):
        log.write("x", str(index), {"n": index})
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    assert (tmp_path / "log").stat().st_size <= 120
