"""How long a prefill will take: its chunks on a simulated clock. Pure.

    chunk   = sum over layers of what takes longest: the device, or its host
    layer   = the model without attention, then the scheme's attention, simulated over all ranks
    prefill = sum over chunks

A chunk's time is linear in the tokens that lie before it, to within a percent: chunks of one size
are simulated at a few lengths and the others lie on the lines between.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import msgspec
import torch

from ringspan.attention.clocks import Simulated
from ringspan.attention.cost import Link, Speeds
from ringspan.attention.kv import PLAIN
from ringspan.attention.layout import Deal, deal
from ringspan.attention.problem import Problem, Source
from ringspan.attention.simulate import leased_bytes as attention_leases
from ringspan.attention.simulate import simulate
from ringspan.cluster.messages import ModelFacts
from ringspan.kvstore.codecs.registry import codec
from ringspan.types import Span, coalesce, total_tokens


class Way(NamedTuple):
    """One way to prefill: `num_tokens` new ones, behind `cached_tokens`."""

    num_tokens: int
    chunk_tokens: int
    layout: str
    scheme: str
    codec: str
    page_tokens: int
    world_size: int
    cached_tokens: int = 0
    deterministic: bool = False

    @property
    def chunks(self) -> tuple[Span, ...]:
        stop = self.cached_tokens + self.num_tokens
        starts = range(self.cached_tokens, stop, self.chunk_tokens)
        return tuple(Span(start, min(start + self.chunk_tokens, stop)) for start in starts)


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    chunk_s: tuple[float, ...]
    exposed_s: float
    """How long computing stands still for exchanges, over all chunks, on the rank that waits most;
    of loopback ranks together."""
    sent_bytes: int
    """By the rank that sends most."""
    buffer_bytes: int
    """Leased by the schemes for exchanges and decoding, on the rank that leases most."""

    @property
    def seconds(self) -> float:
        return sum(self.chunk_s)


class _Chunk(NamedTuple):
    seconds: float
    exposed_s: float
    sent_bytes: float
    buffer_bytes: float


def predict(
    way: Way, facts: ModelFacts, speeds: Speeds, link: Link, *, lengths: int = 4
) -> Prediction:
    """Raises BadInput where the scheme cannot serve the model. lengths: how many of a way's chunks
    are simulated, at least the first, the last, and one of another size."""
    chunks = way.chunks
    whole = [k for k, chunk in enumerate(chunks) if chunk.tokens == chunks[0].tokens]
    found = {k: _chunk(way, k, facts, speeds, link) for k in _picked(len(whole), lengths)}
    if len(whole) < len(chunks):
        found[len(chunks) - 1] = _chunk(way, len(chunks) - 1, facts, speeds, link)
    every = [_between(found, k) for k in range(len(chunks))]
    return Prediction(
        chunk_s=tuple(chunk.seconds for chunk in every),
        exposed_s=sum(chunk.exposed_s for chunk in every),
        sent_bytes=round(sum(chunk.sent_bytes for chunk in every)),
        buffer_bytes=round(max(chunk.buffer_bytes for chunk in every)),
    )


def _picked(count: int, most: int) -> list[int]:
    """First and last of `count`, and between them first those where it may bend: the second, which
    has something before it, and the middle."""
    wanted = [0, count - 1, 1, count // 2][: max(most, 2)]
    return sorted({k for k in wanted if 0 <= k < count})


def _between(found: dict[int, _Chunk], k: int) -> _Chunk:
    if k in found:
        return found[k]
    low = max(at for at in found if at < k)
    high = min(at for at in found if at > k)
    share = (k - low) / (high - low)
    return _Chunk(*(a + share * (b - a) for a, b in zip(found[low], found[high], strict=True)))


def _chunk(way: Way, k: int, facts: ModelFacts, speeds: Speeds, link: Link) -> _Chunk:
    """The k-th chunk of a way, simulated once for each kind of layer."""
    chunk = way.chunks[k]
    rows = [total_tokens(spans) for spans in _dealt(way, chunk.start, chunk.tokens)]
    dtype: torch.dtype = getattr(torch, facts.dtype)
    new_bytes = 2 * facts.num_kv_heads * facts.head_dim * dtype.itemsize
    layers = max(facts.num_layers, 1)
    host_s = speeds.dense_host_s(facts) / layers
    # A rank without tokens takes one that counts for nothing through the model.
    before = [
        (
            speeds.dense_s(facts, max(count, 1)) / layers
            + speeds.encode_s(way.codec, count * new_bytes),
            host_s,
        )
        for count in rows
    ]
    total = _Chunk(0.0, 0.0, 0.0, 0.0)
    for window in sorted(set(facts.windows), key=lambda window: window or 0):
        times = facts.windows.count(window)
        played = simulate(
            way.scheme,
            _problem(way._replace(scheme=""), k, window),
            speeds,
            link,
            heads=(facts.num_q_heads, facts.num_kv_heads),
            head_dim=facts.head_dim,
            dtype=dtype,
            window=window,
            deterministic=way.deterministic,
            before=before,
        )
        total = _Chunk(
            total.seconds + times * _period(played, link),
            total.exposed_s + times * _exposed(played, link),
            total.sent_bytes + times * max(played.sent_bytes),
            max(total.buffer_bytes, *played.buffer_bytes),
        )
    return total


def _period(played: Simulated, link: Link) -> float:
    """From layer to layer: devices and hosts both have to get through it."""
    hosts = sum(played.host_s) if link.shared_device else max(played.host_s)
    return max(played.seconds, hosts)


def _exposed(played: Simulated, link: Link) -> float:
    every = [sum(steps) for steps in played.exposed_s]
    return sum(every) if link.shared_device else max(every)


@lru_cache(maxsize=16)
def _problem(way: Way, k: int, window: int | None) -> Problem:
    """Chunk k over all before it, whatever the scheme: problems remember how they were cut.

    Every rank's earlier keys stand in one span, as many as it has of them: all are before every
    query, so the pieces are the same as with the many spans that they really are. A window looks
    back at some only: those chunks are dealt as they are.
    """
    chunk = way.chunks[k]
    dealt = _dealt(way, chunk.start, chunk.tokens)
    chosen = codec(way.codec)
    earlier: list[tuple[Span, ...]] = [() for _ in range(way.world_size)]
    if window is None:
        counts = [0] * way.world_size
        for behind, times in ((way.chunks[0], k), (Span(0, way.cached_tokens), 1)):
            if times and behind.tokens:
                held = [total_tokens(spans) for spans in _dealt(way, 0, behind.tokens)]
                counts = [sum(pair) for pair in zip(counts, [times * n for n in held], strict=True)]
        # The last rank has the first span: as in truth, members of a group are not in order.
        stops = list(accumulate(reversed(counts)))[::-1]
        for rank, (count, stop) in enumerate(zip(counts, stops, strict=True)):
            earlier[rank] = (Span(stop - count, stop),) if count else ()
    else:
        seen = [past for past in way.chunks[:k] if past.stop > chunk.start - window]
        if chunk.start - window < way.cached_tokens:
            seen.insert(0, Span(0, way.cached_tokens))
        for past in seen:
            for rank, mine in enumerate(_dealt(way, past.start, past.tokens)):
                earlier[rank] = (*earlier[rank], *mine)
    if chosen.exact:
        joined = tuple(coalesce((*old, *new)) for old, new in zip(earlier, dealt, strict=True))
        return Problem([dealt], [Source(joined, chosen)])
    return Problem([dealt], [Source(tuple(earlier), chosen), Source(dealt, PLAIN)])


def _dealt(way: Way, start: int, tokens: int) -> Deal:
    """Dealing depends on the number of pages alone: one pattern, moved to where it is wanted."""
    pattern = _pattern(way.layout, tokens, way.world_size, way.page_tokens)
    return tuple(
        tuple(Span(span.start + start, span.stop + start) for span in spans) for spans in pattern
    )


@lru_cache(maxsize=256)
def _pattern(layout: str, tokens: int, world_size: int, page_tokens: int) -> Deal:
    return deal(layout, Span(0, tokens), world_size, page_tokens)


def rank_tokens(way: Way) -> list[int]:
    """New tokens of all chunks that each rank holds."""
    chunks = way.chunks
    full, rest = (
        _pattern(way.layout, chunk.tokens, way.world_size, way.page_tokens)
        for chunk in (chunks[0], chunks[-1])
    )
    return [
        (len(chunks) - 1) * total_tokens(a) + total_tokens(b)
        for a, b in zip(full, rest, strict=True)
    ]


def leased_bytes(way: Way, facts: ModelFacts) -> int:
    """What a scheme leases on the rank that leases most, in the last chunk."""
    chunks = way.chunks
    dtype: torch.dtype = getattr(torch, facts.dtype)
    return max(
        attention_leases(
            way.scheme,
            _problem(way._replace(scheme=""), k, window),
            heads=(facts.num_q_heads, facts.num_kv_heads),
            head_dim=facts.head_dim,
            dtype=dtype,
            window=window,
        )
        for window in set(facts.windows)
        for k in {max(0, len(chunks) - 2), len(chunks) - 1}
    )
