"""Distributed equals single: ranks in loopback against the unmodified transformers model."""

import functools
import inspect
import itertools

import msgspec
import numpy as np
import pytest
import torch

from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.models.load import load_model
from ringspan.attention.models.tokenizer import load_tokenizer, tokenize_documents
from ringspan.attention.schemes.table import SCHEMES
from ringspan.cluster.messages import AnswerRequest, GangSpec, ModelSpec, PrefillPlan
from ringspan.cluster.rank import Rank
from ringspan.errors import BadInput, TooLarge
from ringspan.types import Span, page_tokens_for

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
            [lambda r=r, i=index: r.chunk_logits(plan.context_id, i) for r in ranks]
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


COMBINATIONS = list(
    itertools.product(["contiguous", "zigzag", "striped"], ["ring", "all-gather"], [True, False])
)
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt-oss"]


@functools.cache
def single(model_name):
    """The unmodified model, with transformers' own attention."""
    return load_model(ModelSpec(name=model_name, dtype="float32"), torch.device("cpu"))


@functools.cache
@torch.inference_mode()
def reference(model_name, ids, num_more):
    """Logits [n, vocabulary], the greedy continuation, and the logits it was chosen from."""
    model = single(model_name).model
    out = model(torch.tensor([ids]), use_cache=True)
    logits, greedy, steps = out.logits[0], [], []
    for position in range(len(ids), len(ids) + num_more):
        steps.append(out.logits[0, -1])
        greedy.append(int(steps[-1].argmax()))
        out = model(
            torch.tensor([greedy[-1:]]),
            past_key_values=out.past_key_values,
            position_ids=torch.tensor([[position]]),
            use_cache=True,
        )
    return logits, greedy, steps


def make_plan(model, n, chunk_tokens, layout="zigzag", scheme="ring", codec="raw"):
    return PrefillPlan(
        context_id="c",
        num_tokens=n,
        page_tokens=page_tokens_for(single(model).facts.head_dim),
        chunk_tokens=chunk_tokens,
        layout=layout,
        scheme=scheme,
        codec=codec,
    )


def text_ids(model, n):
    if model == "smollm2":
        tokenizer = load_tokenizer(ModelSpec(name=model))
        return tuple(tokenize_documents(tokenizer, [inspect.getsource(inspect)])[:n].tolist())
    vocabulary = single(model).model.config.vocab_size
    return tuple(np.random.default_rng(1).integers(0, vocabulary, n).tolist())


def assert_same_greedy(got, want, steps):
    """Equal tokens; where they part, the two candidates' logits are one within tolerance."""
    assert len(got) == len(want)
    for ours, theirs, logits in zip(got, want, steps, strict=True):
        if ours != theirs:
            assert (logits[theirs] - logits[ours]) <= 2 * RELATIVE * logits.abs().max()
            return


def check_equals_single(model, world_size, n, question=7, num_more=64, combinations=COMBINATIONS):
    ids = text_ids(model, n)
    context = np.array(ids[: n - question], dtype=np.int32)
    logits, greedy, steps = reference(model, ids, num_more)
    want = logits[: len(context)]
    world, ranks = gang(model, world_size)
    page_tokens = page_tokens_for(single(model).facts.head_dim)
    for layout, scheme, chunked in combinations:
        chunk_tokens = page_tokens * (3 if chunked else 1024)
        plan = make_plan(model, len(context), chunk_tokens, layout, scheme)
        got = prefill(world, ranks, plan, context)
        error = (got - want).abs().max() / want.abs().max()
        assert error <= RELATIVE, f"{layout} {scheme} chunked={chunked}: {error:.2g}"
    request = AnswerRequest(
        session_id="s", context_id="c", token_ids=ids[n - question :], max_tokens=num_more
    )
    assert_same_greedy(generate(world, ranks, request), greedy, steps)


QUICK = {(family, 2) for family in FAMILIES} | {("llama", 1), ("llama", 4), ("gpt-oss", 4)}
"""Families and world sizes; the others are slow together."""


@pytest.mark.parametrize(
    ("family", "world_size"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(FAMILIES, (1, 2, 3, 4))
    ],
)
def test_distributed_equals_single(family, world_size):
    num_more = 32 if world_size == 2 else 8  # every rank computes every token of a tail
    check_equals_single(f"random:tiny-{family}", world_size, 645, num_more=num_more)


@pytest.mark.parametrize("n", [8, 135, 263])
def test_odd_lengths_equal_single(n):
    check_equals_single("random:tiny-llama", 3, n, num_more=5)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_every_scheme_equals_single(family):
    """Windows, soft-capping, sinks, chunks over a prefix, in the whole model."""
    new = [name for name in SCHEMES if name not in ("ring", "all-gather")]
    combinations = [("zigzag", scheme, True) for scheme in new]
    check_equals_single(f"random:tiny-{family}", 2, 645, num_more=2, combinations=combinations)


def test_a_deterministic_prefill_repeats_bit_for_bit_and_is_right():
    model = "random:tiny-gemma2"
    ids = np.array(text_ids(model, 645), dtype=np.int32)
    want, _, _ = reference(model, tuple(ids.tolist()), 1)
    world, ranks = gang(model, 3)
    plan = make_plan(model, len(ids), 384)
    plan = msgspec.structs.replace(plan, deterministic=True)
    first, second = (prefill(world, ranks, plan, ids) for _ in range(2))
    assert torch.equal(first, second)
    assert (first - want).abs().max() <= RELATIVE * want.abs().max()


