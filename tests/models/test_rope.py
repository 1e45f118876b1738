"""`--rope-scaling`."""

from __future__ import annotations

import math

import pytest
import torch

from ringspan.attention.models.load import load_model
from ringspan.attention.models.random_init import random_config
from ringspan.attention.models.rope import apply_rope_scaling, parse_rope_scaling
from ringspan.errors import BadInput
from ringspan.specs import ModelSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yarn",
        "yarn:",
        "yarn:x",
        "yarn:0.5",
        "yarn:nan",
        "yarn:inf",
        "yarn:-4",
        "linear:0",
        "theta:1",
        "theta:-5",
        "theta:",
        "ntk:4",
        "dynamic",
        "dynamic:2",
        "longrope:2",
        ":4",
    ],
)
def test_anything_unreadable_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_rope_scaling(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("yarn:4", 32768),
        ("linear:2.5", 20480),
        ("theta:500000", int(8192 * 50 ** (62 / 64))),
    ],
)
def test_positions_grow_by_the_factor(text: str, positions: int) -> None:
    config = random_config("tiny-llama")
    apply_rope_scaling(config, text)
    assert config.max_position_embeddings == positions


def test_linear_scaling_divides_every_frequency() -> None:
    plain = load_model(ModelSpec(name="random:tiny-llama"), CPU)
    scaled = load_model(ModelSpec(name="random:tiny-llama", rope_scaling="linear:2"), CPU)
    own, halved = (m.model.model.rotary_emb.inv_freq for m in (plain, scaled))
    assert torch.equal(halved, own / 2)
    assert plain.facts.fingerprint != scaled.facts.fingerprint


def test_yarn_keeps_the_fast_pairs_and_stretches_the_slow_ones() -> None:
    plain = load_model(ModelSpec(name="random:tiny-llama"), CPU)
    scaled = load_model(ModelSpec(name="random:tiny-llama", rope_scaling="yarn:4"), CPU)
    ratio = scaled.model.model.rotary_emb.inv_freq / plain.model.model.rotary_emb.inv_freq
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(0.25)
    rotary = scaled.model.model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_only_the_full_layers_of_gemma3_are_scaled() -> None:
    plain, config = random_config("tiny-gemma3"), random_config("tiny-gemma3")
    apply_rope_scaling(config, "linear:8")
    assert config.rope_parameters["full_attention"]["factor"] == 8
    own = plain.rope_parameters["sliding_attention"]
    assert config.rope_parameters["sliding_attention"] == own
    loaded = load_model(ModelSpec(name="random:tiny-gemma3", rope_scaling="yarn:4"), CPU)
    assert loaded.facts.max_positions == 32768


def test_scaling_is_not_piled_on_a_scaled_model_but_theta_is() -> None:
    config = random_config("llama-3.1-8b")
    with pytest.raises(BadInput, match="scaled by llama3 already"):
        apply_rope_scaling(config, "yarn:4")
    apply_rope_scaling(config, "theta:8000000")
    assert config.rope_parameters["rope_type"] == "llama3"
    with pytest.raises(BadInput, match="above the model's own"):
        apply_rope_scaling(config, "theta:1000")


def test_yarn_on_a_yarn_model_counts_from_its_original_positions() -> None:
    config = random_config("tiny-llama")
    apply_rope_scaling(config, "yarn:2")
    apply_rope_scaling(config, "yarn:8")
    assert config.max_position_embeddings == 8 * 8192
