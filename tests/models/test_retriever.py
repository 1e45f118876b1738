"""The constructed retriever, with plain transformers attention and cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from ringspan.attention.models.load import load_model
from ringspan.attention.models.needles import Haystack, plant, score
from ringspan.specs import ModelSpec

CPU = torch.device("cpu")


def hits(
    name: str, haystack: Haystack, noise_db: float | None = None, dtype: str = "float32"
) -> int:
    """Needles found; with noise that many dB below the K and V that answers are read from."""
    model = load_model(ModelSpec(name=name, dtype=dtype), CPU).model
    return hits_of(model, haystack, noise_db)


def hits_of(model: PreTrainedModel, haystack: Haystack, noise_db: float | None = None) -> int:
    tokens = len(haystack.token_ids)
    cache = DynamicCache()
    answers = []
    with torch.no_grad():
        ids = torch.from_numpy(haystack.token_ids).long()[None]
        model.model(ids, past_key_values=cache, use_cache=True)
        if noise_db is not None:
            _add_noise(cache, noise_db)
        for key in haystack.keys:
            logits = model(
                torch.tensor([[int(key)]]),
                position_ids=torch.tensor([[tokens]]),
                past_key_values=cache,
                use_cache=True,
            ).logits
            cache.crop(-1)
            answers.append(int(logits[0, -1].argmax()))
    return score(answers, haystack)


def _add_noise(cache: DynamicCache, noise_db: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            used = x.abs() > 1e-3 * x.abs().max()  # half of the dims are zero by construction
            rms = (x.square().sum(-1, keepdim=True) / used.sum(-1, keepdim=True)).sqrt()
            x += torch.randn(x.shape, generator=generator) * rms * 10 ** (-noise_db / 20)


@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [
        ("retriever", 2048, "float32"),
        ("retriever:q=32,kv=8", 1024, "float32"),
        ("retriever:q=6,kv=3", 517, "float32"),
        ("retriever:margin=0.02", 1024, "float32"),
        ("retriever:margin=0.05", 1024, "bfloat16"),
    ],
)
def test_every_needle_is_found(name: str, tokens: int, dtype: str) -> None:
    assert hits(name, plant(tokens, 32, seed=1), dtype=dtype) == 32


def test_a_narrow_margin_feels_noise_that_a_wide_one_forgives() -> None:
    haystack = plant(1024, 32, seed=2)
    assert hits("retriever", haystack, noise_db=20) == 32
    assert hits("retriever:margin=0.05", haystack, noise_db=40) == 32
    assert hits("retriever:margin=0.05", haystack, noise_db=20) < 28
    assert hits("retriever:margin=0.02", haystack, noise_db=20) < 8


def test_q_heads_paired_with_the_wrong_kv_heads_miss() -> None:
    haystack = plant(512, 8, seed=3)
    model = load_model(ModelSpec(name="retriever:q=8,kv=4"), CPU).model
    second = model.model.layers[1].self_attn
    assert hits_of(model, haystack) == 8
    for projection in (second.k_proj, second.v_proj):
        heads = projection.weight.data.view(4, 128, -1)
        heads.copy_(heads.roll(1, dims=0))  # as if q heads had been handed their neighbours'
    assert hits_of(model, haystack) <= 2


def test_the_same_seed_constructs_the_same_model() -> None:
    one, same, other = (
        load_model(ModelSpec(name="retriever", seed=seed), CPU).facts for seed in (0, 0, 1)
    )
    assert one == same
    assert one.fingerprint != other.fingerprint
    assert one.max_positions == 1 << 21