def test_smollm2_equals_single():
    combinations = [("zigzag", "ring", True), ("striped", "all-gather", False)]
    check_equals_single("smollm2", 3, 521, num_more=8, combinations=combinations)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_smollm2_equals_single_in_every_combination(world_size):
    check_equals_single("smollm2", world_size, 901)


def test_a_second_turn_goes_on_where_the_first_stopped():
    """Two turns in one session equal one long prompt."""
    model = "random:tiny-llama"
    ids = text_ids(model, 300)
    world, ranks = gang(model, 3)
    prefill(world, ranks, make_plan(model, 200, 256), np.array(ids[:200], dtype=np.int32))
    first = generate(
        world,
        ranks,
        AnswerRequest(session_id="s", context_id="c", token_ids=ids[200:250], max_tokens=150),
    )
    second = generate(
        world,
        ranks,
        AnswerRequest(session_id="s", context_id="c", token_ids=ids[250:300], max_tokens=20),
    )
    _, want, steps = reference(model, (*ids[:250], *first, *ids[250:300]), 20)
    assert_same_greedy(second, want, steps)


@pytest.mark.parametrize(
    ("codec", "allowed"), [("bf16", 0.02), ("int8", 0.05), ("fp8", 0.15), ("int4", 0.3)]
)
@pytest.mark.parametrize("scheme", ["ring", "all-gather"])
def test_lossy_pages_stay_close_and_change_something(codec, allowed, scheme):
    model = "random:tiny-llama"
    ids = text_ids(model, 800)
    want, _, _ = reference(model, ids, 1)
    world, ranks = gang(model, 3)
    plan = make_plan(model, 800, 384, scheme=scheme, codec=codec)
    got = prefill(world, ranks, plan, np.array(ids, dtype=np.int32))
    error = float((got - want).norm() / want.norm())
    assert 1e-6 < error < allowed
    first = (got[:384] - want[:384]).abs().max() / want.abs().max()
    assert first <= RELATIVE  # a chunk's own keys are used as computed


def test_all_ranks_hold_all_tokens_once_and_rounds_of_tail_pages():
    model = "random:tiny-llama"
    world, ranks = gang(model, 3)
    plan = make_plan(model, 1000, 512)
    prefill(world, ranks, plan, np.array(text_ids(model, 1000), dtype=np.int32))
    held = [rank.contexts["c"].shard.spans for rank in ranks]
    positions = sorted(i for spans in held for s in spans for i in range(s.start, s.stop))
    assert positions == list(range(1000))
    request = AnswerRequest(session_id="s", context_id="c", token_ids=(1,) * 290, max_tokens=1)
    generate(world, ranks, request)
    tails = [rank.answers._sessions["s"].tail.spans for rank in ranks]
    assert tails == [
        (Span(1152, 1280),),
        (Span(1000, 1024), Span(1280, 1290)),
        (Span(1024, 1152),),
    ]


def test_what_is_ended_and_dropped_gives_its_memory_back():
    model = "random:tiny-llama"
    world, ranks = gang(model, 2)
    prefill(world, ranks, make_plan(model, 300, 512), np.zeros(300, dtype=np.int32))
    for session in ("a", "b", "a"):
        request = AnswerRequest(
            session_id=session, context_id="c", token_ids=(1, 2, 3), max_tokens=2
        )
        generate(world, ranks, request)
    pool = ranks[0].contexts._runtime.pool
    assert sorted(name.split()[0] for name in pool.shards) == ["context", "tails", "tails"]
    world.run([lambda r=r: r.end_session("a") for r in ranks])
    assert len(pool.shards) == 2
    world.run([lambda r=r: r.drop("c") for r in ranks])
    assert not pool.shards
    assert pool.in_use_bytes == 0


def test_a_context_that_does_not_fit_is_refused_with_the_numbers():
    world, (rank,) = gang("random:tiny-llama", 1)
    plan = make_plan("random:tiny-llama", 10**8, 2**20)
    ids = np.broadcast_to(np.int32(0), (10**8,))
    with pytest.raises(TooLarge, match=r"context c needs [\d.]+ GiB of KV on cpu, [\d.]+ GiB are"):
        world.run([lambda: rank.begin_prefill(plan, ids)])


def test_a_chunk_out_of_order_and_an_unknown_context_are_refused():
    world, (rank,) = gang("random:tiny-llama", 1)
    plan = make_plan("random:tiny-llama", 300, 128)
    world.run([lambda: rank.begin_prefill(plan, np.zeros(300, dtype=np.int32))])
    with pytest.raises(BadInput, match="chunk 2 of context c came, 0 is next"):
        world.run([lambda: rank.prefill_chunk("c", 2)])
    with pytest.raises(BadInput, match="does not hold context other"):
        world.run([lambda: rank.prefill_chunk("other", 0)])


def test_a_conversation_beyond_the_models_positions_is_refused():
    world, ranks = gang("random:tiny-llama", 1)
    limit = single("random:tiny-llama").facts.max_positions
    prefill(world, ranks, make_plan("random:tiny-llama", 20, 128), np.zeros(20, dtype=np.int32))
    request = AnswerRequest(session_id="s", context_id="c", token_ids=(1, 2), max_tokens=limit - 21)
    with pytest.raises(TooLarge, match=f"position {limit + 1} is beyond the {limit}"):
        generate(world, ranks, request)
