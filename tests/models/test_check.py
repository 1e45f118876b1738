"""Models that the hook cannot carry are refused by name and reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoConfig

from ringspan.attention.models.check import check_attention_calls, check_model
from ringspan.attention.models.load import load_model
from ringspan.attention.models.quiet import quiet
from ringspan.attention.models.random_init import RANDOM_CONFIGS, random_config
from ringspan.errors import UnsupportedModel
from ringspan.specs import ModelSpec

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 2}


@pytest.mark.parametrize("name", RANDOM_CONFIGS)
def test_our_own_configs_are_carried(name: str) -> None:
    check_model(random_config(name))


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mamba", SMALL, "not softmax attention"),
        ("rwkv", SMALL, "state-space or recurrent"),
        ("jamba", {}, "mamba"),
        ("falcon_h1", SMALL, "hybrid"),
        ("qwen3_next", {}, "linear_attention"),
        ("t5", {}, "encoder-decoder"),
        ("deepseek_v3", {}, "MLA"),
        ("bloom", SMALL, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("falcon", SMALL, "attention interface"),
        ("llama4_text", {}, "chunked"),
        ("gemma3", {}, "more than text"),
        ("mllama", {}, "more than text"),
        ("bert", SMALL, "not causal"),
        ("phi3", {"rope_parameters": None, **SMALL}, "longrope"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("gemma3n_text", {}, "share the keys"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_what_the_hook_cannot_carry_is_refused_with_its_reason(
    model_type: str, options: dict[str, Any], reason: str
) -> None:
    with quiet():
        config = AutoConfig.for_model(model_type, **options)
    if reason == "longrope":
        factors = [1.0] * (config.hidden_size // config.num_attention_heads // 2)
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": factors,
            "long_factor": factors,
        }
    with pytest.raises(UnsupportedModel, match=f"{model_type} model.*{reason}") as caught:
        check_model(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["granite", "olmo2", "cohere2", "starcoder2", "gemma"])
def test_other_decoders_are_carried_too(model_type: str) -> None:
    with quiet():
        check_model(AutoConfig.for_model(model_type, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"windows": (None, 95, None, 96)}, "sliding window"),
        ({"num_kv_heads": 3}, "heads"),
        ({"head_dim": 32}, "head_dim"),
        ({"num_layers": 5}, "called the attention interface"),
    ],
)
def test_a_model_that_calls_attention_otherwise_than_its_facts_say_is_refused(
    change: dict[str, Any], said: str
) -> None:
    loaded = load_model(ModelSpec(name="random:tiny-gemma2"), CPU)
    own = loaded.model.config._attn_implementation
    check_attention_calls(loaded.model, loaded.facts)
    with pytest.raises(UnsupportedModel, match=said):
        check_attention_calls(loaded.model, msgspec.structs.replace(loaded.facts, **change))
    assert loaded.model.config._attn_implementation == own
