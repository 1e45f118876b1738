"""Loading models by name."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import msgspec
import pytest
import torch

from ringspan.attention.models.load import facts_from_config, load_model
from ringspan.attention.models.random_init import RANDOM_CONFIGS
from ringspan.attention.models.tokenizer import load_tokenizer
from ringspan.errors import BadInput, UnknownName
from ringspan.specs import ModelSpec

CPU = torch.device("cpu")
TINY = [name for name in RANDOM_CONFIGS if name.startswith("tiny")]


@pytest.mark.parametrize("name", TINY)
def test_a_random_model_is_the_same_for_a_seed_and_another_for_another(name: str) -> None:
    one, same, other = (
        load_model(ModelSpec(name=f"random:{name}", seed=seed), CPU) for seed in (3, 3, 4)
    )
    assert one.facts == same.facts
    assert one.facts.fingerprint != other.facts.fingerprint
    for a, b in zip(one.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
        assert a.isfinite().all()
        assert not a.requires_grad


@pytest.mark.parametrize("name", TINY)
def test_facts_need_no_weights(name: str) -> None:
    spec = ModelSpec(name=f"random:{name}", dtype="bfloat16")
    loaded = load_model(spec, CPU).facts
    assert facts_from_config(spec, CPU) == msgspec.structs.replace(loaded, fingerprint="")


def test_the_large_models_have_the_shapes_they_are_named_after() -> None:
    llama = facts_from_config(ModelSpec(name="random:llama-3.1-8b"), CPU)
    qwen = facts_from_config(ModelSpec(name="random:qwen3-8b"), CPU)
    assert llama.num_params == 8_030_261_248
    assert qwen.num_params == 8_190_735_360
    assert (llama.num_q_heads, llama.num_kv_heads, llama.head_dim) == (32, 8, 128)
    assert (qwen.num_layers, qwen.num_kv_heads, qwen.head_dim) == (36, 8, 128)


def test_rotary_frequencies_stay_fp32_in_a_bf16_model() -> None:
    loaded = load_model(ModelSpec(name="random:tiny", dtype="bfloat16"), CPU)
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert next(loaded.model.parameters()).dtype == torch.bfloat16


def test_a_saved_folder_loads_as_the_same_model_and_has_no_tokenizer(tmp_path: Path) -> None:
    made = load_model(ModelSpec(name="random:tiny-qwen3"), CPU)
    made.model.save_pretrained(tmp_path)
    spec = ModelSpec(name=str(tmp_path))
    read = load_model(spec, CPU)
    assert read.facts.fingerprint == made.facts.fingerprint
    assert read.weights_bytes == made.weights_bytes
    assert load_tokenizer(spec) is None
    assert load_tokenizer(ModelSpec(name="random:tiny")) is None


def test_a_broken_folder_is_one_clear_line(tmp_path: Path) -> None:
    load_model(ModelSpec(name="random:tiny"), CPU).model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(BadInput, match="cannot load model") as caught:
        load_model(ModelSpec(name=str(tmp_path)), CPU)
    assert "\n" not in str(caught.value)


def test_junk_in_a_gguf_file_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BadInput, match="cannot read the GGUF file"):
        load_model(ModelSpec(name=str(path)), CPU)
    assert not list((tmp_path / "cache" / "gguf").glob("*.partial"))


def test_an_unreachable_hub_id_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="could not be fetched from the hub") as caught:
        load_model(ModelSpec(name="no-such-org/no-such-model"), CPU)
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"known: .*bfloat16"):
        load_model(ModelSpec(name="random:tiny", dtype="fp8"), CPU)


@pytest.mark.slow
def test_smollm2_answers_a_question() -> None:
    from ringspan.attention.models.chat import split_chat

    spec = ModelSpec(name="smollm2", rope_scaling="yarn:4")
    loaded = load_model(spec, CPU)
    assert loaded.facts.num_params == 134_515_008
    assert loaded.facts.max_positions == 32768
    tokenizer = load_tokenizer(spec)
    frame = split_chat(tokenizer)
    assert frame is not None
    # Asked without a document: `after` begins with the empty line that would end it.
    ids = [*frame.before, *frame.after("What is the capital of France?")]
    out = loaded.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=2,
    )
    assert "Paris" in tokenizer.decode(out[0, len(ids) :])
    assert frame.stop_ids == (2,)
