"""Distributed equals single: ranks in loopback against the unmodified transformers model."""

import itertools

import numpy as np
import pytest
import torch

from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.models.load import load_model
from ringspan.cluster.messages import GangSpec, ModelSpec, PrefillPlan
from ringspan.cluster.rank import Rank
from ringspan.types import page_tokens_for

RELATIVE = 1e-5
"""Largest difference of fp32 logits over the largest |logit|: the issue's line."""


def gang(model: str, world_size: int, **options: object) -> tuple[LoopbackWorld, list[Rank]]:
    world = LoopbackWorld(world_size, timeout_s=60.0, poison=True)
    spec = GangSpec(
        world_size=world_size,
        model=ModelSpec(name=model, dtype="float32"),
        transport="loopback",
        device="cpu",
        threads=2,
        **options,
    )
    ranks = [Rank(rank, spec) for rank in range(world_size)]
    world.run([lambda rank=rank: rank.start(world) for rank in ranks])
    return world, ranks


def prefill(world, ranks, plan, ids):
    """The whole context's logits [n, vocabulary]."""
    world.run([lambda r=r: r.begin_prefill(plan, ids) for r in ranks])
    logits = None
    for index in range(len(plan.chunks)):
        for spans, rows in world.run(
            [lambda r=r: r.chunk_logits(plan.context_id, index) for r in ranks]
        ):
            if logits is None:
                logits = np.full((plan.num_tokens, rows.shape[1]), np.nan, dtype=np.float32)
            row = 0
            for span in spans:
                logits[span.start : span.stop] = rows[row : row + span.tokens]
                row += span.tokens
    return torch.from_numpy(logits)


def generate(world, ranks, request):
    out = world.run([lambda r=r: [c.token_id for c in r.generate(request)] for r in ranks])
    assert all(tokens == out[0] for tokens in out)
    return out[0]


_single = {}


def single(model_name):
    if model_name not in _single:
        spec = ModelSpec(name=model_name, dtype="float32")
        _single[model_name] = load_model(spec, torch.device("cpu"))
    return _single[model_name]


def make_plan(n, chunk_tokens, layout, scheme, codec="raw", page_tokens=128):
    return PrefillPlan(
        context_id="c",
        num_tokens=n,
        page_tokens=page_tokens,
        chunk_tokens=chunk_tokens,
        layout=layout,
        scheme=scheme,
        codec=codec,
    )


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"]
CASES = list(
    itertools.product([1, 2, 3, 4], ["contiguous", "zigzag", "striped"], ["ring", "all-gather"])
)


@torch.inference_mode()
def reference(model_name, ids, more):
    """Logits of `ids` and the greedy continuation, one process, transformers' own attention."""
    model = single(model_name).model
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    out = model(tokens, use_cache=True)
    logits, cache, greedy, steps = out.logits[0], out.past_key_values, [], []
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers_on_three_ranks(family):
    name = f"random:tiny-{family}"
    vocabulary = single(name).model.config.vocab_size
    ids = np.random.default_rng(1).integers(0, vocabulary, 901).astype(np.int32)
    want = reference(name, ids, 0)
    world, ranks = gang(name, 3)
    page_tokens = page_tokens_for(single(name).facts.head_dim)
    for chunk_tokens in (page_tokens * 3, page_tokens * 16):
        plan = make_plan(901, chunk_tokens, "zigzag", "ring", page_tokens=page_tokens)
        got = prefill(world, ranks, plan, ids)
        assert (got - want).abs().max() <= RELATIVE * want.abs().max()
