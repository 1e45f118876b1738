"""The contexts on a rank: prefilled chunk by chunk, saved, opened, dropped.

A prefill may begin on pages that are there already, of a context held or stored whose first tokens
are the same: they stay on the ranks that have them, and only what is new is computed and dealt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from ringspan.attention.audit import Audit
from ringspan.attention.engine import HeldKeys, PrefillStep, Proof
from ringspan.attention.group import synchronize
from ringspan.attention.layout import Deal, deal, positions
from ringspan.cluster.device import on_device
from ringspan.cluster.messages import (
    ChunkDone,
    Findings,
    PageRecord,
    PrefillPlan,
    ShardOpened,
    ShardSaved,
)
from ringspan.cluster.runtime import Runtime
from ringspan.errors import BadInput, CorruptPage, TooLarge
from ringspan.kvstore.batches import batches
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.folder import segment_path
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, namespace_digest, page_keys
from ringspan.kvstore.manifest import Manifest, assign_pages
from ringspan.kvstore.page import EXACT, Origin, differences
from ringspan.kvstore.pool import RESERVE_BYTES, free_bytes
from ringspan.kvstore.shard import GIB, ContextShard
from ringspan.kvstore.streamed import SLOTS, StreamedShard
from ringspan.kvstore.tiers.counters import COUNTERS, StoreCounters
from ringspan.kvstore.tiers.placement import context_supply
from ringspan.kvstore.transcode import load_recoded, recoded_form, recoded_origin
from ringspan.kvstore.transfer import load_shard
from ringspan.kvstore.write_behind import WriteBehind
from ringspan.types import Span, coalesce, total_tokens


@dataclass
class HeldContext:
    """This rank's shard of a context."""

    shard: ContextShard | StreamedShard
    num_tokens: int
    held: Deal
    """What every rank holds of it."""
    origin: Origin
    prefill: Prefill | None = None
    """None when it was opened from a store."""
    saving: WriteBehind | None = None
    """Its pages on their way to the disk, while it is prefilled."""
    staging: str = ""
    """Where `saving` writes."""

    @property
    def resident(self) -> ContextShard:
        """The shard of a context that lies on the device, as one that is prefilled does."""
        if isinstance(self.shard, StreamedShard):
            raise BadInput(
                "a context that is streamed from host memory can be asked, not built on: open it "
                "on more ranks or in a smaller codec"
            )
        return self.shard


@dataclass
class Prefill:
    """How far a prefill is."""

    plan: PrefillPlan
    token_ids: np.ndarray
    chunks_done: int = 0


