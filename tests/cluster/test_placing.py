"""Where requests go: sizes, prefixes, decode, preemption, refusals; and the closed form's error."""

from __future__ import annotations

import pytest

from ringspan.attention.cost import MACHINES, Link, assumed_speeds
from ringspan.cluster.placing import place
from ringspan.cluster.placing_blocks import ANY, Holding, Node, Preemptible, Session
from ringspan.cluster.placing_costs import LEAST_PARALLEL_TOKENS, Costs
from ringspan.cluster.placing_explain import explain_placement
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Placed, Refused, Request
from ringspan.cluster.policy import policy
from ringspan.cluster.predict import Way, predict
from ringspan.errors import BadInput, UnknownName
from ringspan.specs import ModelFacts

LLAMA = ModelFacts(
    name="random:llama-3.1-8b", family="llama", num_layers=32, num_q_heads=32, num_kv_heads=8,
    head_dim=128, hidden_size=4096, num_params=8_030_261_248, flops_per_token=13_958_643_712.0,
    max_positions=1 << 21, dtype="bfloat16", fingerprint="", windows=(None,) * 32,
)  # fmt: skip
LINK = MACHINES["h200"].link
NETWORK = Link(latency_s=1e-4, bytes_per_s=50e9)


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs(LLAMA, assumed_speeds("h200", LLAMA), LINK, NETWORK)


def cluster(nodes: int = 4, devices: int = 8, gigabytes: float = 100.0) -> ClusterState:
    return ClusterState([Node(f"n{k}", devices, "r0") for k in range(nodes)], gigabytes * 1e9, 1e12)


def asked(new: int, *, ttft: float = 60.0, **fields: object) -> Request:
    common: dict[str, object] = {
        "request_id": 1, "arrival_s": 0.0, "output_tokens": 100, "tpot_s": 0.05
    }  # fmt: skip
    return Request(new_tokens=new, ttft_s=ttft, **(common | fields))  # type: ignore[arg-type]


def placed(request: Request, state: ClusterState, costs: Costs, now_s: float = 0.0) -> Placed:
    decision = place(request, state, costs, now_s)
    assert isinstance(decision, Placed)
    return decision


def held(state: ClusterState, costs: Costs, tokens: int, device: int, size: int = 1) -> Holding:
    """A document that lies on a gang."""
    block = next(b for b in state.near(state.node_of[device], size) if device in b.devices)
    kept = Holding("doc", tokens, block, costs.kv_bytes(tokens) / size, 0.0)
    state.hold(kept)
    return kept


