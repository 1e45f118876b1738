"""What is chosen, what is refused, and with which numbers."""

from __future__ import annotations

import msgspec
import pytest

from ringspan.cluster.messages import ModelFacts, RankReady
from ringspan.cluster.pace import LEAST_TIMEOUT_S, Pace
from ringspan.cluster.planner import (
    PrefillOptions,
    explain,
    kv_bytes,
    memory_need,
    plan_prefill,
    rank_tokens,
)
from ringspan.errors import BadInput, TooLarge, UnknownName

LLAMA_8B = ModelFacts(
    name="random:llama-3.1-8b",
    family="llama",
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    num_params=8_030_000_000,
    flops_per_token=2 * 6_980_000_000.0,
    max_positions=1 << 20,
    dtype="bfloat16",
    fingerprint="00",
    windows=(None,) * 32,
)
TINY = msgspec.structs.replace(
    LLAMA_8B, num_layers=2, num_kv_heads=2, head_dim=64, dtype="float32", max_positions=8192
)


def ranks(world_size: int, device: str = "cuda:0", free_gib: float = 60.0) -> list[RankReady]:
    return [
        RankReady(
            rank=rank,
            device=device,
            device_name="NVIDIA H100" if device.startswith("cuda") else "a CPU",
            host="h",
            pid=1,
            transport="nccl",
            facts=LLAMA_8B,
            weights_bytes=0,
            free_bytes=int(free_gib * 2**30),
            elapsed_s=0.0,
        )
        for rank in range(world_size)
    ]


def test_defaults_are_zigzag_ring_raw_and_large_chunks_on_gpus() -> None:
    plan = plan_prefill(LLAMA_8B, ranks(2), 262_144, 2, PrefillOptions(), context_id="ab")
    assert (plan.layout, plan.scheme, plan.codec) == ("zigzag", "ring", "raw")
    assert (plan.chunk_tokens, plan.page_tokens, plan.context_id) == (65_536, 128, "ab")
    assert plan_prefill(LLAMA_8B, ranks(8), 1 << 20, 8, PrefillOptions()).chunk_tokens == 131_072


def test_chunks_on_cpus_are_small_enough_to_show_progress() -> None:
    plan = plan_prefill(TINY, ranks(3, "cpu"), 8000, 3, PrefillOptions())
    assert plan.chunk_tokens == 6144


def test_a_short_context_is_one_chunk_of_whole_pages() -> None:
    plan = plan_prefill(TINY, ranks(1), 129, 1, PrefillOptions(chunk_tokens=4096))
    assert plan.chunk_tokens == 256
    assert len(plan.chunks) == 1


def test_short_memory_makes_shorter_chunks_before_it_refuses() -> None:
    roomy = plan_prefill(LLAMA_8B, ranks(1, free_gib=60), 131_072, 1, PrefillOptions())
    tight = plan_prefill(LLAMA_8B, ranks(1, free_gib=20), 131_072, 1, PrefillOptions())
    assert tight.chunk_tokens < roomy.chunk_tokens
    assert tight.chunk_tokens % tight.page_tokens == 0


def test_kv_bytes_are_those_of_the_published_shape() -> None:
    plan = plan_prefill(LLAMA_8B, ranks(4), 1 << 20, 4, PrefillOptions())
    assert kv_bytes(plan, LLAMA_8B) == 2 * 32 * 8 * 128 * 2 * (1 << 20)  # DESIGN 7: 137 GB
    assert memory_need(plan, LLAMA_8B, 4).kv_bytes == kv_bytes(plan, LLAMA_8B) // 4


@pytest.mark.parametrize(("num_tokens", "world_size"), [(1, 3), (1000, 2), (5003, 4)])
def test_ranks_hold_all_tokens_once(num_tokens: int, world_size: int) -> None:
    options = PrefillOptions(chunk_tokens=1024)
    plan = plan_prefill(TINY, ranks(world_size), num_tokens, world_size, options)
    assert sum(rank_tokens(plan, world_size)) == num_tokens


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        TooLarge,
        match=r"1,048,576 tokens on 1 rank need 128\.00 GiB of KV.*rank 0 \(NVIDIA H100\) has "
        r"60\.00 GiB free: use more ranks, --codec int8, or a shorter input",
    ):
        plan_prefill(LLAMA_8B, ranks(1), 1 << 20, 1, PrefillOptions())


def test_a_chunk_too_large_for_memory_is_refused_as_that() -> None:
    with pytest.raises(TooLarge, match="use a smaller --chunk-tokens"):
        plan_prefill(
            LLAMA_8B, ranks(1, free_gib=40), 1 << 18, 1, PrefillOptions(chunk_tokens=1 << 18)
        )


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(TooLarge, match=r"8193 tokens do not fit the 8192 positions.*yarn:2"):
        plan_prefill(TINY, ranks(1), 8193, 1, PrefillOptions())


@pytest.mark.parametrize(
    ("asked", "nearest"), [(0, 128), (-5, 128), (1000, 896), (100, 128), (10**12, 1 << 24)]
)
def test_chunk_tokens_that_make_no_sense_get_the_nearest_that_do(asked: int, nearest: int) -> None:
    with pytest.raises(BadInput, match=rf"--chunk-tokens {asked}: .* nearest is {nearest}$"):
        plan_prefill(TINY, ranks(1), 1000, 1, PrefillOptions(chunk_tokens=asked))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (PrefillOptions(layout="spiral"), "unknown layout 'spiral'; known: contiguous"),
        (PrefillOptions(scheme="star"), "unknown scheme 'star'; known: all-gather, ring"),
        (PrefillOptions(codec="int3"), "unknown codec 'int3'; known: bf16"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(options: PrefillOptions, text: str) -> None:
    with pytest.raises(UnknownName, match=text):
        plan_prefill(TINY, ranks(1), 1000, 1, options)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(BadInput, match="no tokens"):
        plan_prefill(TINY, ranks(1), 0, 1, PrefillOptions())


def test_the_explanation_names_what_was_chosen() -> None:
    plan = plan_prefill(LLAMA_8B, ranks(2), 262_144, 2, PrefillOptions())
    text = explain(plan, LLAMA_8B, ranks(2))
    for word in ("262,144 tokens", "2 ranks", "4 chunks of 65,536", "zigzag", "ring", "32.00 GiB"):
        assert word in text


def test_the_time_left_grows_with_the_work_not_with_the_tokens() -> None:
    plan = plan_prefill(LLAMA_8B, ranks(1, free_gib=500), 1 << 20, 1, PrefillOptions())
    pace = Pace(plan, LLAMA_8B)
    assert pace.left_s() == 0.0
    pace.done(10.0)
    by_tokens_s = 10.0 * (len(plan.chunks) - 1)
    assert pace.left_s() > 3 * by_tokens_s
    assert pace.timeout_s(1) >= LEAST_TIMEOUT_S
    for _ in plan.chunks[1:]:
        pace.done(10.0)
    assert pace.left_s() == 0.0
