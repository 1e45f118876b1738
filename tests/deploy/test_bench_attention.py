"""`bench attention`: right before it is timed, beside one kernel, on threads and processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from ringspan.attention.cost import assumed_speeds, machine
from ringspan.attention.layer import Layer
from ringspan.attention.schemes.ring import ring
from ringspan.attention.schemes.table import SCHEMES
from ringspan.cluster.messages import GangSpec, ModelFacts, ModelSpec
from ringspan.deploy.bench import contest, rows, table
from ringspan.deploy.bench.attention import (
    AttentionRow,
    Outcome,
    Skipped,
    bench_attention,
    in_order,
)
from ringspan.deploy.bench.case import TORCH_SCHEMES, AttentionCase
from ringspan.deploy.bench.power import state_of
from ringspan.deploy.bench.predict import predict
from ringspan.deploy.bench.prefill import Row as PrefillRow
from ringspan.deploy.bench.single_kernel import best_kernel, random_sequence
from ringspan.deploy.bench.timing import Side, in_turn
from ringspan.deploy.bench.worlds import open_world
from ringspan.deploy.cli import run
from ringspan.errors import BadInput, RankLost, RingspanError
from ringspan.types import Part, Span, coalesce

CPU = torch.device("cpu")
SMALL = ["bench", "attention", "--device", "cpu", "--heads", "4/2", "--head-dim", "32"]
CASE = AttentionCase(
    tokens=384, num_q_heads=4, num_kv_heads=2, head_dim=32, dtype="float32", repeats=2
)


def spec(world_size: int = 1, transport: str = "auto") -> GangSpec:
    return GangSpec(
        world_size=world_size,
        model=ModelSpec(name="none"),
        transport=transport,
        device="cpu",
        timeout_s=20.0,
    )


def case(**changes: object) -> AttentionCase:
    return msgspec.structs.replace(CASE, **changes)


def measured(*cases: AttentionCase) -> list[Outcome]:
    return list(bench_attention(spec(), cases, "a test"))


def test_a_row_says_what_was_seen_sent_and_how_far_off_it_was() -> None:
    [row] = measured(case(tokens=1024, ranks=4))
    assert isinstance(row, AttentionRow)
    assert row.seen_keys == 1024 * 1025 // 2
    assert row.flops == 4 * 4 * 32 * row.seen_keys
    # three of four blocks pass every rank, K and V of 256 tokens each
    assert row.sent_bytes == 3 * 256 * 2 * 2 * 32 * 4
    assert row.audited_rows == 4 * contest.AUDIT_ROWS
    assert 0 < row.relative_error < 2e-5
    assert len(row.all_s) == len(row.kernel_all_s) == 2
    assert row.devices == 1
    assert row.ideal_s == row.kernel_seconds.median
    pairs = [a / b for a, b in zip(row.all_s, row.kernel_all_s, strict=True)]
    assert row.ratio.min == pytest.approx(min(pairs))
    assert row.tflops_per_s == pytest.approx(row.flops / row.seconds.median / 1e12)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_scheme_is_measured_on_a_cache_beside_its_floor(scheme: str) -> None:
    [row] = measured(case(tokens=77, cached=256, ranks=2, scheme=scheme))
    assert isinstance(row, AttentionRow)
    assert row.seen_keys == 77 * 256 + 77 * 78 // 2
    assert row.floor_s is not None
    assert row.over_floor is not None
    assert row.full_tflops_per_s is not None
    assert row.floor_s == pytest.approx(row.flops / row.full_tflops_per_s / 1e12)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"window": 100}, 100 * 101 // 2 + 284 * 100),
        ({"causal": False}, 384 * 384),
        ({"layout": "striped"}, 384 * 385 // 2),
    ],
    ids=["window", "full", "striped"],
)
def test_masks_and_layouts_are_counted(changes: dict[str, object], seen: int) -> None:
    [row] = measured(case(ranks=3, **changes))
    assert isinstance(row, AttentionRow)
    assert row.seen_keys == seen


def _one_row_off(layer: Layer) -> Part:
    part = ring(layer)
    if layer.rank == 1:
        part.out[-1] += 1.0
    return part


def _forgets_later(layer: Layer) -> Part:
    """Right when it is audited; in later runs it attends to its own keys only."""
    assert layer.ledger is not None
    if layer.ledger._windows[None] == layer.q.shape[1]:
        return ring(layer)
    accumulator = layer.accumulator(layer.q)
    layer.over(accumulator, layer.rank, layer.rank, layer.own)
    return layer.finish(accumulator)


@pytest.mark.parametrize(
    ("scheme", "says"),
    [(_one_row_off, "is off by"), (_forgets_later, "its heads saw")],
    ids=["a row is off", "keys are left out while it is timed"],
)
def test_a_wrong_answer_is_not_timed(
    scheme: Callable[[Layer], Part],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(contest, "scheme_named", lambda name: scheme)
    written = tmp_path / "rows.jsonl"
    asked = ["--tokens", "384", "--ranks", "2", "--transport", "loopback", "--repeats", "1"]
    assert run([*SMALL, *asked, "--json", str(written)]) == 1
    assert not written.exists()
    said = capfd.readouterr().out
    assert "WRONG, not timed: 384 tokens, 2 ranks, ring" in said
    assert says in said


def test_a_scheme_that_cannot_take_the_case_is_named_and_the_others_run() -> None:
    refused, row = measured(case(ranks=3, scheme="ulysses"), case(ranks=3, scheme="pass-q"))
    assert isinstance(refused, Skipped)
    assert "cannot be dealt evenly" in refused.text
    assert isinstance(row, AttentionRow)


@pytest.mark.parametrize("scheme", sorted(TORCH_SCHEMES))
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ranks": 2, "transport": "gloo"}, "this is gloo"),
        ({"ranks": 1, "transport": "nccl"}, "at least 2 ranks"),
        ({"ranks": 2, "transport": "nccl", "window": 9}, "plain causal"),
        ({"ranks": 2, "transport": "nccl", "tokens": 1022}, "multiples of 4"),
    ],
    ids=["gloo", "one rank", "window", "odd"],
)
def test_what_torch_cannot_do_is_said_by_name(
    scheme: str, changes: dict[str, object], reason: str
) -> None:
    [skipped] = measured(case(scheme=scheme, **changes))
    assert isinstance(skipped, Skipped)
    assert reason in skipped.text


def test_torch_deals_a_head_and_a_tail_to_each_rank() -> None:
    dealt = case(tokens=1200, ranks=3, scheme="torch-all-gather").dealt()
    assert dealt[0] == (Span(0, 200), Span(1000, 1200))
    assert dealt[2] == (Span(400, 800),)
    assert coalesce(sorted(span for spans in dealt for span in spans)) == (Span(0, 1200),)


def test_processes_measure_over_gloo_and_a_dead_one_is_named() -> None:
    """One start of two processes: a case over both, then one of them is killed."""
    over_gloo = case(tokens=512, ranks=2, transport="gloo")
    with open_world(spec(2, "gloo")) as world:
        first, second = world.measure(over_gloo)
        assert first.right
        assert second.right
        assert first.engine_s == second.engine_s  # both know the slowest rank's
        assert first.kernel == "cpu-flash"
        assert second.kernel == ""
        assert first.seen_keys + second.seen_keys == 512 * 513 // 2
        assert first.sent_bytes == 256 * 2 * 2 * 32 * 4
        assert len(first.exposed_s) == 2  # before step 0 none, before step 1 one
        os.kill(world.ranks[1].pid, signal.SIGKILL)
        with pytest.raises(RankLost, match="rank 1 died with status -9"):
            world.measure(over_gloo)


def test_loopback_cases_come_by_length_and_others_by_ranks() -> None:
    def several(transport: str) -> list[tuple[int, int]]:
        made = [case(tokens=n, ranks=p, transport=transport) for n in (8, 16) for p in (2, 4)]
        return [(one.tokens, one.ranks) for one in in_order(made)]

    assert several("loopback") == [(8, 2), (8, 4), (16, 2), (16, 4)]
    assert several("gloo") == [(8, 2), (16, 2), (8, 4), (16, 4)]


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str) -> Side:
        return Side(name, lambda calls: order.append(name * calls))

    samples = in_turn([side("a"), side("b"), Side("c", None)], [2, 1, 1], 3, CPU)
    assert order == ["aa", "b"] * 3
    assert [len(times) for times in samples] == [3, 3, 3]
    assert samples[2] == (0.0, 0.0, 0.0)


def test_the_slowest_rank_counts() -> None:
    times = in_turn([Side("a", lambda calls: None)], [1], 2, CPU, lambda s: max(s, 7.0))
    assert times == [(7.0, 7.0)]


def test_the_definition_is_no_kernel_to_compare_with() -> None:
    kernel = best_kernel(random_sequence(case(), CPU), True, None)
    assert kernel.name == "cpu-flash"
    assert "definition" in kernel.left_out["reference"]
    assert set(kernel.left_out) >= {"fa4", "cudnn", "triton"}


def test_a_missing_kernel_is_said_with_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringspan.attention.local import BACKENDS
    from ringspan.deploy.bench import single_kernel

    only = {"reference": BACKENDS["reference"], "fa4": BACKENDS["fa4"]}
    monkeypatch.setattr(single_kernel, "BACKENDS", only)
    with pytest.raises(RingspanError, match=r"no kernel to compare with on cpu \(.*fa4: it runs"):
        best_kernel(random_sequence(case(), CPU), True, None)


def test_the_planner_foretells_what_an_h200_takes() -> None:
    """Measured: 655 TFLOP/s at 131,072 tokens, one call of FlashAttention 4."""
    facts = ModelFacts(
        name="any", family="llama", num_layers=1, num_q_heads=32, num_kv_heads=8, head_dim=128,
        hidden_size=4096, dtype="bfloat16", num_params=1, max_positions=1 << 20, fingerprint="",
        flops_per_token=1.0, windows=(None,),
    )  # fmt: skip
    speeds, link = assumed_speeds("h200", facts), machine("h200").link
    whole = AttentionCase(tokens=131_072)
    told = predict(whole, speeds, link)
    assert told == pytest.approx(whole.flops() / 655e12, rel=0.05)
    over_eight = predict(msgspec.structs.replace(whole, ranks=8, transport="nccl"), speeds, link)
    assert told is not None
    assert over_eight is not None
    assert told / 8 < over_eight < 1.2 * told / 8
    assert predict(whole, None, None) is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_has_the_planners_word_where_the_ranks_measured(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path))
    measuring = msgspec.structs.replace(spec(), measure=True)
    [row] = bench_attention(measuring, [case(tokens=512, ranks=ranks)], "a test")
    assert isinstance(row, AttentionRow)
    assert row.predicted_s is not None
    assert 0.1 < row.predicted_s / row.seconds.median < 10  # a busy machine: no more than sane
    assert list(tmp_path.rglob("*.json"))


def test_readings_between_the_samples_are_left_out() -> None:
    state = state_of("700.00, 1980, 1500, 690.5\n700.00, 1980, 1980, 120.0\n[N/A], x\n")
    assert state is not None
    assert (state.sm_clock_mhz, state.power_w, state.readings) == (1500, 690.5, 2)
    assert state_of("") is None


def test_the_command_writes_rows_table_and_plots(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    written, page, plots = tmp_path / "rows.jsonl", tmp_path / "table.md", tmp_path / "plots"
    asked = ["--tokens", "256,512", "--ranks", "1,2", "--transport", "loopback", "--repeats", "1"]
    outputs = ["--json", str(written), "--markdown", str(page), "--plots", str(plots)]
    assert run([*SMALL, *asked, *outputs, "--compare-torch"]) == 0
    said = capfd.readouterr().out
    assert "torch-all-to-all: torch's context_parallel dispatches CUDA attention" in said
    read = rows.read_rows([written])
    assert [row.devices for row in read] == [1] * 4
    lines = page.read_text().splitlines()
    assert lines[0].startswith("| tokens | ranks | scheme |")
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(read)
    assert table.plain(read) in said
    pictures = sorted(path.name for path in plots.iterdir())
    assert pictures == ["attention_efficiency_over_ranks.png", "attention_time_over_tokens.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in plots.iterdir())
    again = tmp_path / "again"
    assert run(["bench", "plot", str(written), "--to", str(again)]) == 0
    assert sorted(path.name for path in again.iterdir()) == pictures


def test_prefill_takes_several_of_everything(tmp_path: Path) -> None:
    written = tmp_path / "rows.jsonl"
    small = ["bench", "prefill", "--model", "random:tiny", "--device", "cpu", "--local"]
    asked = ["--tokens", "200,300", "--ranks", "1,2", "--schemes", "ring,pass-q", "--repeats", "1"]
    assert run([*small, *asked, "--no-baseline", "--json", str(written)]) == 0
    read = rows.read_rows([written])
    assert all(isinstance(row, PrefillRow) for row in read)
    found = [(len(r.ranks), r.tokens, r.plan.scheme) for r in read if isinstance(r, PrefillRow)]
    schemes = ("ring", "pass-q")
    assert found == [(p, n, scheme) for p in (1, 2) for n in (200, 300) for scheme in schemes]
    assert {point.series for point in rows.points_of(read)} == {
        "ring (loopback)",
        "pass-q (loopback)",
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--tokens", "0"], "--tokens '0': wanted at least 1"),
        (["--ranks", "1,x"], "--ranks '1,x': wanted"),
        (["--schemes", "ring,round"], "unknown scheme 'round'"),
        (["--heads", "9/2"], "wanted q/kv"),
        (["--cached", "100"], "whole pages of 128 tokens; the nearest is 128"),
        (["--window", "0"], "--window 0: wanted at least 1"),
        (["--full", "--window", "8"], "not with --full"),
        (["--full", "--cached", "128"], "leave one out"),
        (["--repeats", "0"], "--repeats 0: wanted at least 1"),
        (["--transport", "nccl", "--ranks", "2"], "a GPU for each of 2 ranks"),
        (["--layout", "spiral"], "unknown layout 'spiral'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_started(
    wrong: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*SMALL, *wrong]) == 2
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert run([*SMALL, "--tokens", "128", "--plots", str(tmp_path)]) == 2
    assert "pip install 'ringspan[plots]'" in capfd.readouterr().err


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"benchmark": "unknown"}\n')
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 1 is no row"):
        rows.read_rows([path])
