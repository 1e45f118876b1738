import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaConfig, MixtralConfig

from ringspan.attention.models.random_init import random_config, random_model
from ringspan.attention.models.tiling import Tiled, activation_bytes, tile_model
from ringspan.kernels import rms_norm, rope, swiglu

FAMILIES = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-gemma2", "tiny-gemma3"]


def make(config, dtype=torch.float32):
    config = random_config(config) if isinstance(config, str) else config
    return random_model(config, dtype, torch.device("cpu"), seed=0)


def run(model, tokens):
    ids = torch.randint(900, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def modeling(model):
    return sys.modules[type(model).__module__]


@pytest.fixture
def put_back(monkeypatch):
    """The rotary function of a model's modeling module is as it was after the test."""

    def keep(model):
        monkeypatch.setattr(
            modeling(model), "apply_rotary_pos_emb", modeling(model).apply_rotary_pos_emb
        )

    return keep


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiled_model_gives_the_logits_of_the_untiled_one(name, fuse, put_back):
    model = make(name)
    put_back(model)
    wanted = [run(model, tokens) for tokens in (1, 37)]
    layers = model.config.num_hidden_layers
    done = tile_model(model, 8, fuse=fuse)  # 37 = 4 * 8 + 5
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    fused = (layers, norms, 1) if fuse else (0, 0, 0)
    assert done == Tiled(8, layers, *fused, left_alone=())
    for tokens, logits in zip((1, 37), wanted, strict=True):
        torch.testing.assert_close(run(model, tokens), logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2"])
def test_half_precision_is_recognised_too(name, put_back):
    model = make(name, torch.bfloat16)
    put_back(model)
    wanted = run(model, 37)
    done = tile_model(model, 8, fuse=True)
    assert done.fused_mlps == model.config.num_hidden_layers
    assert done.fused_norms > 2 * model.config.num_hidden_layers
    assert done.left_alone == ()
    got = run(model, 37)
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_the_mlp_sees_one_tile_at_a_time():
    model = make("tiny-llama")
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda module, args, out: seen.append(out.shape[1])
    )
    tile_model(model, 8)
    seen.clear()
    run(model, 21)
    assert seen == [8, 8, 5]


def test_tiling_again_replaces_the_first_tiling(put_back):
    model = make("tiny-qwen3")
    put_back(model)
    wanted = run(model, 19)
    first, second = tile_model(model, 8, fuse=True), tile_model(model, 5, fuse=True)
    assert second == first._replace(tile_rows=5)
    mlp = model.model.layers[0].mlp
    assert mlp.forward.ringspan_original.__func__ is type(mlp).forward
    rotate = modeling(model).apply_rotary_pos_emb
    assert not hasattr(rotate.ringspan_original, "ringspan_original")
    torch.testing.assert_close(run(model, 19), wanted, rtol=1e-5, atol=2e-5)
    plain = tile_model(model, 5, fuse=False)
    assert plain.fused_norms == plain.fused_mlps == 0
    assert "forward" not in model.model.norm.__dict__


def test_a_forward_that_somebody_else_put_there_is_kept():
    model = make("tiny-llama")
    mlp = model.model.layers[0].mlp
    theirs = type(mlp).forward.__get__(mlp)
    calls = []
    mlp.forward = lambda x: calls.append(x.shape[1]) or theirs(x)
    tile_model(model, 4)
    tile_model(model, 3)
    calls.clear()
    run(model, 7)
    assert calls == [3, 3, 1]


def test_a_mixture_whose_rows_are_independent_is_tiled():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=1024, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = make(config)
    wanted = run(model, 21)
    assert tile_model(model, 8).mlps == 2
    torch.testing.assert_close(run(model, 21), wanted, rtol=1e-5, atol=2e-5)


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("module", "said"),
    [(Mixing, "depends on the rows"), (Pair, "one tensor"), (Failing, "KeyError")],
)
def test_an_mlp_that_is_not_row_by_row_is_left_alone_and_named(module, said):
    model = make("tiny-llama")
    model.model.layers[1].mlp = module()
    done = tile_model(model, 8)
    assert done.mlps == 3
    (told,) = done.left_alone
    assert told.startswith(f"1 {module.__name__}: ")
    assert said in told
    assert "forward" not in model.model.layers[1].mlp.__dict__


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_another_activation_is_tiled_but_not_fused(act, put_back):
    config = random_config("tiny-llama")
    config.hidden_act = act  # the exact GELU is not its tanh form
    model = make(config)
    put_back(model)
    wanted = run(model, 21)
    done = tile_model(model, 8, fuse=True)
    assert (done.mlps, done.fused_mlps) == (4, 0)
    assert done.left_alone == ("4 LlamaMLP: its gated product is not one of ours, tiled as it is",)
    torch.testing.assert_close(run(model, 21), wanted, rtol=1e-5, atol=2e-5)


