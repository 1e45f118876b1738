"""How a context is prefilled: chunk size, layout, scheme, codec; and whether it fits. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from ringspan.attention.layout import LAYOUTS, deal
from ringspan.attention.models.facts import check_positions, prefill_flops
from ringspan.attention.schemes.table import SCHEMES
from ringspan.cluster.messages import ModelFacts, PrefillPlan, RankReady
from ringspan.errors import BadInput, TooLarge, UnknownName
from ringspan.kvstore.codecs.registry import codec, kv_bytes_per_token
from ringspan.types import page_tokens_for, total_tokens

GPU_CHUNK_TOKENS = 65_536
"""Over all ranks. One H200 reached 577 TFLOP/s all in with it; at 16 k of them a rank the matmuls
and the ring's hops (which want 750 to 6,000 tokens a rank, DESIGN 3) are still well fed."""
GPU_RANK_TOKENS = 16_384
"""Of a chunk, for each rank, once there are more ranks than share GPU_CHUNK_TOKENS at this size."""
CPU_RANK_TOKENS = 2_048
LEAST_RANK_TOKENS = 512
"""`auto` goes no smaller than this a rank when memory is short."""
LARGEST_CHUNK_TOKENS = 1 << 24
WORKSPACE_SHARE = 1.25
"""`auto` wants this much of the estimate of activations free: allocators round up."""


class PrefillOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the caller may choose; `auto` and None leave it to the planner."""

    layout: str = "auto"
    scheme: str = "auto"
    codec: str = "raw"
    chunk_tokens: int | None = None
    """Over all ranks; a multiple of the page."""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a plan takes on the rank that takes most."""

    kv_bytes: int
    """Encoded K and V of all its pages."""
    exchange_bytes: int
    """One layer's keys and values of other ranks, in flight, and decoded ones."""
    activation_bytes: int
    """The largest chunk's hidden states, projections and MLP; an estimate."""

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.exchange_bytes + self.activation_bytes


