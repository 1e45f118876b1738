"""What transformers hands to a registered attention function, family by family.

The hook relies on these facts; a transformers that changes one of them fails here first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from ringspan.attention.models.load import load_model
from ringspan.specs import ModelSpec

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
CPU = torch.device("cpu")
NAME = "ringspan_test_dense"


def dense(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention from nothing but the call's arguments; q [B, Hq, T, D] -> [B, T, Hq, D]."""
    calls = kwargs.get("ringspan")
    if calls is not None:
        calls.append((module.layer_idx, attention_mask, q.shape, k.shape, dict(kwargs)))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * kwargs["scaling"]
    if (softcap := kwargs.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = kwargs["position_ids"][0]
    distance = positions[:, None] - positions[None, :]
    allowed = distance >= 0
    if (window := kwargs.get("sliding_window")) is not None:
        allowed &= distance < window
    scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_calls_carry_all_that_is_needed_to_equal_the_unmodified_model(family: str) -> None:
    loaded = load_model(ModelSpec(name=f"random:tiny-{family}"), CPU)
    model, facts = loaded.model, loaded.facts
    ids = torch.randint(0, 1024, (1, 301), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(301)[None]
    with torch.no_grad():
        want = model(ids, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation(NAME)
        calls: list[Any] = []
        got = model(ids, position_ids=positions, use_cache=False, ringspan=calls).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert [call[0] for call in calls] == list(range(facts.num_layers))
    for layer, mask, q_shape, k_shape, kwargs in calls:
        assert mask is None
        assert q_shape == (1, facts.num_q_heads, 301, facts.head_dim)
        assert k_shape == (1, facts.num_kv_heads, 301, facts.head_dim)
        assert kwargs.get("sliding_window") == facts.windows[layer]
        assert kwargs.get("softcap") == (5.0 if family == "gemma2" else None)
        assert kwargs.get("s_aux") is None
        assert kwargs["ringspan"] is calls
        assert torch.equal(kwargs["position_ids"], positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_model_and_the_head_run_apart_with_the_extra_argument(family: str) -> None:
    model = load_model(ModelSpec(name=f"random:tiny-{family}"), CPU).model
    model.set_attn_implementation(NAME)
    ids = torch.arange(40)[None]
    positions = torch.arange(1000, 1040)[None]
    options: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    with torch.no_grad():
        calls: list[Any] = []
        hidden = model.model(input_ids=ids, ringspan=calls, **options).last_hidden_state
        assert len(calls) == model.config.num_hidden_layers
        last = model(ids, logits_to_keep=1, ringspan=calls, **options).logits
    assert hidden.shape == (1, 40, model.config.hidden_size)
    assert last.shape == (1, 1, 1024)
    logits = model.lm_head(hidden[:, -1:])
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    assert torch.allclose(last, logits, rtol=0, atol=1e-5)
