"""Making a decision quicker must not change it: seeded traces, and digests of what was decided
before the decision's inner loops were last rewritten."""

from __future__ import annotations

import hashlib

import pytest

from ringspan.cluster import simulate
from ringspan.cluster.placing import place
from ringspan.cluster.placing_types import Decision, Placed
from ringspan.cluster.simulate_runs import Setting, run_policy
from ringspan.cluster.workload import Trace
from ringspan.specs import ModelFacts

LLAMA = ModelFacts(
    name="random:llama-3.1-8b", family="llama", num_layers=32, num_q_heads=32, num_kv_heads=8,
    head_dim=128, hidden_size=4096, num_params=8_030_261_248, flops_per_token=13_958_643_712.0,
    max_positions=1 << 21, dtype="bfloat16", fingerprint="", windows=(None,) * 32,
)  # fmt: skip
DIGESTS = {
    "planner": "307f71c02c4090b9",
    "fixed:2": "2460a2ed1e6c69a8",
    "remote:1": "453fbd73e74695ad",
}
REQUESTS = 1_500


def text_of(decision: Decision) -> str:
    """All that is chosen; no times, whose last bits are the mathematical library's."""
    if not isinstance(decision, Placed):
        return "refused"
    chosen, decode = decision.chosen, decision.decode
    return repr((
        chosen.block.number, chosen.source, chosen.cached_tokens, chosen.wire,
        chosen.cost.chunk_tokens, chosen.cost.scheme, decode.block.number, decode.in_place,
        decode.wire, decision.preempts, decision.copies,
        [(one.block.number, one.source, one.cached_tokens) for one in decision.candidates],
    ))  # fmt: skip


@pytest.mark.parametrize("policy", list(DIGESTS))
def test_every_decision_is_the_one_that_was_recorded(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = hashlib.sha256()
    seen: list[Decision] = []

    def recorded(*args: object) -> Decision:
        decision = place(*args)  # type: ignore[arg-type]
        decided.update(text_of(decision).encode())
        seen.append(decision)
        return decision

    monkeypatch.setattr(simulate, "place", recorded)
    trace = Trace(requests=REQUESTS, rate=11.6, seed=1)
    run_policy(policy, Setting(nodes=10, trace=trace, fault_hours=0.5), LLAMA)
    assert len(seen) >= REQUESTS
    assert decided.hexdigest()[:16] == DIGESTS[policy]
