"""What a placement costs, in closed form: microseconds to compute, for thousands of nodes. Pure.

    prefill = sum over chunks of  L * (dense + attention)
    ring       attention = P * max(one hop's kernel, one hop's exchange), at least the host's calls
    gather-q   attention = one kernel over all keys of a rank + the exchange of queries and parts
    token      weights and KV of the sessions, read once, + one exchange a layer

predict.py simulates the schemes' own code and takes 10 ms to a second; this is its shadow, made of
the same `Speeds` and `Link`. A test holds the two together; what a gang finally runs is planned by
planner.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ringspan.attention.cost import Link, Speeds
from ringspan.kvstore.codecs.registry import codec, encoded_bytes
from ringspan.specs import ModelFacts
from ringspan.types import page_tokens_for

CHUNK_RANK_TOKENS = 8_192
"""New tokens of a chunk for each rank: matmuls and hops are fed, and a million tokens on eight
ranks end a chunk every few seconds, where shorter work may come in between."""
LEAST_PARALLEL_TOKENS = 8_192
"""New tokens below which one prompt is never spread: sglang measured a first token 15 to 21 % later
under 4,000 tokens on four ranks, and no gain below 8,000."""
HOPS_CALLS = 4
"""Host calls beside the kernel, of each hop."""
FORM_S = 2.4
"""A new process group over several nodes: NCCL between two Ray actors."""
STEP_HOST_S = 2e-3
"""Of a token outside reading weights and KV: 9.7 ms at 131,072 tokens raw on an H200, of which
7.7 ms are bytes."""
HOST_COPY_BYTES_PER_S = 54e9
"""Pinned host memory to one device."""
_OCTAVE_STEPS = 32
"""Lengths are rounded up to so many an octave before they are looked up."""


class PrefillCost(NamedTuple):
    seconds: float
    chunk_tokens: int
    scheme: str
    last_chunk_s: float


@dataclass
class Costs:
    """Of one kind of device with one model. Everything is remembered by rounded lengths."""

    facts: ModelFacts
    speeds: Speeds
    link: Link
    """Between the devices of one node, for each of them."""
    network: Link
    """Between nodes, for each device."""
    node_devices: int = 8
    host_bytes_per_s: float = HOST_COPY_BYTES_PER_S
    _known: dict[tuple[int, int, int], PrefillCost] = field(default_factory=dict)
    _dense_s: dict[int, float] = field(default_factory=dict)
    """Of a layer, by rows."""

    def __post_init__(self) -> None:
        facts, dtype = self.facts, getattr(torch, self.facts.dtype)
        self.page_tokens = page_tokens_for(facts.head_dim)
        self.width = dtype.itemsize
        self.weights_bytes = facts.num_params * self.width
        shape = (facts.num_kv_heads, facts.head_dim, dtype)
        pages = 64 * self.page_tokens
        self.token_bytes = {
            name: encoded_bytes(codec(name), facts.num_layers, *shape, pages) / pages
            for name in ("raw", "int8", "int4")
        }
        self.raw_bytes = self.token_bytes["raw"]
        self.layer_kv = self.raw_bytes / max(facts.num_layers, 1)
        self._weights_s = self.weights_bytes / self.speeds.copy_bytes_per_s
        self._layers_latency_s = facts.num_layers * self.link.latency_s

    def prefill(self, new_tokens: int, cached_tokens: int, ranks: int) -> PrefillCost:
        """Of new tokens behind cached ones that the gang holds. Lengths are rounded up by at most
        1 / 32."""
        key = (_rounded(new_tokens), _rounded(cached_tokens), ranks)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._prefill(*key)
        return found

    def chunk_tokens(self, new_tokens: int, ranks: int) -> int:
        """Over all ranks, whole pages; all at once where they are not many more than a chunk."""
        whole = -(-new_tokens // self.page_tokens) * self.page_tokens
        most = max(CHUNK_RANK_TOKENS, 65_536 // ranks) * ranks
        return min(whole, most)

    def step_s(self, ranks: int, kv_bytes_per_rank: float) -> float:
        """Of one token of every session of a batch; kv_bytes_per_rank: of all sessions together."""
        read = self._weights_s + kv_bytes_per_rank / self.speeds.scan_bytes_per_s
        if ranks == 1:
            return STEP_HOST_S + read
        if ranks <= self.node_devices:
            return STEP_HOST_S + read + self._layers_latency_s
        return STEP_HOST_S + read + self.facts.num_layers * self.network.latency_s

    def kv_bytes(self, tokens: int, codec_name: str = "raw") -> float:
        return tokens * self.token_bytes[codec_name]

    def move(
        self, tokens: int, sources: int, targets: int, near: bool, allow_8_bit: bool
    ) -> tuple[float, str, float]:
        """(seconds, codec on the wire, bytes) of pages between gangs of so many ranks. Encoded only
        where the loss is allowed and the link is slower than the codec."""
        link = self.link if near else self.network
        ends = sources if sources < targets else targets
        raw = tokens * self.raw_bytes
        best = (link.latency_s + raw / link.bytes_per_s / ends, "raw", raw)
        if allow_8_bit:
            sent = tokens * self.token_bytes["int8"]
            coded_s = link.latency_s + max(
                sent / link.bytes_per_s / ends, self.speeds.encode_s("int8", raw) / sources
            )
            if coded_s < best[0]:
                best = (coded_s, "int8", sent)
        return best

    def _prefill(self, new_tokens: int, cached_tokens: int, ranks: int) -> PrefillCost:
        chunk = self.chunk_tokens(new_tokens, ranks)
        best: PrefillCost | None = None
        for scheme in ("ring",) if ranks == 1 else ("ring", "gather-q"):
            count, rest = divmod(new_tokens, chunk)
            total = last = 0.0
            if count:
                first = self._chunk_s(chunk, cached_tokens, ranks, scheme)
                last = self._chunk_s(chunk, cached_tokens + (count - 1) * chunk, ranks, scheme)
                total = count * (first + last) / 2
            if rest:
                last = self._chunk_s(rest, cached_tokens + count * chunk, ranks, scheme)
                total += last
            if best is None or total < best.seconds:
                best = PrefillCost(total, chunk, scheme, last)
        assert best is not None
        return best

    def _chunk_s(self, rows: int, before: int, ranks: int, scheme: str) -> float:
        facts, speeds = self.facts, self.speeds
        layers, fit = facts.num_layers, speeds.attention
        link = self.link if ranks <= self.node_devices else self.network
        pages = -(-rows // (ranks * self.page_tokens))
        mine, keys = min(rows, pages * self.page_tokens), (before + rows) / ranks
        pairs = mine * (before + rows / 2)  # of the fullest rank
        dense = self._dense_s.get(mine)
        if dense is None:
            dense = self._dense_s[mine] = speeds.dense_s(facts, mine) / layers
        heads = facts.num_q_heads
        if scheme == "ring":
            # Full rectangles on two streams: half waves; a rank's own block is causal.
            hop = fit.seconds(mine, math.ceil(keys), pairs / ranks, ranks == 1, heads, streams=2)
            sent = link.seconds(keys * self.layer_kv) if ranks > 1 else 0.0
            attention = hop + (ranks - 1) * max(hop, sent)
            host = ranks * (speeds.attend_call_s + HOPS_CALLS * speeds.call_s)
        else:
            kernel = fit.seconds(rows, math.ceil(keys), pairs, False, heads, streams=2)
            query = mine * heads * facts.head_dim * self.width
            away = (ranks - 1) * (2 * query + 4 * mine * heads)
            merged = (ranks + 1) * query
            attention = kernel + 2 * link.latency_s + away / link.bytes_per_s
            attention += speeds.merge_s(merged)
            host = 2 * speeds.attend_call_s + 2 * ranks * speeds.call_s
        return layers * max(dense + attention, host + speeds.dense_host_s(facts) / layers)


def gang_sizes(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `largest`."""
    return tuple(1 << k for k in range(max(1, largest).bit_length()))


def _rounded(tokens: int) -> int:
    """Up, to one of 32 steps an octave."""
    if tokens <= _OCTAVE_STEPS:
        return tokens
    shift = tokens.bit_length() - _OCTAVE_STEPS.bit_length()
    return -(-tokens >> shift) << shift