def plan_prefill(
    facts: ModelFacts,
    ready: Sequence[RankReady],
    num_tokens: int,
    world_size: int,
    asked: PrefillOptions,
    *,
    context_id: str = "",
) -> PrefillPlan:
    """The plan for one context. Raises TooLarge, with numbers, for what cannot fit positions or
    memory; UnknownName and BadInput for options that make no sense."""
    if num_tokens < 1:
        raise BadInput("the input has no tokens: give a document with at least one")
    check_positions(facts, num_tokens)
    layout = "zigzag" if asked.layout == "auto" else asked.layout
    scheme = "ring" if asked.scheme == "auto" else asked.scheme
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, tuple(LAYOUTS))
    if scheme not in SCHEMES:
        raise UnknownName("scheme", scheme, tuple(SCHEMES))
    codec(asked.codec)
    page_tokens = page_tokens_for(facts.head_dim)
    whole = -(-num_tokens // page_tokens) * page_tokens
    free_bytes = min(rank.free_bytes for rank in ready)

    def planned(chunk_tokens: int) -> PrefillPlan:
        return PrefillPlan(
            context_id=context_id,
            num_tokens=num_tokens,
            page_tokens=page_tokens,
            chunk_tokens=min(chunk_tokens, whole),  # one chunk that is longer says nothing more
            layout=layout,
            scheme=scheme,
            codec=asked.codec,
        )

    if asked.chunk_tokens is not None:
        check_chunk_tokens(asked.chunk_tokens, page_tokens)
        plan = planned(asked.chunk_tokens)
    else:
        on_gpu = ready[0].device.startswith("cuda")
        plan = planned(_first_chunk_tokens(world_size, page_tokens, on_gpu))
        least = LEAST_RANK_TOKENS * world_size
        while plan.chunk_tokens // 2 >= least and not _roomy(plan, facts, world_size, free_bytes):
            plan = planned(plan.chunk_tokens // 2 // page_tokens * page_tokens)
    _check_fits(plan, facts, ready, world_size)
    return plan


def check_chunk_tokens(chunk_tokens: int, page_tokens: int) -> None:
    """BadInput, with the nearest value that would do, unless it is a sane multiple of the page."""
    if 0 < chunk_tokens <= LARGEST_CHUNK_TOKENS and chunk_tokens % page_tokens == 0:
        return
    nearest = max(1, min(chunk_tokens, LARGEST_CHUNK_TOKENS) // page_tokens) * page_tokens
    raise BadInput(
        f"--chunk-tokens {chunk_tokens}: wanted a multiple of the page, {page_tokens} tokens, "
        f"between {page_tokens} and {LARGEST_CHUNK_TOKENS}; the nearest is {nearest}"
    )


def memory_need(plan: PrefillPlan, facts: ModelFacts, world_size: int) -> Need:
    """Bytes on the fullest rank. K and V by the codec's own sizes; activations estimated."""
    most_tokens = max(rank_tokens(plan, world_size))
    chunk = plan.chunks[0]
    most_chunk_tokens = max(
        total_tokens(spans) for spans in deal(plan.layout, chunk, world_size, plan.page_tokens)
    )
    dtype: torch.dtype = getattr(torch, facts.dtype)
    chosen = codec(plan.codec)
    shape = (facts.num_kv_heads, facts.head_dim, dtype)
    layer_bytes = kv_bytes_per_token(chosen, 1, *shape)
    raw_layer_bytes = 2 * facts.num_kv_heads * facts.head_dim * dtype.itemsize
    exchange = 0
    if world_size > 1:
        # a ring holds one shard that arrives while it attends over another
        in_flight = plan.num_tokens if plan.scheme == "all-gather" else 2 * most_tokens
        exchange += in_flight * layer_bytes
    if not chosen.exact:
        exchange += 2 * most_tokens * raw_layer_bytes
    return Need(
        kv_bytes=most_tokens * layer_bytes * facts.num_layers,
        exchange_bytes=exchange,
        activation_bytes=most_chunk_tokens * _activation_bytes(facts, dtype.itemsize),
    )


def rank_tokens(plan: PrefillPlan, world_size: int) -> list[int]:
    """Tokens of the whole context that each rank holds."""
    held = [0] * world_size
    for chunk in plan.chunks:
        dealt = deal(plan.layout, chunk, world_size, plan.page_tokens)
        for rank, spans in enumerate(dealt):
            held[rank] += total_tokens(spans)
    return held


def kv_bytes(plan: PrefillPlan, facts: ModelFacts) -> int:
    """Encoded K and V of the whole context, all ranks."""
    dtype: torch.dtype = getattr(torch, facts.dtype)
    per_token = kv_bytes_per_token(
        codec(plan.codec), facts.num_layers, facts.num_kv_heads, facts.head_dim, dtype
    )
    return plan.num_tokens * per_token


def explain(plan: PrefillPlan, facts: ModelFacts, ready: Sequence[RankReady]) -> str:
    """The plan for a person to read: a few lines."""
    world_size = len(ready)
    need = memory_need(plan, facts, world_size)
    free_bytes = min(rank.free_bytes for rank in ready)
    flops = prefill_flops(facts, plan.num_tokens)
    where = f"{world_size} rank{'s' * (world_size != 1)} on {ready[0].device_name}"
    return "\n".join(
        (
            f"{plan.num_tokens:,} tokens of {facts.name} ({facts.dtype}) over {where} "
            f"({ready[0].transport})",
            f"{len(plan.chunks)} chunk{'s' * (len(plan.chunks) != 1)} of "
            f"{plan.chunk_tokens:,} tokens, layout {plan.layout}, "
            f"scheme {plan.scheme}, {flops:.3g} FLOP",
            f"KV {_gib(kv_bytes(plan, facts))} as {plan.codec} in pages of {plan.page_tokens}; "
            f"the fullest rank takes {_gib(need.kv_bytes)}, {_gib(need.exchange_bytes)} for "
            f"exchanges and about {_gib(need.activation_bytes)} for activations, of "
            f"{_gib(free_bytes)} free",
        )
    )


def _first_chunk_tokens(world_size: int, page_tokens: int, on_gpu: bool) -> int:
    if on_gpu:
        return max(GPU_CHUNK_TOKENS, GPU_RANK_TOKENS * world_size)
    return CPU_RANK_TOKENS * world_size


def _roomy(plan: PrefillPlan, facts: ModelFacts, world_size: int, free_bytes: int) -> bool:
    need = memory_need(plan, facts, world_size)
    held = need.kv_bytes + need.exchange_bytes
    return held + WORKSPACE_SHARE * need.activation_bytes <= free_bytes


def _check_fits(
    plan: PrefillPlan, facts: ModelFacts, ready: Sequence[RankReady], world_size: int
) -> None:
    need = memory_need(plan, facts, world_size)
    tightest = min(ready, key=lambda rank: rank.free_bytes)
    if need.total_bytes <= tightest.free_bytes:
        return
    held = need.kv_bytes + need.exchange_bytes
    if held < tightest.free_bytes:
        advice = "a smaller --chunk-tokens, or more ranks"
    elif plan.codec == "raw":
        advice = "more ranks, --codec int8, or a shorter input"
    else:
        advice = "more ranks, or a shorter input"
    raise TooLarge(
        f"{plan.num_tokens:,} tokens on {world_size} rank{'s' * (world_size != 1)} need "
        f"{_gib(need.kv_bytes)} of KV, {_gib(need.exchange_bytes)} for exchanges and about "
        f"{_gib(need.activation_bytes)} of activations each; rank {tightest.rank} "
        f"({tightest.device_name}) has {_gib(tightest.free_bytes)} free: use {advice}"
    )


def _activation_bytes(facts: ModelFacts, itemsize: int) -> int:
    """Of one token of a chunk at its widest, in a layer's attention or MLP.

    Attention: q, k, v, out and a merged fp32 out. MLP: gate, up, their product and one temporary;
    its width is not in the facts, but follows from a layer's parameters (three matrices).
    """
    attention_width = (2 * facts.num_q_heads + 2 * facts.num_kv_heads) * facts.head_dim
    layer_params = facts.flops_per_token / 2 / max(facts.num_layers, 1)
    mlp_width = max(layer_params / facts.hidden_size - attention_width, 0.0) / 3
    residual = 6 * facts.hidden_size * itemsize
    in_attention = attention_width * itemsize + 2 * 4 * facts.num_q_heads * facts.head_dim
    in_mlp = int(4 * mlp_width) * itemsize
    return residual + max(in_attention, in_mlp)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