class Contexts:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._held: dict[str, HeldContext] = {}

    def __getitem__(self, context_id: str) -> HeldContext:
        if context_id not in self._held:
            raise BadInput(
                f"rank {self._runtime.rank} does not hold context {context_id}: open or prefill it "
                "first"
            )
        return self._held[context_id]

    def drop(self, context_id: str) -> None:
        held = self._held.pop(context_id, None)
        if held is not None:
            if held.saving is not None:
                held.saving.abort()
            if isinstance(held.shard, StreamedShard):
                held.shard.close()
            self._runtime.pool.free(_pool_name(context_id))

    def clear(self) -> None:
        for context_id in list(self._held):
            self.drop(context_id)

    def begin(self, plan: PrefillPlan, token_ids: np.ndarray) -> None:
        """Memory for this rank's whole shard of the context."""
        nothing: Deal = ((),) * self._runtime.spec.world_size
        self._begin(plan, token_ids, nothing, EXACT)

    def begin_on_held(self, plan: PrefillPlan, token_ids: np.ndarray) -> None:
        """`begin` with the pages of a context held here: copied within the rank, the copy's sums
        compared."""
        source = self[plan.prefix_id]
        prefix = tuple(_before(spans, plan.reused_tokens) for spans in source.held)
        held = self._begin(plan, token_ids, prefix, source.origin.provenance)
        try:
            with on_device(self._runtime.device):
                copy_pages(source.resident, held.resident, prefix[self._rank])
        except BaseException:
            self.drop(plan.context_id)
            raise

    def begin_on_stored(
        self, plan: PrefillPlan, token_ids: np.ndarray, manifest: Manifest, root: str
    ) -> None:
        """`begin` with pages of a stored context: read and verified as `open` does."""
        pages = manifest.pages[: plan.reused_tokens // plan.page_tokens]
        assigned = assign_pages(
            msgspec.structs.replace(manifest, pages=pages), self._runtime.spec.world_size
        )
        prefix = tuple(coalesce(record.span for record in records) for records in assigned)
        held = self._begin(plan, token_ids, prefix, manifest.origin.provenance)
        try:
            with on_device(self._runtime.device):
                load_shard(root, manifest, assigned[self._rank], held.resident)
        except BaseException:
            self.drop(plan.context_id)
            raise

    def _begin(
        self,
        plan: PrefillPlan,
        token_ids: np.ndarray,
        prefix: Deal,
        provenance: tuple[str, ...],
    ) -> HeldContext:
        """prefix: what each rank will hold before the first chunk; provenance: of its KV."""
        if len(token_ids) != plan.num_tokens:
            raise BadInput(f"the plan is for {plan.num_tokens} tokens, {len(token_ids)} came")
        if (found := sum(map(total_tokens, prefix))) != plan.reused_tokens:
            raise BadInput(f"the plan takes over {plan.reused_tokens} tokens, {found} are there")
        self.drop(plan.context_id)
        mine = total_tokens(prefix[self._rank]) + sum(
            total_tokens(self._dealt(plan, chunk)[self._rank]) for chunk in plan.chunks
        )
        shard = self._runtime.new_shard(
            _pool_name(plan.context_id), plan.codec, mine, plan.page_tokens
        )
        held = HeldContext(
            shard,
            plan.num_tokens,
            prefix,
            self._origin(plan, provenance),
            Prefill(plan, token_ids),
        )
        self._held[plan.context_id] = held
        if self._runtime.device.type == "cuda" and not shard.codec.exact:
            self._runtime.compile_codec(plan.codec, plan.page_tokens)
        return held

    def run_chunk(self, context_id: str, chunk_index: int) -> ChunkDone:
        began = time.perf_counter()
        transport, device = self._runtime.transport, self._runtime.device
        waited, sent = transport.exchange_s, transport.sent_bytes
        transport.exposure.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _, proof = self._forward_chunk(context_id, chunk_index, logits=False)
        synchronize(transport, device)
        self._hand_over(context_id)
        held, prefill = self._prefilling(context_id)
        span = prefill.plan.chunks[chunk_index]
        return ChunkDone(
            context_id=context_id,
            rank=self._rank,
            chunk_index=chunk_index,
            span=span,
            rank_tokens=total_tokens(self._dealt(prefill.plan, span)[self._rank]),
            elapsed_s=time.perf_counter() - began,
            exchange_s=transport.exchange_s - waited,
            findings=Findings(
                exposed_s=transport.exposure.collect(),
                seen_keys=proof.seen or 0,
                audited_rows=proof.audit.rows if proof.audit else 0,
                audit_error=proof.audit.relative_error if proof.audit else 0.0,
                work_bytes=self._runtime.work_bytes(),
            ),
            sent_bytes=transport.sent_bytes - sent,
            kv_bytes=held.shard.kv_bytes,
        )

    def chunk_logits(
        self, context_id: str, chunk_index: int
    ) -> tuple[tuple[Span, ...], np.ndarray]:
        """This rank's spans of the chunk and their logits, fp32 [T, vocabulary]."""
        logits, _ = self._forward_chunk(context_id, chunk_index, logits=True)
        self._hand_over(context_id)
        _, prefill = self._prefilling(context_id)
        spans = self._dealt(prefill.plan, prefill.plan.chunks[chunk_index])[self._rank]
        return spans, logits[: total_tokens(spans)].float().cpu().numpy()

    def _forward_chunk(
        self, context_id: str, chunk_index: int, logits: bool
    ) -> tuple[torch.Tensor, Proof]:
        held, prefill = self._prefilling(context_id)
        plan, runtime = prefill.plan, self._runtime
        if chunk_index != prefill.chunks_done:
            raise BadInput(
                f"chunk {chunk_index} of context {context_id} came, {prefill.chunks_done} is next"
            )
        dealt = self._dealt(plan, plan.chunks[chunk_index])
        spans = dealt[self._rank]
        shard = held.resident
        shard.reserve(spans)
        step = PrefillStep(
            runtime.transport,
            runtime.buffers,
            runtime.compute,
            plan.scheme,
            shard,
            dealt,
            (HeldKeys(shard, held.held),),
            deterministic=plan.deterministic,
            audit=Audit.drawn(chunk_index, runtime.facts.num_layers, plan.audit_rows),
        )
        # A rank that got no tokens still serves every hop: it takes one that counts for nothing.
        where = positions(spans) if spans else torch.zeros(1, dtype=torch.int64)
        ids = torch.from_numpy(prefill.token_ids[where.numpy()].astype(np.int64))
        try:
            out = runtime.forward(ids, where, step, logits=logits, last_only=False)
            synchronize(runtime.transport, runtime.device)  # a lost peer is named before the counts
            proof = step.prove(runtime.device)
        except torch.OutOfMemoryError as error:
            shard.cancel()
            why = str(error).strip().splitlines()[0]
            raise TooLarge(
                f"chunk {chunk_index} of {plan.chunk_tokens} tokens does not fit beside the KV on "
                f"{runtime.device} ({why}); use a smaller --chunk-tokens"
            ) from None
        except BaseException:
            shard.cancel()
            raise
        held.held = tuple(
            coalesce((*before, *new)) for before, new in zip(held.held, dealt, strict=True)
        )
        prefill.chunks_done += 1
        return out, proof

    def begin_saving(self, context_id: str, staging: str) -> None:
        """From now on this rank's pages go to the staging folder as soon as a chunk is done."""
        held, prefill = self._prefilling(context_id)
        if held.saving is not None:
            held.saving.abort()
        keys = page_keys(
            self._runtime.facts.fingerprint,
            _namespace(prefill.plan),
            prefill.token_ids,
            prefill.plan.page_tokens,
        )
        path = segment_path(staging, self._rank)
        held.saving = WriteBehind(held.resident, held.origin, keys, path)
        held.staging = staging

    def _hand_over(self, context_id: str) -> None:
        """The chunk's pages to the writers. Raises what earlier pages failed by: after the chunk,
        so that the ranks stay in step."""
        saving = self[context_id].saving
        if saving is not None:
            with on_device(self._runtime.device):
                saving.add()

    def save(self, context_id: str, staging: str) -> ShardSaved:
        """What is not yet in the staging folder of this rank's pages; durable then."""
        began = time.perf_counter()
        held, prefill = self._prefilling(context_id)
        plan = prefill.plan
        if prefill.chunks_done != len(plan.chunks):
            raise BadInput(
                f"context {context_id} has {prefill.chunks_done} of {len(plan.chunks)} chunks: it "
                "is saved when it is whole"
            )
        if held.saving is None or held.staging != staging:
            self.begin_saving(context_id, staging)
        saving, held.saving = held.saving, None
        assert saving is not None
        with on_device(self._runtime.device):
            records = saving.finish()
        return ShardSaved(
            context_id=context_id,
            rank=self._rank,
            records=records,
            elapsed_s=time.perf_counter() - began,
        )

    def open(self, manifest: Manifest, root: str, codec_name: str = "") -> ShardOpened:
        """Reads this rank's share of a stored context; every page is verified before use.
        codec_name: one to recode the pages to, on the device; empty: as they are."""
        began = time.perf_counter()
        self.drop(manifest.context_id)
        assigned = assign_pages(manifest, self._runtime.spec.world_size)
        records = assigned[self._rank]
        counters = StoreCounters(within=COUNTERS)
        shard: ContextShard | StreamedShard
        if codec_name:
            shard, origin = self._open_recoded(manifest, root, records, counters, codec_name)
        else:
            shard = self._open_shard(manifest, root, records, counters)
            origin = manifest.origin
        held = tuple(coalesce(record.span for record in records) for records in assigned)
        self._held[manifest.context_id] = HeldContext(shard, manifest.num_tokens, held, origin)
        return ShardOpened(
            context_id=manifest.context_id,
            rank=self._rank,
            num_pages=len(records),
            kv_bytes=shard.kv_bytes,
            elapsed_s=time.perf_counter() - began,
            pages=counters.snapshot(),
        )

    def _open_recoded(
        self,
        manifest: Manifest,
        root: str,
        records: Sequence[PageRecord],
        counters: StoreCounters,
        codec_name: str,
    ) -> tuple[ContextShard, Origin]:
        """In another codec, and the origin of KV that went through both."""
        runtime, name = self._runtime, _pool_name(manifest.context_id)
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

    def _open_shard(
        self,
        manifest: Manifest,
        root: str,
        records: Sequence[PageRecord],
        counters: StoreCounters,
    ) -> ContextShard | StreamedShard:
        """On the device; where a GPU has no room for it, in host memory."""
        runtime, name = self._runtime, _pool_name(manifest.context_id)
        tokens = sum(record.span.tokens for record in records)
        try:
            shard = runtime.new_shard(name, manifest.codec, tokens, manifest.page_tokens)
        except TooLarge as refused:
            if runtime.device.type != "cuda":
                raise
            return self._open_streamed(manifest, root, records, refused, counters)
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
        self,
        manifest: Manifest,
        root: str,
        records: Sequence[PageRecord],
        refused: TooLarge,
        counters: StoreCounters,
    ) -> StreamedShard:
        """`refused`: why it does not lie on the device."""
        runtime, form = self._runtime, manifest.form
        tokens = sum(record.span.tokens for record in records)
        need = form.bytes_of(tokens)
        # the ranks of a gang may all be on this host
        room = max(0, free_bytes("cpu") - RESERVE_BYTES["cpu"]) // runtime.spec.world_size
        if need > room:
            raise TooLarge(
                f"{refused}; host memory has {room / GIB:.2f} GiB for a rank to stream from"
            )
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

    @property
    def _rank(self) -> int:
        return self._runtime.rank

    def _prefilling(self, context_id: str) -> tuple[HeldContext, Prefill]:
        held = self[context_id]
        if held.prefill is None:
            raise BadInput(f"context {context_id} was opened from a store: it is complete")
        return held, held.prefill

    def _dealt(self, plan: PrefillPlan, chunk: Span) -> Deal:
        return deal(plan.layout, chunk, self._runtime.spec.world_size, plan.page_tokens)

    def _origin(self, plan: PrefillPlan, prefix: tuple[str, ...]) -> Origin:
        """With a lossy codec every chunk but the first was computed over decoded pages; what the
        prefix's KV was computed with, the rest was too."""
        approximations = [name for name in prefix if name not in EXACT]
        if not codec(plan.codec).exact and (plan.reused_tokens or len(plan.chunks) > 1):
            approximations.append(f"attended over {plan.codec} pages")
        return Origin(
            fingerprint=self._runtime.facts.fingerprint,
            namespace=namespace_digest(_namespace(plan)),
            rope=f"applied, scaling {self._runtime.spec.model.rope_scaling or 'none'}",
            provenance=tuple(dict.fromkeys(approximations)) or EXACT,
        )


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


def _before(spans: tuple[Span, ...], stop: int) -> tuple[Span, ...]:
    """What of `spans` lies before position `stop`."""
    return coalesce(Span(span.start, min(span.stop, stop)) for span in spans if span.start < stop)


def _namespace(plan: PrefillPlan) -> bytes:
    return bytes.fromhex(plan.namespace) if plan.namespace else PUBLIC_NAMESPACE


def _pool_name(context_id: str) -> str:
    return f"context {context_id}"