class OddRMSNorm(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), 1e-6

    def forward(self, x):
        return self.weight * x / x.abs().mean(-1, keepdim=True)


def test_a_norm_or_a_rotary_function_that_computes_something_else_is_left_alone(monkeypatch):
    model = make("tiny-llama")
    original = modeling(model).apply_rotary_pos_emb

    def interleaved(q, k, cos, sin):
        return original(q.roll(1, -1), k.roll(1, -1), cos, sin)

    monkeypatch.setattr(modeling(model), "apply_rotary_pos_emb", interleaved)
    model.model.norm = OddRMSNorm(192).requires_grad_(False)
    done = tile_model(model, 8, fuse=True)
    assert (done.fused_norms, done.fused_ropes) == (8, 0)
    assert any("OddRMSNorm: computes something else" in told for told in done.left_alone)
    assert any("apply_rotary_pos_emb: computes something else" in told for told in done.left_alone)
    assert modeling(model).apply_rotary_pos_emb is interleaved


def test_arguments_that_the_fused_rotary_does_not_know_reach_the_original(put_back):
    model = make("tiny-llama")
    put_back(model)
    original = modeling(model).apply_rotary_pos_emb
    tile_model(model, 8, fuse=True)
    rotate = modeling(model).apply_rotary_pos_emb
    assert rotate is not original
    q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
    cos, sin = torch.randn(2, 1, 5, 8)
    got, wanted = (f(q, k, cos, sin, unsqueeze_dim=2) for f in (rotate, original))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_training_mode_and_no_rows_are_refused():
    model = make("tiny-llama")
    with pytest.raises(ValueError, match="at least 1"):
        tile_model(model, 0)
    with pytest.raises(ValueError, match="training"):
        tile_model(model.train(), 8)


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages that operations made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):  # a weight or what came in: not ours to count
                self.known.setdefault(x.untyped_storage(), 0)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known[storage] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def forget(self, num_bytes):
        self.now -= num_bytes


def hollow_attention(module, query, key, value, attention_mask, **kwargs):
    """Takes the place of the ring: its result, and nothing else."""
    return torch.zeros_like(query.transpose(1, 2)), None


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [704, 4000], ids=["narrow", "wide"])
def test_activation_bytes_are_those_that_were_counted(fused, dtype, width, monkeypatch, put_back):
    for module in (rms_norm, rope, swiglu):  # a CPU's scratch is not what a GPU has
        monkeypatch.setattr(module, "_TILE_ELEMENTS", 1 << 12)
    AttentionInterface.register("hollow", hollow_attention)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=width, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = make(config, dtype)
    put_back(model)
    model.set_attn_implementation("hollow")
    rows, tile = 2000, 300
    tile_model(model, tile, fuse=fused)
    ids, positions = torch.zeros(1, rows, dtype=torch.int64), torch.arange(rows)[None]
    with torch.no_grad(), LiveBytes() as live:
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    assert activation_bytes(model, rows, tile, fused=fused) == pytest.approx(live.peak, rel=0.15)
    assert live.now < live.peak / 4


def test_activation_bytes_of_a_config_need_a_dtype():
    config = random_config("llama-3.1-8b")
    with pytest.raises(ValueError, match="dtype"):
        activation_bytes(config, 1024, 256)
    small, large = (
        activation_bytes(config, rows, 256, dtype=torch.bfloat16) for rows in (1024, 65536)
    )
    assert 60 * small < large <= 64 * small
    named = SimpleNamespace(config=config, dtype=torch.bfloat16)
    assert activation_bytes(named, 1024, 256) == small
