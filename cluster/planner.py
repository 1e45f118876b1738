"""How a context is prefilled: chunk size, layout, scheme, codec; and whether it fits. Pure.

Where the ranks know their speeds, every way that may be good is predicted (predict.py), and the one
that takes least time and fits the memory is taken. Where they do not, rules of thumb decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from ringspan.attention.cost import Link, Speeds
from ringspan.attention.layout import LAYOUTS
from ringspan.attention.models.facts import check_positions, prefill_flops
from ringspan.attention.schemes.table import SCHEMES, why_not
from ringspan.cluster.memory import Need, gib, memory_need, way_of
from ringspan.cluster.memory import kv_bytes as kv_bytes
from ringspan.cluster.messages import ModelFacts, PrefillPlan, RankReady
from ringspan.cluster.predict import Prediction, Way, predict
from ringspan.cluster.predict import rank_tokens as rank_tokens
from ringspan.errors import BadInput, TooLarge, UnknownName
from ringspan.kvstore.codecs.registry import SMALLER
from ringspan.kvstore.fidelity import check_codec
from ringspan.kvstore.parity import check_rows
from ringspan.types import page_tokens_for

GPU_CHUNK_TOKENS = 65_536
"""By rule, over all ranks. One H200 reached 577 TFLOP/s all in with it; at 16 k of them a rank the
matmuls and the ring's hops (which want 750 to 6,000 tokens a rank, DESIGN 3) are still well fed."""
GPU_RANK_TOKENS = 16_384
"""Of a chunk, for each rank, once there are more ranks than share GPU_CHUNK_TOKENS at this size."""
CPU_RANK_TOKENS = 2_048
LEAST_RANK_TOKENS = 512
"""`auto` goes no smaller than this a rank when memory is short."""
LARGEST_CHUNK_TOKENS = 1 << 24
WORKSPACE_SHARE = 1.25
"""`auto` wants this much of the estimate of activations free: allocators round up."""
CANDIDATE_RANK_TOKENS = 2_048
LARGEST_CANDIDATE_TOKENS = 262_144
"""Predicted are powers of two between them, and all tokens at once."""
STRIPED_RANK_PAGES = 64
"""Striped chunks are as many kernels a hop as a rank has pages of them: larger ones never pay."""
MANY_RANKS = 16
"""Beyond, not every scheme is simulated at every chunk size: it costs the square of the ranks."""
TIE = 0.01
"""Of two ways whose predictions differ by less, the one that takes less memory is better."""
SHORT_TURN_PAGES = 32
"""A rank's share of new tokens that are dealt page by page, as a session's tail is."""


class PrefillOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the caller may choose; `auto` and None leave it to the planner."""

    layout: str = "auto"
    scheme: str = "auto"
    codec: str = "raw"
    chunk_tokens: int | None = None
    """Over all ranks; a multiple of the page."""
    deterministic: bool = False
    audit_rows: int = 4
    parity: int = 0
    """Pages of parity to a stripe of the stored context, 0 to 2; see `kvstore.parity`."""
    lowest_fidelity: str = ""
    """The least that is accepted of kept KV, as `kvstore.fidelity` names it; empty: any."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One way to prefill, what it takes, and whether it fits."""

    scheme: str
    layout: str
    chunk_tokens: int
    predicted: Prediction
    need: Need
    fits: bool

    @property
    def seconds(self) -> float:
        return self.predicted.seconds


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
    page_tokens = page_tokens_for(facts.head_dim)
    check_options(asked, facts, world_size, page_tokens)
    whole = -(-num_tokens // page_tokens) * page_tokens
    free_bytes = min(rank.free_bytes for rank in ready)
    tile_rows, on_gpu = ready[0].tile_rows, _on_gpu(ready)

    def planned(chunk_tokens: int, scheme: str = "ring", layout: str = "zigzag") -> PrefillPlan:
        return PrefillPlan(
            context_id=context_id,
            num_tokens=num_tokens,
            page_tokens=page_tokens,
            chunk_tokens=min(chunk_tokens, whole),  # one chunk that is longer says nothing more
            layout=layout if asked.layout == "auto" else asked.layout,
            scheme=scheme if asked.scheme == "auto" else asked.scheme,
            codec=asked.codec,
            deterministic=asked.deterministic,
            audit_rows=asked.audit_rows,
            parity=asked.parity,
        )

    known = known_speeds(ready)
    if known is not None:
        every = candidates(
            facts,
            *known,
            num_tokens,
            world_size,
            asked,
            free_bytes,
            tile_rows=tile_rows,
            fused=on_gpu,
        )
        if (best := choose(every)) is not None:
            plan = planned(best.chunk_tokens, best.scheme, best.layout)
            return with_prediction(plan, facts, ready)
    if asked.chunk_tokens is not None:
        plan = planned(asked.chunk_tokens)
    else:
        plan = planned(_first_chunk_tokens(world_size, page_tokens, on_gpu))
        least = LEAST_RANK_TOKENS * world_size
        while plan.chunk_tokens // 2 >= least and not _roomy(
            memory_need(way_of(plan, world_size), facts, tile_rows, on_gpu), free_bytes
        ):
            plan = planned(plan.chunk_tokens // 2 // page_tokens * page_tokens)
    _check_fits(plan, facts, ready, world_size)
    return with_prediction(plan, facts, ready)


def candidates(
    facts: ModelFacts,
    speeds: Speeds,
    link: Link,
    num_tokens: int,
    world_size: int,
    asked: PrefillOptions,
    free_bytes: int,
    *,
    cached_tokens: int = 0,
    tile_rows: int = 0,
    fused: bool = True,
) -> list[Candidate]:
    """Every way that is asked for, predicted; the fastest first.

    What was named is not varied. Contiguous layout is tried where there are windows: it keeps a
    window on few ranks, and only without one does it make them unequal. Striped cuts a chunk into
    as many kernels as pages; it is never tried unasked.
    """
    page_tokens = page_tokens_for(facts.head_dim)
    layouts = [asked.layout]
    if asked.layout == "auto":
        layouts = ["zigzag"]
        if world_size > 1 and any(window is not None for window in facts.windows):
            layouts.append("contiguous")
    schemes = [asked.scheme]
    if asked.scheme == "auto":
        schemes = ["ring"]
        if world_size > 1:
            heads = (facts.num_q_heads, facts.num_kv_heads)
            schemes = [name for name in SCHEMES if why_not(name, *heads, world_size) is None]
    chunks = _chunk_choices(num_tokens, world_size, page_tokens, asked.chunk_tokens)
    if asked.layout == "striped" and world_size > 1:
        most = STRIPED_RANK_PAGES * world_size * page_tokens
        chunks = [size for size in chunks if size <= most] or chunks[:1]

    def candidate(scheme: str, layout: str, chunk_tokens: int) -> Candidate:
        way = Way(
            num_tokens, chunk_tokens, layout, scheme, asked.codec, page_tokens, world_size,
            cached_tokens, asked.deterministic,
        )  # fmt: skip
        predicted = predict(way, facts, speeds, link, lengths=2)
        need = memory_need(way, facts, tile_rows, fused, predicted.buffer_bytes)
        roomy = _roomy(need, free_bytes)
        fits = roomy if asked.chunk_tokens is None else need.total_bytes <= free_bytes
        return Candidate(
            scheme=scheme,
            layout=layout,
            chunk_tokens=chunk_tokens,
            predicted=predicted,
            need=need,
            fits=fits,
        )

    found = []
    for layout in layouts:
        tried, ends = schemes, chunks
        if world_size > MANY_RANKS and len(schemes) > 1 and len(chunks) > 2:
            ends = [chunks[0], chunks[-1]]
        found += [candidate(scheme, layout, chunk) for chunk in ends for scheme in schemes]
        if len(ends) < len(chunks):
            order = sorted(found, key=lambda one: one.seconds)
            tried = list(dict.fromkeys(one.scheme for one in order))[:2]
            found += [candidate(scheme, layout, c) for c in chunks[1:-1] for scheme in tried]
    return sorted(found, key=lambda one: one.seconds)


def choose(every: Sequence[Candidate]) -> Candidate | None:
    """Of those that fit, given fastest first: the one with least memory among the fastest."""
    fitting = [one for one in every if one.fits]
    if not fitting:
        return None
    equal = [one for one in fitting if one.seconds <= (1 + TIE) * fitting[0].seconds]
    return min(equal, key=lambda one: (one.need.total_bytes, one.seconds))


def choose_scheme(
    facts: ModelFacts,
    speeds: Speeds,
    link: Link,
    new_tokens: int,
    cached_tokens: int,
    world_size: int,
    codec_name: str = "raw",
) -> list[tuple[str, float]]:
    """(scheme, predicted seconds), best first, of one step of new tokens behind cached ones."""
    page_tokens = page_tokens_for(facts.head_dim)
    pages = -(-new_tokens // page_tokens)
    layout = "striped" if pages <= SHORT_TURN_PAGES * world_size else "zigzag"
    heads = (facts.num_q_heads, facts.num_kv_heads)
    found = []
    for scheme in SCHEMES:
        if why_not(scheme, *heads, world_size) is None:
            way = Way(
                new_tokens, pages * page_tokens, layout, scheme, codec_name, page_tokens,
                world_size, cached_tokens,
            )  # fmt: skip
            found.append((scheme, predict(way, facts, speeds, link).seconds))
    return sorted(found, key=lambda one: one[1])


def known_speeds(ready: Sequence[RankReady]) -> tuple[Speeds, Link] | None:
    """Of the slowest rank and the slowest link; None unless all ranks know theirs."""
    speeds = [rank.speeds for rank in ready if rank.speeds is not None]
    links = [rank.link for rank in ready if rank.link is not None]
    if len(speeds) < len(ready) or (len(ready) > 1 and len(links) < len(ready)):
        return None
    slowest = max(speeds, key=lambda one: one.attention.pair_s)
    alone = Link(latency_s=0.0, bytes_per_s=float("inf"))
    return slowest, min(links, key=lambda one: one.bytes_per_s, default=alone)


def with_prediction(
    plan: PrefillPlan, facts: ModelFacts, ready: Sequence[RankReady]
) -> PrefillPlan:
    """The plan with the seconds that its chunks will take, where the ranks' speeds are known."""
    known = known_speeds(ready)
    if known is None:
        return msgspec.structs.replace(plan, predicted_s=0.0, predicted_chunk_s=())
    predicted = predict(way_of(plan, len(ready)), facts, *known)
    return msgspec.structs.replace(
        plan, predicted_s=predicted.seconds, predicted_chunk_s=predicted.chunk_s
    )


def check_options(
    asked: PrefillOptions, facts: ModelFacts, world_size: int, page_tokens: int
) -> None:
    """UnknownName and BadInput for what does not exist or cannot serve this model."""
    if asked.layout != "auto" and asked.layout not in LAYOUTS:
        raise UnknownName("layout", asked.layout, tuple(LAYOUTS))
    if asked.scheme != "auto":
        reason = why_not(asked.scheme, facts.num_q_heads, facts.num_kv_heads, world_size)
        if reason is not None:
            raise BadInput(reason)
    dtype: torch.dtype = getattr(torch, facts.dtype)
    check_codec(asked.codec, facts.num_kv_heads, facts.head_dim, dtype, asked.lowest_fidelity)
    if asked.chunk_tokens is not None:
        check_chunk_tokens(asked.chunk_tokens, page_tokens)
    check_rows(asked.parity)
    if asked.audit_rows < 0:
        raise BadInput(f"--audit-rows {asked.audit_rows}: wanted rows of each rank, or 0 for none")


def check_chunk_tokens(chunk_tokens: int, page_tokens: int) -> None:
    """BadInput, with the nearest value that would do, unless it is a sane multiple of the page."""
    if 0 < chunk_tokens <= LARGEST_CHUNK_TOKENS and chunk_tokens % page_tokens == 0:
        return
    nearest = max(1, min(chunk_tokens, LARGEST_CHUNK_TOKENS) // page_tokens) * page_tokens
    raise BadInput(
        f"--chunk-tokens {chunk_tokens}: wanted a multiple of the page, {page_tokens} tokens, "
        f"between {page_tokens} and {LARGEST_CHUNK_TOKENS}; the nearest is {nearest}"
    )


def explain(plan: PrefillPlan, facts: ModelFacts, ready: Sequence[RankReady]) -> str:
    """The plan for a person to read: a few lines."""
    world_size = len(ready)
    need = memory_need(way_of(plan, world_size), facts, ready[0].tile_rows, _on_gpu(ready))
    free_bytes = min(rank.free_bytes for rank in ready)
    flops = prefill_flops(facts, plan.num_tokens - plan.reused_tokens, plan.reused_tokens)
    where = f"{world_size} rank{'s' * (world_size != 1)} on {ready[0].device_name}"
    known = known_speeds(ready)
    if plan.predicted_s and known is not None:
        devices = 1 if known[1].shared_device else world_size
        rate = flops / plan.predicted_s / devices / 1e12
        told = f"predicted {plan.predicted_s:.4g} s, {rate:.3g} TFLOP/s a device"
    else:
        told = "not predicted: speeds were not measured, chunk and scheme are chosen by rule"
    return "\n".join(
        (
            f"{plan.num_tokens:,} tokens of {facts.name} ({facts.dtype}) over {where} "
            f"({ready[0].transport})",
            f"{len(plan.chunks)} chunk{'s' * (len(plan.chunks) != 1)} of "
            f"{plan.chunk_tokens:,} tokens, layout {plan.layout}, "
            f"scheme {plan.scheme}, {flops:.3g} FLOP",
            told,
            f"KV {gib(kv_bytes(plan, facts))} as {plan.codec} in pages of {plan.page_tokens}; "
            f"the fullest rank takes {gib(need.kv_bytes)}, "
            f"{gib(need.exchange_bytes + need.parts_bytes)} for exchanges and parts and about "
            f"{gib(need.activation_bytes)} for activations, of {gib(free_bytes)} free",
        )
    )


def _chunk_choices(
    num_tokens: int, world_size: int, page_tokens: int, asked: int | None
) -> list[int]:
    """Ascending; the last one is all tokens at once, if that is allowed."""
    whole = -(-num_tokens // page_tokens) * page_tokens
    if asked is not None:
        return [min(asked, whole)]
    sizes = [CANDIDATE_RANK_TOKENS * world_size]
    while 2 * sizes[-1] <= LARGEST_CANDIDATE_TOKENS:
        sizes.append(2 * sizes[-1])
    return sorted({size for size in sizes if size < whole} | {min(whole, LARGEST_CHUNK_TOKENS)})


def _on_gpu(ready: Sequence[RankReady]) -> bool:
    return ready[0].device.startswith("cuda")


def _first_chunk_tokens(world_size: int, page_tokens: int, on_gpu: bool) -> int:
    if on_gpu:
        return max(GPU_CHUNK_TOKENS, GPU_RANK_TOKENS * world_size)
    return CPU_RANK_TOKENS * world_size


def _roomy(need: Need, free_bytes: int) -> bool:
    return need.held_bytes + WORKSPACE_SHARE * need.activation_bytes <= free_bytes


def _check_fits(
    plan: PrefillPlan, facts: ModelFacts, ready: Sequence[RankReady], world_size: int
) -> None:
    need = memory_need(way_of(plan, world_size), facts, ready[0].tile_rows, _on_gpu(ready))
    tightest = min(ready, key=lambda rank: rank.free_bytes)
    if need.total_bytes <= tightest.free_bytes:
        return
    if need.kv_bytes + need.exchange_bytes < tightest.free_bytes:
        advice = "a smaller --chunk-tokens, or more ranks"
    elif plan.codec in SMALLER:
        advice = f"more ranks, --codec {SMALLER[plan.codec]}, or a shorter input"
    else:
        advice = "more ranks, or a shorter input"
    raise TooLarge(
        f"{plan.num_tokens:,} tokens on {world_size} rank{'s' * (world_size != 1)} need "
        f"{gib(need.kv_bytes)} of KV, {gib(need.exchange_bytes + need.parts_bytes)} for exchanges "
        f"and about {gib(need.activation_bytes)} of activations each; rank {tightest.rank} "
        f"({tightest.device_name}) has {gib(tightest.free_bytes)} free: use {advice}"
    )
