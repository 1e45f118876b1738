"""Simulated clusters: they repeat, survive random faults, and the planner is worth its work."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ringspan.cluster.placing_types import Request
from ringspan.cluster.simulate_runs import Setting, SimulateRow, run_policy
from ringspan.cluster.workload import Trace, drawn, read_trace
from ringspan.errors import BadInput
from ringspan.specs import ModelFacts

LLAMA = ModelFacts(
    name="random:llama-3.1-8b", family="llama", num_layers=32, num_q_heads=32, num_kv_heads=8,
    head_dim=128, hidden_size=4096, num_params=8_030_261_248, flops_per_token=13_958_643_712.0,
    max_positions=1 << 21, dtype="bfloat16", fingerprint="", windows=(None,) * 32,
)  # fmt: skip
SCHEDULES = 200


def setting(requests: int, rate: float, seed: int = 0, **fields: object) -> Setting:
    trace = Trace(requests=requests, rate=rate, seed=seed, turns=8, live=10)
    return Setting(trace=trace, **fields)  # type: ignore[arg-type]


def small(seed: int, **fields: object) -> Setting:
    """Three nodes of four, and a fault every 15 s."""
    common: dict[str, object] = {
        "nodes": 3, "node_devices": 4, "largest_nodes": 2, "fault_hours": 0.05
    }  # fmt: skip
    return setting(150, 1.2, seed, **(common | fields))


def outcome(row: SimulateRow) -> tuple[object, ...]:
    return row.figures, row.broken


@pytest.mark.parametrize("block", range(10))
def test_no_schedule_of_faults_ends_in_a_stuck_or_a_wrong_answer(block: int) -> None:
    faults = 0
    for seed in range(block * SCHEDULES // 10, (block + 1) * SCHEDULES // 10):
        name = ("planner", "planner", "fixed:2", "remote:1")[seed % 4]
        row = run_policy(name, small(seed), LLAMA, check=True)
        assert row.broken == (), seed
        assert row.figures.done + row.figures.refused == 150
        faults += row.figures.faults
    assert faults > 50


def test_the_check_sees_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringspan.cluster import simulate, simulate_losses

    def forgets_sessions(simulation: object, one: object) -> None:
        """As if nobody noticed that a session's devices went."""

    assert simulate.fail is simulate_losses.fail
    monkeypatch.setattr(simulate_losses, "_restore", forgets_sessions)
    rows = [run_policy("planner", small(seed), LLAMA, check=True) for seed in range(4)]
    assert any("is gone and has work" in text for row in rows for text in row.broken)


def test_one_seed_gives_one_result_and_another_seed_another() -> None:
    asked = small(3, fault_hours=0.5)
    first, again = (run_policy("planner", asked, LLAMA) for _ in range(2))
    assert outcome(first) == outcome(again)
    assert outcome(first) != outcome(run_policy("planner", small(4, fault_hours=0.5), LLAMA))


def test_a_resumed_prefill_computes_less_again_than_one_from_the_start() -> None:
    long = [
        msgspec.structs.replace(
            small(seed, fault_hours=0.15, resumes=resumes),
            trace=Trace(requests=60, rate=0.2, seed=seed, new_share=0.9, turns=1),
        )
        for resumes in (True, False)
        for seed in range(6)
    ]
    again = [run_policy("planner", one, LLAMA).figures.recomputed_tokens for one in long]
    assert sum(again[:6]) < sum(again[6:])


def test_the_planner_gives_more_good_answers_than_fixed_gangs_and_remote_prefill() -> None:
    busy = Setting(nodes=4, trace=Trace(requests=3000, rate=3.5, seed=2))
    good = {
        name: run_policy(name, busy, LLAMA).figures.good
        for name in ("planner", "fixed:1", "fixed:2", "fixed:4", "fixed:8", "remote:1", "remote:2")
    }
    assert good["planner"] == max(good.values())
    assert sorted(good.values())[-1] > sorted(good.values())[-2]


def test_drawn_requests_have_the_distribution_that_is_written_down() -> None:
    requests = list(drawn(Trace(requests=20_000, rate=5.0, seed=1)))
    assert requests == list(drawn(Trace(requests=20_000, rate=5.0, seed=1)))
    prefix, new = sum(r.prefix_tokens for r in requests), sum(r.new_tokens for r in requests)
    assert prefix / (prefix + new) == pytest.approx(0.9, abs=0.03)
    assert all(1 <= r.tokens <= 1_000_000 for r in requests)
    assert max(r.tokens for r in requests) > 500_000
    assert min(r.tokens for r in requests) < 2_000
    lasted = requests[-1].arrival_s
    assert 20_000 / lasted == pytest.approx(5.0, rel=0.2)
    with pytest.raises(BadInput, match="--requests 0"):
        next(drawn(Trace(requests=0, rate=1.0)))
    with pytest.raises(BadInput, match="--new-share 0"):
        next(drawn(Trace(requests=1, rate=1.0, new_share=0.0)))


def test_a_trace_is_read_from_lines_and_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival_s": 0.5, "new_tokens": 100, "output_tokens": 5}\n\n'
        '{"arrival_s": 1, "new_tokens": 7, "output_tokens": 9, "prefix_id": "a",'
        ' "prefix_tokens": 40000, "keeps": true, "ttft_s": 2}\n'
    )
    first, second = read_trace(path)
    assert (first.ttft_s, first.tokens, second.ttft_s) == (3.0, 100, 2.0)
    assert isinstance(second, Request)
    assert second.keeps
    row = run_policy("planner", small(0, file=str(path)), LLAMA, check=True)
    assert (row.figures.requests, row.figures.good) == (2, 2)
    for text, says in (
        ('{"arrival_s": 1}', "line 1 is no request"),
        ('{"arrival_s": 1, "new_tokens": 0, "output_tokens": 1}', "line 1: arrival 1 s"),
        ("nonsense", "line 1 is no request"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=says):
            list(read_trace(path))
    with pytest.raises(BadInput, match="wanted a JSONL file"):
        list(read_trace(tmp_path / "none"))
