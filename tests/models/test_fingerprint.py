"""The fingerprint changes with whatever changes K or V, and with nothing else."""

from __future__ import annotations

import pytest
import torch

from ringspan.attention.models.fingerprint import config_fields, fingerprint
from ringspan.attention.models.load import load_model
from ringspan.specs import ModelSpec

CPU = torch.device("cpu")


def test_one_bit_of_one_weight_changes_it() -> None:
    model = load_model(ModelSpec(name="random:tiny"), CPU).model
    before = fingerprint(model)
    weight = model.model.layers[2].self_attn.k_proj.weight.data
    weight.view(torch.int32)[5, 7] ^= 1
    assert fingerprint(model) != before
    weight.view(torch.int32)[5, 7] ^= 1
    assert fingerprint(model) == before


def test_two_weights_in_each_others_place_change_it() -> None:
    model = load_model(ModelSpec(name="random:tiny"), CPU).model
    before = fingerprint(model)
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight, attention.v_proj.weight = (
        attention.v_proj.weight,
        attention.k_proj.weight,
    )
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("sliding_window", 64), ("query_pre_attn_scalar", 32)],
)
def test_config_fields_that_change_k_or_v_change_it(field: str, value: float) -> None:
    model = load_model(ModelSpec(name="random:tiny-gemma2"), CPU).model
    before = fingerprint(model)
    setattr(model.config, field, value)
    assert fingerprint(model) != before


def test_names_paths_and_limits_do_not_change_it() -> None:
    model = load_model(ModelSpec(name="random:tiny"), CPU).model
    before = fingerprint(model)
    model.config.max_position_embeddings = 17
    model.config.eos_token_id = 3
    model.config._name_or_path = "elsewhere"
    model.set_attn_implementation("eager")
    assert fingerprint(model) == before
    assert "rope_parameters" in config_fields(model.config)


def test_dtype_changes_it() -> None:
    specs = [ModelSpec(name="retriever", dtype=dtype) for dtype in ("float32", "bfloat16")]
    one, other = (load_model(spec, CPU).facts.fingerprint for spec in specs)
    assert one != other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_cpus_fingerprint(dtype: str) -> None:
    spec = ModelSpec(name="retriever:q=32,kv=8,margin=0.1", dtype=dtype)
    on_cpu = load_model(spec, CPU).facts.fingerprint
    assert load_model(spec, torch.device("cuda")).facts.fingerprint == on_cpu
