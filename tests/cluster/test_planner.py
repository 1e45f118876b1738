"""What is chosen, what is refused, and with which numbers."""

from __future__ import annotations

import msgspec
import pytest

from ringspan.attention.cost import Link, assumed_speeds
from ringspan.attention.staging import PLACES
from ringspan.cluster.memory import way_of
from ringspan.cluster.messages import ModelFacts, RankReady
from ringspan.cluster.pace import LEAST_TIMEOUT_S, Pace
from ringspan.cluster.planner import (
    Candidate,
    PrefillOptions,
    candidates,
    choose,
    choose_scheme,
    explain,
    known_speeds,
    kv_bytes,
    memory_need,
    plan_prefill,
    rank_tokens,
    with_prediction,
)
from ringspan.cluster.predict import Way, predict
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


NVLINK = Link(latency_s=8e-5, bytes_per_s=3.5e11)
ETHERNET = Link(latency_s=1e-4, bytes_per_s=3e9)


def measured(world_size: int, free_gib: float = 100.0, link: Link = NVLINK) -> list[RankReady]:
    """Ranks that know their speeds."""
    speeds = assumed_speeds("h200", LLAMA_8B)
    return [
        msgspec.structs.replace(rank, speeds=speeds, link=link, tile_rows=8192)
        for rank in ranks(world_size, free_gib=free_gib)
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
    need = memory_need(way_of(plan, 4), LLAMA_8B)
    assert need.kv_bytes == kv_bytes(plan, LLAMA_8B) // 4
    # two buffers of one layer's shard: one arrives while the other is attended
    assert need.exchange_bytes == 2 * 2 * 8 * 128 * 2 * (1 << 20) // 4


@pytest.mark.parametrize(("num_tokens", "world_size"), [(1, 3), (1000, 2), (5003, 4)])
def test_ranks_hold_all_tokens_once(num_tokens: int, world_size: int) -> None:
    options = PrefillOptions(chunk_tokens=1024)
    plan = plan_prefill(TINY, ranks(world_size), num_tokens, world_size, options)
    assert sum(rank_tokens(way_of(plan, world_size))) == num_tokens


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
        (PrefillOptions(scheme="star"), "unknown scheme 'star'; known: all-gather, gather-q"),
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


def test_measured_speeds_choose_the_least_time() -> None:
    plan = plan_prefill(LLAMA_8B, measured(8), 1 << 20, 8, PrefillOptions())
    every = candidates(
        LLAMA_8B, *known(measured(8)), 1 << 20, 8, PrefillOptions(), 100 << 30, tile_rows=8192
    )
    assert plan.predicted_s <= 1.01 * every[0].seconds
    assert plan.predicted_s == pytest.approx(sum(plan.predicted_chunk_s))
    assert len(plan.predicted_chunk_s) == len(plan.chunks)
    flops = 3.03e17
    assert 500e12 < flops / plan.predicted_s / 8 < 670e12
    assert [one.seconds for one in every] == sorted(one.seconds for one in every)
    assert {one.scheme for one in every} >= {"ring", "pass-q", "gather-q", "ulysses"}
    assert f"predicted {plan.predicted_s:.4g} s" in explain(plan, LLAMA_8B, measured(8))


def known(ready: list[RankReady]):
    found = known_speeds(ready)
    assert found is not None
    return found


def test_one_rank_that_knows_nothing_leaves_it_to_the_rules() -> None:
    ready = measured(2)
    ready[1] = msgspec.structs.replace(ready[1], speeds=None)
    assert known_speeds(ready) is None
    plan = plan_prefill(LLAMA_8B, ready, 262_144, 2, PrefillOptions())
    assert (plan.scheme, plan.chunk_tokens, plan.predicted_s) == ("ring", 65_536, 0.0)
    assert "not predicted" in explain(plan, LLAMA_8B, ready)


def test_the_slowest_rank_and_link_are_what_counts() -> None:
    ready = measured(2)
    speeds = ready[1].speeds
    assert speeds is not None
    fit = msgspec.structs.replace(speeds.attention, pair_s=2 * speeds.attention.pair_s)
    slow = msgspec.structs.replace(speeds, attention=fit)
    ready[1] = msgspec.structs.replace(ready[1], speeds=slow, link=ETHERNET)
    assert known_speeds(ready) == (slow, ETHERNET)


def test_what_is_asked_for_is_taken_and_predicted() -> None:
    asked = PrefillOptions(
        scheme="pass-q", layout="contiguous", chunk_tokens=32_768, deterministic=True, audit_rows=7
    )
    plan = plan_prefill(LLAMA_8B, measured(4), 131_072, 4, asked)
    assert (plan.scheme, plan.layout, plan.chunk_tokens) == ("pass-q", "contiguous", 32_768)
    assert (plan.deterministic, plan.audit_rows) == (True, 7)
    assert len(plan.predicted_chunk_s) == 4


def test_the_fastest_that_fits_is_taken_when_memory_is_short() -> None:
    roomy, tight = (
        plan_prefill(LLAMA_8B, measured(4, free_gib=gib), 1 << 20, 4, PrefillOptions())
        for gib in (100, 35)
    )
    assert tight.chunk_tokens < roomy.chunk_tokens
    assert tight.predicted_s > roomy.predicted_s
    assert memory_need(way_of(tight, 4), LLAMA_8B, 8192).total_bytes <= 35 << 30
    with pytest.raises(TooLarge, match="use more ranks, --codec int8"):
        plan_prefill(LLAMA_8B, measured(4, free_gib=30), 1 << 20, 4, PrefillOptions())


def test_of_equals_the_one_with_less_memory_is_taken() -> None:
    every = candidates(
        LLAMA_8B, *known(measured(8)), 1 << 20, 8, PrefillOptions(), 100 << 30, tile_rows=8192
    )
    best = choose(every)
    assert isinstance(best, Candidate)
    near = [one for one in every if one.seconds <= 1.01 * every[0].seconds]
    assert len(near) > 1
    assert best.need.total_bytes == min(one.need.total_bytes for one in near)
    assert choose([msgspec.structs.replace(one, fits=False) for one in every]) is None


def test_few_new_tokens_on_a_long_cache_go_to_the_keys() -> None:
    speeds, link = known(measured(8))
    order = choose_scheme(LLAMA_8B, speeds, link, 2048, 1 << 20, 8)
    assert order[0][0] == "gather-q"
    times = dict(order)
    floor = 32 * speeds.floor_s(2048 * ((1 << 20) + 1024)) / 8
    assert floor < times["gather-q"] - speeds.dense_s(LLAMA_8B, 256) < 1.4 * floor
    slow = dict(choose_scheme(LLAMA_8B, speeds, ETHERNET, 2048, 1 << 20, 8))
    keys_s = 32 * (7 / 8) * (1 << 20) * 4096 / ETHERNET.bytes_per_s
    assert slow["ring"] == pytest.approx(keys_s, rel=0.1)  # it does nothing but wait for keys
    assert slow["gather-q"] < 0.1 * slow["ring"]
    long = choose_scheme(LLAMA_8B, speeds, link, 1 << 20, 0, 8)
    assert dict(long)["ring"] < dict(long)["gather-q"]


def test_a_scheme_that_cannot_serve_the_heads_is_refused_by_name_and_not_tried() -> None:
    with pytest.raises(BadInput, match="scheme ulysses over 3 ranks"):
        plan_prefill(LLAMA_8B, measured(3), 10_000, 3, PrefillOptions(scheme="ulysses"))
    tried = choose_scheme(LLAMA_8B, *known(measured(3)), 1024, 4096, 3)
    assert "ulysses" not in dict(tried)
    with pytest.raises(BadInput, match="--audit-rows -1"):
        plan_prefill(LLAMA_8B, measured(1), 1000, 1, PrefillOptions(audit_rows=-1))


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("scheme", ["ring", "gather-q", "ulysses"])
def test_chunks_between_the_simulated_ones_lie_on_the_line(scheme: str, codec: str) -> None:
    way = Way(600_000, 65_536, "zigzag", scheme, codec, 128, 4)
    speeds, link = known(measured(4))
    few, all_ = (predict(way, LLAMA_8B, speeds, link, lengths=n) for n in (2, 4))
    exact = [
        predict(
            way._replace(num_tokens=chunk.tokens, cached_tokens=chunk.start), LLAMA_8B, speeds, link
        ).seconds
        for chunk in way.chunks
    ]
    assert few.chunk_s == pytest.approx(exact, rel=0.02)
    assert all_.seconds == pytest.approx(sum(exact), rel=0.005)


def test_windows_are_cheaper_than_full_attention() -> None:
    windowed = msgspec.structs.replace(LLAMA_8B, windows=(4096,) * 31 + (None,))
    speeds, link = known(measured(4))
    way = Way(262_144, 65_536, "zigzag", "ring", "raw", 128, 4)
    full, narrow = (predict(way, facts, speeds, link) for facts in (LLAMA_8B, windowed))
    assert narrow.seconds < 0.6 * full.seconds
    assert narrow.chunk_s[3] == pytest.approx(narrow.chunk_s[1], rel=0.15)
    tried = candidates(windowed, speeds, link, 65_536, 4, PrefillOptions(scheme="ring"), 100 << 30)
    assert {one.layout for one in tried} == {"zigzag", "contiguous"}


def test_a_plan_onto_reused_tokens_is_predicted_for_what_is_left() -> None:
    plan = plan_prefill(
        LLAMA_8B, measured(4), 262_144, 4, PrefillOptions(chunk_tokens=65_536, scheme="ring")
    )
    onto = msgspec.structs.replace(plan, prefix_id="p", reused_tokens=131_072)
    less = with_prediction(onto, LLAMA_8B, measured(4))
    assert len(less.predicted_chunk_s) == len(less.chunks) == 2
    assert less.predicted_chunk_s == pytest.approx(plan.predicted_chunk_s[2:], rel=0.02)


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_memory_counts_what_schemes_lease_and_parts_that_wait(codec: str) -> None:
    def need(scheme: str, chunk_tokens: int = 1 << 18):
        way = Way(1 << 20, chunk_tokens, "zigzag", scheme, codec, 128, 8)
        return memory_need(way, LLAMA_8B, 8192)

    ring, gather, queries = need("ring"), need("all-gather"), need("gather-q")
    # two places for decoded keys and values beside the buffers
    staged = 0 if codec == "raw" else PLACES * 2 * (1 << 17) * 8 * 128 * 2
    assert ring.exchange_bytes > staged
    assert gather.exchange_bytes - staged > 2 * (ring.exchange_bytes - staged)
    assert queries.exchange_bytes > ring.exchange_bytes
    assert ring.parts_bytes > 0
    assert need("ring", 1 << 17).parts_bytes < ring.parts_bytes


def test_fewer_bits_take_less_memory_and_less_of_the_link() -> None:
    needs, sent = [], []
    for codec in ("raw", "int8", "int4"):
        way = Way(1 << 20, 1 << 18, "zigzag", "ring", codec, 128, 8)
        needs.append(memory_need(way, LLAMA_8B, 8192).kv_bytes)
        known = known_speeds(measured(8))
        assert known is not None
        sent.append(predict(way, LLAMA_8B, *known).sent_bytes)
    raw = (1 << 17) * LLAMA_8B.num_layers * 2 * 8 * 128 * 2
    assert needs == [raw, raw * 8.25 / 16, raw * 4.5625 / 16]
    assert sent[2] < sent[1] < sent[0]


@pytest.mark.parametrize(("codec", "lowest"), [("int8", "8-bit"), ("raw", "exact")])
def test_a_codec_that_keeps_enough_is_planned(codec: str, lowest: str) -> None:
    asked = PrefillOptions(codec=codec, lowest_fidelity=lowest)
    assert plan_prefill(LLAMA_8B, ranks(1, free_gib=500), 1000, 1, asked).codec == codec


def test_a_codec_that_keeps_less_than_is_asked_for_is_refused() -> None:
    asked = PrefillOptions(codec="int4", lowest_fidelity="8-bit")
    with pytest.raises(BadInput, match="--codec int4 keeps 4-bit, asked for is 8-bit or better"):
        plan_prefill(LLAMA_8B, ranks(1, free_gib=500), 1000, 1, asked)


def test_tiles_bound_what_activations_take() -> None:
    plan = plan_prefill(LLAMA_8B, ranks(1, free_gib=500), 1 << 17, 1, PrefillOptions())
    way = way_of(plan, 1)
    tiled, whole = (memory_need(way, LLAMA_8B, rows).activation_bytes for rows in (8192, 0))
    assert tiled < 0.6 * whole
