"""Facts and their arithmetic."""

from __future__ import annotations

import msgspec
import pytest
import torch

from ringspan.attention.models.facts import check_positions, prefill_flops
from ringspan.attention.models.load import facts_from_config
from ringspan.errors import TooLarge
from ringspan.specs import ModelSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize(("new", "cached"), [(1, 0), (97, 0), (200, 50), (5, 301)])
def test_prefill_flops_count_every_pair_that_a_layer_sees(new: int, cached: int) -> None:
    facts = facts_from_config(ModelSpec(name="random:tiny-qwen2"), CPU)
    assert facts.windows == (None, None, 96, 96)
    pairs = sum(
        sum(1 for k in range(q + 1) if window is None or q - k < window)
        for window in facts.windows
        for q in range(cached, cached + new)
    )
    want = facts.flops_per_token * new + 4 * facts.num_q_heads * facts.head_dim * pairs
    assert prefill_flops(facts, new, cached) == want


def test_a_prefill_of_2_20_tokens_by_llama_8b_is_3e17_flop() -> None:
    facts = facts_from_config(ModelSpec(name="random:llama-3.1-8b"), CPU)
    assert prefill_flops(facts, 1 << 20) == pytest.approx(3.03e17, rel=0.01)


def test_chunks_add_up_to_the_whole() -> None:
    facts = facts_from_config(ModelSpec(name="random:tiny-gemma2"), CPU)
    chunked = prefill_flops(facts, 130) + prefill_flops(facts, 71, 130)
    assert chunked == prefill_flops(facts, 201)


def test_too_many_tokens_name_the_limit_and_the_way_out() -> None:
    facts = facts_from_config(ModelSpec(name="random:tiny-llama"), CPU)
    check_positions(facts, 8192)
    with pytest.raises(TooLarge, match=r"24056 .* 8192 .*--rope-scaling yarn:3"):
        check_positions(facts, 24056)
    stretched = msgspec.structs.replace(facts, max_positions=32768)
    check_positions(stretched, 24056)