@pytest.mark.parametrize("device", ["h200", "h100", "a100"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_closed_form_follows_the_simulated_schemes(device: str, ranks: int) -> None:
    speeds, link = assumed_speeds(device, LLAMA), MACHINES[device].link
    costs = Costs(LLAMA, speeds, link, NETWORK)
    for new, cached in ((131_072, 0), (300_032, 0), (16_384, 0), (8192, 499_968), (4096, 262_144)):
        cost = costs.prefill(new, cached, ranks)
        way = Way(new, cost.chunk_tokens, "zigzag", cost.scheme, "raw", 128, ranks, cached)
        measured = predict(way, LLAMA, speeds, link, lengths=2).seconds
        assert cost.seconds == pytest.approx(measured, rel=0.2), (new, cached)


def test_short_prompts_get_one_rank_and_long_ones_as_many_as_their_limit_wants(
    costs: Costs,
) -> None:
    state = cluster()
    assert placed(asked(LEAST_PARALLEL_TOKENS - 1, ttft=0.01), state, costs).chosen.block.size == 1
    sizes = [
        placed(asked(262_144, ttft=limit), state, costs).chosen.block.size
        for limit in (100.0, 20.0, 6.0, 0.1)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == 32


def test_a_million_tokens_take_a_gang_that_holds_them(costs: Costs) -> None:
    decision = placed(asked(1_000_000, ttft=1e6), cluster(), costs)
    kv = costs.kv_bytes(1_000_100)
    assert decision.chosen.block.size * 100e9 >= kv > decision.chosen.block.size // 2 * 100e9


def test_the_ring_stays_within_a_node_while_one_is_wide_enough(costs: Costs) -> None:
    state = cluster()
    block = placed(asked(262_144, ttft=6.0), state, costs).chosen.block
    assert len(block.nodes) == 1
    assert block.ring == tuple(range(block.first, block.first + block.size))


def test_a_question_runs_where_the_prefix_lies(costs: Costs) -> None:
    state = cluster()
    kept = held(state, costs, 200_064, device=13)
    request = asked(500, ttft=3.0, prefix_id="doc", prefix_tokens=200_064)
    chosen = placed(request, state, costs).chosen
    assert (chosen.source, chosen.holding, chosen.block) == ("in place", kept, kept.block)
    assert chosen.cached_tokens == 200_064


def test_a_prefix_on_a_busy_gang_is_moved_rather_than_waited_for(costs: Costs) -> None:
    state = cluster()
    kept = held(state, costs, 200_064, device=13)
    state.commit(kept.block, 50.0)
    request = asked(500, ttft=3.0, prefix_id="doc", prefix_tokens=200_064)
    decision = placed(request, state, costs)
    assert decision.chosen.source == "near"
    assert decision.chosen.block.nodes == kept.block.nodes
    assert decision.chosen.moved_bytes == pytest.approx(costs.kv_bytes(200_064))
    waiting = next(one for one in decision.candidates if one.source == "in place")
    assert waiting.end_s > 50.0


def test_pages_are_encoded_for_a_slow_link_where_the_loss_is_accepted(costs: Costs) -> None:
    slow = Costs(LLAMA, costs.speeds, Link(latency_s=1e-4, bytes_per_s=1e9), NETWORK)
    assert slow.move(100_000, 1, 1, near=True, allow_8_bit=False)[1] == "raw"
    seconds, wire, sent = slow.move(100_000, 1, 1, near=True, allow_8_bit=True)
    assert wire == "int8"
    assert sent < 0.6 * costs.kv_bytes(100_000)
    assert seconds < slow.move(100_000, 1, 1, near=True, allow_8_bit=False)[0]


def test_an_answer_is_handed_to_a_gang_that_decodes_already(costs: Costs) -> None:
    state = cluster()
    (gang,) = state.near(2, 1)[:1]
    state.join(gang, 7, Session(step_bytes=costs.kv_bytes(8000), spare_s=10.0))
    decode = placed(asked(4000, ttft=3.0), state, costs).decode
    assert (decode.in_place, decode.block) == (False, gang)
    assert decode.moved_bytes > 0
    alone = placed(asked(4000, ttft=3.0), cluster(), costs).decode
    assert alone.device_s > decode.device_s


def test_a_prefill_stays_away_from_sessions_that_cannot_wait(costs: Costs) -> None:
    state = cluster(nodes=1)
    for block in state.near(0, 1)[:-1]:
        state.join(block, block.first, Session(step_bytes=1e9, spare_s=0.01))
    assert placed(asked(8000), state, costs).chosen.block.first == 7
    state.join(state.near(0, 1)[-1], 7, Session(step_bytes=1e9, spare_s=0.01))
    refused = place(asked(8000, patience_s=60.0), state, costs, 0.0)
    assert isinstance(refused, Refused)
    assert "would stand still" in refused.reason


def test_short_work_comes_between_two_chunks_of_a_long_prefill(costs: Costs) -> None:
    state = cluster(nodes=1)
    (whole,) = state.near(0, 8)
    state.commit(whole, 40.0)
    long = Preemptible(9, whole, 0, (0.5, 20.0, 40.0), spare_s=5.0)
    state.running[9] = long
    decision = placed(asked(2000, ttft=3.0, priority=1), state, costs)
    assert decision.preempts == 9
    assert decision.chosen.start_s == 0.5
    assert decision.ttft_s < 3.0
    long.spare_s = 0.0  # it must not come later
    assert placed(asked(2000, ttft=3.0, priority=1), state, costs).preempts is None
    long.spare_s, long.priority = 5.0, 2
    assert placed(asked(2000, ttft=3.0, priority=1), state, costs).preempts is None


def test_what_comes_too_late_is_refused_with_the_time(costs: Costs) -> None:
    state = cluster(nodes=1)
    state.commit(state.near(0, 8)[0], 40.0)
    refused = place(asked(2000, ttft=3.0, patience_s=3.0), state, costs, 0.0)
    assert isinstance(refused, Refused)
    assert refused.quoted_s is not None
    assert 40.0 < refused.quoted_s < 41.0
    assert "patience is 3 s" in refused.reason


def test_what_fits_nowhere_is_refused_with_the_bytes(costs: Costs) -> None:
    refused = place(asked(1_000_000), cluster(nodes=1, devices=1), costs, 0.0)
    assert isinstance(refused, Refused)
    assert refused.quoted_s is None
    assert "131 GB of KV on each of 1 device, which have 100 GB each" in refused.reason


def test_a_decision_changes_nothing_and_repeats(costs: Costs) -> None:
    state = cluster()
    held(state, costs, 200_064, device=13)
    request = asked(20_000, prefix_id="doc", prefix_tokens=200_064)
    before = [(b.prefills, b.sessions, b.free_at) for b in state.blocks]
    assert place(request, state, costs, 0.0) == place(request, state, costs, 0.0)
    assert [(b.prefills, b.sessions, b.free_at) for b in state.blocks] == before


def test_a_decision_tells_candidates_and_the_losers_cost(costs: Costs) -> None:
    state = cluster()
    kept = held(state, costs, 200_064, device=13)
    state.commit(kept.block, 50.0)
    decision = placed(asked(500, ttft=3.0, prefix_id="doc", prefix_tokens=200_064), state, costs)
    lines = explain_placement(decision, state).splitlines()
    rows = [line for line in lines if line.startswith(("* ", "  ")) and " n" in line]
    assert len(rows) == len(decision.candidates) > 1
    assert sum(row.startswith("*") for row in rows) == 1
    assert all("device s" in row for row in rows if not row.startswith("*"))
    assert any(line.startswith("decode") for line in lines)
    refused = place(asked(1_000_000), cluster(1, 1), costs, 0.0)
    assert "refused: " in explain_placement(refused, state)


def test_blocks_pair_up_to_racks_and_indices_follow(costs: Costs) -> None:
    state = ClusterState([Node(f"n{k}", 4, f"r{k // 2}") for k in range(4)], 1e9)
    assert state.sizes(ANY) == (1, 2, 4, 8)
    block = state.near(0, 2)[1]
    state.commit(block, 5.0)
    assert [b.first for b in (state.quiet(ANY, 8), state.quiet(ANY, 4)) if b] == [8, 4]
    assert state.earliest(ANY, 8) is block.parent.parent  # type: ignore[union-attr]
    state.release(block)
    assert state.earliest(ANY, 8) is None
    state.lose(3)
    assert all(3 not in b.devices for size in (1, 2, 4, 8) if (b := state.quiet(ANY, size)))
    state.regain(3)
    assert all(block.lost == 0 for block in state.blocks)


def test_a_policys_name_is_checked() -> None:
    assert policy("fixed:4").rules.sizes == (4,)
    with pytest.raises(UnknownName, match="unknown policy 'best'; known: fixed:N, planner"):
        policy("best")
    with pytest.raises(BadInput, match="policy fixed:3: wanted a power of two"):
        policy("fixed:3")
    with pytest.raises(BadInput, match="a cluster of no nodes"):
        ClusterState([], 1e9)
