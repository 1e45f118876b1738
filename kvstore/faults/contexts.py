"""Contexts whose KV is known, and the two processes that use them: a gang that writes, readers.

What a context holds is made from its page keys, so that a page computed again is the same page.
The oracle's copy of it never goes near the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ringspan.cluster.messages import ModelSpec
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.folder import segment_path
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, namespace_digest, page_keys
from ringspan.kvstore.manifest import Manifest, assign_pages
from ringspan.kvstore.page import EXACT, Origin, Page, PageForm, recomputed
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.placement import context_supply
from ringspan.kvstore.transfer import load_shard
from ringspan.kvstore.write_behind import WriteBehind
from ringspan.types import Span, coalesce, total_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.folder import Store

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 2, 1, 8
PAGE_TOKENS = {"raw": 4, "int8": 128, "int4": 128}
FINGERPRINT = "ab" * 32
PREFILL_S, ATTEND_S = 2e-3, 1e-5
"""Of simulated time to compute a page again, and for each page before it."""


class Known(NamedTuple):
    """A context as it must be."""

    name: str
    codec: str
    token_ids: np.ndarray
    keys: tuple[str, ...]
    form: PageForm
    shard: ContextShard
    """All of it, in position order."""
    payloads: tuple[bytes, ...]
    """Of each page."""
    client_has_tokens: bool
    """Whoever asked for it can ask again."""

    @property
    def spans(self) -> list[Span]:
        step, total = self.form.page_tokens, len(self.token_ids)
        return [Span(at, min(at + step, total)) for at in range(0, total, step)]


def origin() -> Origin:
    return Origin(
        fingerprint=FINGERPRINT,
        namespace=namespace_digest(PUBLIC_NAMESPACE),
        rope="applied theta=10000",
        provenance=EXACT,
    )


def make(token_ids: np.ndarray, codec_name: str, client_has_tokens: bool) -> Known:
    """The context of these tokens."""
    step = PAGE_TOKENS[codec_name]
    keys = tuple(page_keys(FINGERPRINT, PUBLIC_NAMESPACE, token_ids, step))
    spans = [Span(at, min(at + step, len(token_ids))) for at in range(0, len(token_ids), step)]
    shard = _computed(codec_name, keys, spans)
    payloads = tuple(
        bytes(shard.export_page(index, origin(), keys).payload) for index in range(len(keys))
    )
    return Known(
        context_id(keys), codec_name, token_ids, keys, shard.form, shard, payloads,
        client_has_tokens,
    )  # fmt: skip


def _computed(codec_name: str, keys: Sequence[str], spans: Sequence[Span]) -> ContextShard:
    """A shard of these pages, as the model computes them: the same for the same keys."""
    step = PAGE_TOKENS[codec_name]
    shard = _shard(codec_name, total_tokens(spans))
    shard.reserve(coalesce(spans))
    pages = [
        torch.randn(
            (NUM_LAYERS, 2, span.tokens, NUM_KV_HEADS, HEAD_DIM),
            generator=torch.Generator().manual_seed(int(keys[span.start // step][:15], 16)),
        )
        for span in spans
    ]
    for layer in range(NUM_LAYERS):
        k, v = torch.cat([page[layer] for page in pages], dim=1)
        shard.write(layer, k, v)
    return shard


def _shard(codec_name: str, tokens: int) -> ContextShard:
    step = PAGE_TOKENS[codec_name]
    return ContextShard(
        codec(codec_name), NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, torch.float32, "cpu", tokens, step
    )


def prefill(store: Store, known: Known, world_size: int) -> Manifest:
    """Write a context as a gang does: each rank its pages, behind its computing; then publish."""
    spans = known.spans
    records: list[PageRecord] = []
    with store.staged(known.name, known.token_ids) as staging:
        for rank in range(min(world_size, len(spans))):
            shard = _computed(known.codec, known.keys, spans[rank::world_size])
            writer = WriteBehind(shard, origin(), known.keys, segment_path(staging, rank), 1)
            try:
                writer.add()
                records += writer.finish()
            except BaseException:
                writer.abort()
                raise
        return store.publish(staging, _manifest(known, records, world_size))


def _manifest(known: Known, records: Iterable[PageRecord], world_size: int) -> Manifest:
    pages = tuple(sorted(records, key=lambda record: record.span))
    total = len(known.token_ids)
    return Manifest(
        context_id=known.name,
        model=ModelSpec(name="random:tiny"),
        origin=origin(),
        form=known.form,
        namespace=PUBLIC_NAMESPACE.hex(),
        num_tokens=total,
        layout="striped",
        chunk_tokens=known.form.page_tokens * world_size,
        world_size=world_size,
        created_unix_s=1.7e9,
        document_tokens=Span(0, total),
        payload_bytes=sum(record.payload_bytes for record in pages),
        pages=pages,
    )


class Recompute:
    """`transfer.Repair`: lost pages from their tokens. spend: is told the seconds it takes."""

    def __init__(self, known: Known, token_ids: np.ndarray) -> None:
        if not np.array_equal(token_ids, known.token_ids):
            raise AssertionError(f"context {known.name}: tokens verified that are not its tokens")
        self._known = known
        self.pages = 0
        self.seconds = 0.0

    def __call__(self, lost: tuple[PageRecord, ...]) -> Iterable[Page]:
        for record in lost:
            self.pages += 1
            step = self._known.form.page_tokens
            self.seconds += PREFILL_S + ATTEND_S * (record.span.start // step)
            yield self.page(record.span)

    def page(self, span: Span) -> Page:
        known = self._known
        shard = _computed(known.codec, known.keys, [span])
        return shard.export_page(0, recomputed(origin()), known.keys)


def open_context(
    root: Path,
    manifest: Manifest,
    known: Known,
    world_size: int,
    counters: StoreCounters,
    repair: Recompute | None,
) -> list[tuple[int, ContextShard]]:
    """(first page, shard) of every rank that opens the context."""
    found: list[tuple[int, ContextShard]] = []
    at = 0
    for records in assign_pages(manifest, world_size):
        if records:
            shard = _shard(known.codec, sum(record.span.tokens for record in records))
            with context_supply(root, manifest, records, counters) as supply:
                load_shard(root, manifest, records, shard, 1, supply=supply, repair=repair)
            found.append((at, shard))
        at += len(records)
    return found


def wrong_pages(known: Known, opened: Sequence[tuple[int, ContextShard]]) -> list[int]:
    """Pages that a reader was given and whose bytes are not the context's."""
    wrong: list[int] = []
    for first, shard in opened:
        for index in range(len(shard.pages())):
            page = shard.export_page(index, origin(), known.keys)
            right = page.header.span == known.spans[first + index]
            if not right or bytes(page.payload) != known.payloads[first + index]:
                wrong.append(first + index)
    return wrong


def copies_exist(known: Known, places: Sequence[bytes]) -> bool:
    """Whether the bytes of every page lie somewhere in `places`."""
    return all(any(payload in place for place in places) for payload in known.payloads)
