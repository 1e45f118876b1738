"""How a rank gets the pages of a context that are there already: read from a store, as they are,
recoded or kept in host memory; or copied from another context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ringspan.cluster.device import on_device
from ringspan.cluster.messages import PageRecord
from ringspan.cluster.runtime import Runtime
from ringspan.errors import BadInput, CorruptPage, TooLarge
from ringspan.kvstore.batches import batches
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.page import Origin, differences
from ringspan.kvstore.pool import RESERVE_BYTES, free_bytes
from ringspan.kvstore.shard import GIB, ContextShard
from ringspan.kvstore.streamed import SLOTS, StreamedShard
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.placement import context_supply
from ringspan.kvstore.transcode import load_recoded, recoded_form, recoded_origin
from ringspan.kvstore.transfer import load_shard
from ringspan.types import Span


def open_recoded(
    runtime: Runtime,
    manifest: Manifest,
    root: str,
    records: Sequence[PageRecord],
    counters: StoreCounters,
    codec_name: str,
) -> tuple[ContextShard, Origin]:
    """In another codec, and the origin of KV that went through both."""
    name = pool_name(manifest.context_id)
    recoded_form(manifest.form, codec_name, f"context {manifest.context_id}")
    tokens = sum(record.span.tokens for record in records)
    shard = runtime.new_shard(name, codec_name, tokens, manifest.page_tokens)
    try:
        with on_device(runtime.device):
            load_recoded(root, manifest, records, shard, counters)
    except BaseException:
        del shard
        runtime.pool.free(name)
        raise
    return shard, recoded_origin(manifest.origin, manifest.form)


def open_shard(
    runtime: Runtime,
    manifest: Manifest,
    root: str,
    records: Sequence[PageRecord],
    counters: StoreCounters,
) -> ContextShard | StreamedShard:
    """On the device; where a GPU has no room for it, in host memory."""
    name = pool_name(manifest.context_id)
    tokens = sum(record.span.tokens for record in records)
    try:
        shard = runtime.new_shard(name, manifest.codec, tokens, manifest.page_tokens)
    except TooLarge as refused:
        if runtime.device.type != "cuda":
            raise
        return _open_streamed(runtime, manifest, root, records, refused, counters)
    try:
        supply = context_supply(Path(root), manifest, records, counters)
        with on_device(runtime.device):
            load_shard(root, manifest, records, shard, supply=supply)
    except BaseException:
        del shard
        runtime.pool.free(name)
        raise
    return shard


def _open_streamed(
    runtime: Runtime,
    manifest: Manifest,
    root: str,
    records: Sequence[PageRecord],
    refused: TooLarge,
    counters: StoreCounters,
) -> StreamedShard:
    """`refused`: why it does not lie on the device."""
    form = manifest.form
    tokens = sum(record.span.tokens for record in records)
    need = form.bytes_of(tokens)
    # the ranks of a gang may all be on this host
    room = max(0, free_bytes("cpu") - RESERVE_BYTES["cpu"]) // runtime.spec.world_size
    if need > room:
        raise TooLarge(f"{refused}; host memory has {room / GIB:.2f} GiB for a rank to stream from")
    ring_bytes = SLOTS * need // form.num_layers
    runtime.pool.check(f"streaming context {manifest.context_id}", ring_bytes, manifest.codec)
    held = ContextShard(
        codec(form.codec),
        form.num_layers,
        form.num_kv_heads,
        form.head_dim,
        runtime.dtype,
        "cpu",
        tokens,
        form.page_tokens,
    )
    supply = context_supply(Path(root), manifest, records, counters)
    sums = load_shard(root, manifest, records, held, supply=supply)
    with on_device(runtime.device):
        return StreamedShard(held, sums, runtime.device)


def copy_pages(source: ContextShard, shard: ContextShard, spans: tuple[Span, ...]) -> None:
    """The source's first pages, which are `spans`, into the empty `shard` of the same form.

    Raises BadInput where the forms differ, CorruptPage where the copy's sums do; the shard is then
    as before.
    """
    if source.form != shard.form:
        raise BadInput(f"these pages do not fit the shard: {differences(shard.form, source.form)}")
    shard.reserve(spans)
    lengths = [page.tokens for page, _ in shard.pages()]
    load = batches(lengths, shard.bytes_of, 0)
    size = max((batch.pages * shard.bytes_of(batch.tokens) for batch in load), default=0)
    room = torch.empty(size, dtype=torch.uint8, device=shard.device)
    try:
        for batch in load:
            page_bytes = shard.bytes_of(batch.tokens)
            payloads = room[: batch.pages * page_bytes].view(batch.pages, page_bytes)
            source.gather(batch.row, batch.tokens, payloads)
            shard.fill(batch.row, batch.tokens, payloads)
        if shard.reserved_plane_sums() != source.all_plane_sums()[: len(lengths)]:
            raise CorruptPage(f"the copy of pages {spans} differs from what was copied")
    except BaseException:
        shard.cancel()
        raise
    shard.mark_filled()


def pool_name(context_id: str) -> str:
    """Of its memory."""
    return f"context {context_id}"
