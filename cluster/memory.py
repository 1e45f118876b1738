"""What a plan takes of a rank's memory: KV, exchanges, parts that wait, activations. Pure."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch

from ringspan.attention.accumulator import HELD_BYTES
from ringspan.attention.cost import mlp_width
from ringspan.attention.layer import STAGING_TOKENS
from ringspan.attention.models.tiling import activation_bytes
from ringspan.attention.schemes.ulysses import group_size_for
from ringspan.cluster.messages import ModelFacts, PrefillPlan
from ringspan.cluster.predict import Way, leased_bytes, rank_tokens
from ringspan.kvstore.codecs.registry import codec, encoded_bytes


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a plan takes on the rank that takes most."""

    kv_bytes: int
    """Encoded K and V of all its pages."""
    exchange_bytes: int
    """One layer's keys, queries or parts of other ranks, in flight, and decoded keys."""
    activation_bytes: int
    """The largest chunk's hidden states, projections and MLP; an estimate."""
    parts_bytes: int = 0
    """Attention over parts of the keys, that waits to be merged."""

    @property
    def held_bytes(self) -> int:
        """All but what is an estimate."""
        return self.kv_bytes + self.exchange_bytes + self.parts_bytes

    @property
    def total_bytes(self) -> int:
        return self.held_bytes + self.activation_bytes


def way_of(plan: PrefillPlan, world_size: int) -> Way:
    return Way(
        plan.num_tokens - plan.reused_tokens,
        plan.chunk_tokens,
        plan.layout,
        plan.scheme,
        plan.codec,
        plan.page_tokens,
        world_size,
        plan.reused_tokens,
        plan.deterministic,
    )


def memory_need(
    way: Way,
    facts: ModelFacts,
    tile_rows: int = 0,
    fused: bool = True,
    exchange_bytes: int | None = None,
) -> Need:
    """Bytes on the fullest rank. K and V by the codec's own sizes, exchanges as the scheme leases
    them, activations by formula; tile_rows as in RankReady, `fused` on GPUs. exchange_bytes:
    what the scheme leases, where a prediction has counted it already."""
    dtype: torch.dtype = getattr(torch, facts.dtype)
    chosen = codec(way.codec)
    shape = (facts.num_kv_heads, facts.head_dim, dtype)
    # Earlier tokens may lie on the ranks in any way; evenly is how all our own ways end.
    before = -(-way.cached_tokens // way.world_size)
    tokens = max(rank_tokens(way)) + before
    rows = max(rank_tokens(way._replace(num_tokens=way.chunks[0].tokens)))
    return Need(
        kv_bytes=encoded_bytes(chosen, facts.num_layers, *shape, tokens),
        exchange_bytes=leased_bytes(way, facts) if exchange_bytes is None else exchange_bytes,
        activation_bytes=_activation_bytes(facts, rows, tile_rows, fused, dtype),
        parts_bytes=_parts_bytes(way, facts, rows, tokens, dtype.itemsize),
    )


def kv_bytes(plan: PrefillPlan, facts: ModelFacts) -> int:
    """Encoded K and V of the whole context, all ranks."""
    dtype: torch.dtype = getattr(torch, facts.dtype)
    chosen, layers, heads = codec(plan.codec), facts.num_layers, facts.num_kv_heads
    return encoded_bytes(chosen, layers, heads, facts.head_dim, dtype, plan.num_tokens)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _parts_bytes(way: Way, facts: ModelFacts, rows: int, keys: int, itemsize: int) -> int:
    """An `Accumulator` keeps one part for each block of keys that its rows see, until they are
    HELD_BYTES, and then one more in fp32. The part that comes out is counted with activations."""
    part = rows * facts.num_q_heads * (facts.head_dim * itemsize + 4)
    blocks = way.world_size
    if way.scheme in ("ulysses", "ulysses-ring"):  # the group's rows, with a share of their heads
        group = way.world_size
        if way.scheme == "ulysses-ring":
            group = group_size_for(facts.num_q_heads, facts.num_kv_heads, way.world_size)
        blocks, keys = way.world_size // group, keys * group
    elif way.scheme == "gather-q":
        blocks, part = 1, part * way.world_size
    elif way.scheme == "pass-q":
        blocks = 1
    if not codec(way.codec).exact:
        blocks *= 1 + -(-keys // STAGING_TOKENS)
    if blocks == 1:
        return part if way.scheme in ("gather-q", "pass-q") and way.world_size > 1 else 0
    if blocks * part <= HELD_BYTES or way.deterministic:
        return blocks * part
    fold = rows * facts.num_q_heads * (facts.head_dim + 1) * 4
    return min(blocks * part, HELD_BYTES + part) + fold


class _Config(NamedTuple):
    """A model's config as far as `tiling.activation_bytes` reads it."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int
    dtype: torch.dtype

    def get_text_config(self) -> _Config:
        return self


def _activation_bytes(
    facts: ModelFacts, rows: int, tile_rows: int, fused: bool, dtype: torch.dtype
) -> int:
    """Of a chunk at its widest, in a layer's attention or MLP.

    Untiled: six hidden states; in attention q, k, v, out and a merged fp32 out; in the MLP gate,
    up, their product and one temporary.
    """
    width = int(mlp_width(facts))
    if tile_rows:
        config = _Config(
            facts.hidden_size,
            facts.num_q_heads,
            facts.num_kv_heads,
            facts.head_dim,
            width,
            facts.num_layers,
            dtype,
        )
        return activation_bytes(config, rows, tile_rows, fused, dtype)
    attention_width = (2 * facts.num_q_heads + 2 * facts.num_kv_heads) * facts.head_dim
    in_attention = attention_width * dtype.itemsize + 8 * facts.num_q_heads * facts.head_dim
    in_mlp = 4 * width * dtype.itemsize
    return rows * (6 * facts.hidden_size * dtype.itemsize + max(in_attention, in_mlp))
