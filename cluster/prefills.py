"""The contexts on a rank: prefilled chunk by chunk, saved, opened, dropped.

A prefill may begin on pages that are there already, of a context held or stored whose first tokens
are the same: they stay on the ranks that have them, and only what is new is computed and dealt.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from ringspan.attention.audit import Audit
from ringspan.attention.engine import HeldKeys, PrefillStep, Proof
from ringspan.attention.group import synchronize
from ringspan.attention.layout import Deal, deal, positions
from ringspan.cluster.beginning import begun, origin_of, spans_before
from ringspan.cluster.device import on_device
from ringspan.cluster.messages import (
    ChunkDone,
    Findings,
    PageRecord,
    PrefillBegun,
    PrefillPlan,
    ShardOpened,
    ShardSaved,
)
from ringspan.cluster.opening import copy_pages, open_recoded, open_shard, pool_name
from ringspan.cluster.page_writer import PageWriter, new_segment
from ringspan.cluster.runtime import Runtime
from ringspan.errors import BadInput, TooLarge
from ringspan.kvstore.encryption import cipher_of
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.manifest import Manifest, assign_pages
from ringspan.kvstore.page import EXACT, Origin
from ringspan.kvstore.quota import OpenMark
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.streamed import StreamedShard
from ringspan.kvstore.tiers.counters import COUNTERS, StoreCounters
from ringspan.kvstore.transfer import load_shard
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
    saving: PageWriter | None = None
    """Its pages on their way to the disk, while it is prefilled."""
    saved: tuple[PageRecord, ...] = ()
    """Its first pages, which are durable in the staging folder; `saving` writes those behind."""
    staging: str = ""
    """Where `saving` writes."""
    mark: OpenMark | None = None
    """Of one that was opened: its stored copy is not evicted meanwhile."""

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
    keys: tuple[str, ...]
    """Of all its pages."""
    prefix: Deal
    """What each rank held before the first chunk."""
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

    def get(self, context_id: str) -> HeldContext | None:
        """None where it is not held."""
        return self._held.get(context_id)

    def take_over(self, context_id: str, held: HeldContext) -> None:
        """A context that came from the ranks of another gang, complete and verified. Its shard is
        in the pool under `pool_name`."""
        self._held[context_id] = held

    def drop(self, context_id: str) -> None:
        held = self._held.pop(context_id, None)
        if held is not None:
            if held.saving is not None:
                held.saving.abort()
            if isinstance(held.shard, StreamedShard):
                held.shard.close()
            if held.mark is not None:
                held.mark.close()
            self._runtime.pool.free(pool_name(context_id))

    def clear(self) -> None:
        for context_id in list(self._held):
            self.drop(context_id)

    def begin(self, plan: PrefillPlan, token_ids: np.ndarray) -> PrefillBegun:
        """Memory for this rank's whole shard of the context."""
        nothing: Deal = ((),) * self._runtime.spec.world_size
        self.begin_as(plan, token_ids, nothing, EXACT)
        return begun(plan, nothing, EXACT)

    def begin_on_held(self, plan: PrefillPlan, token_ids: np.ndarray) -> PrefillBegun:
        """`begin` with the pages of a context held here: copied within the rank, the copy's sums
        compared."""
        source = self[plan.prefix_id]
        prefix = tuple(spans_before(spans, plan.reused_tokens) for spans in source.held)
        held = self.begin_as(plan, token_ids, prefix, source.origin.provenance)
        try:
            with on_device(self._runtime.device):
                copy_pages(source.resident, held.resident, prefix[self._rank])
        except BaseException:
            self.drop(plan.context_id)
            raise
        return begun(plan, prefix, source.origin.provenance)

    def begin_on_stored(
        self, plan: PrefillPlan, token_ids: np.ndarray, manifest: Manifest, root: str
    ) -> PrefillBegun:
        """`begin` with pages of a stored context: read and verified as `open` does."""
        pages = manifest.pages[: plan.reused_tokens // plan.page_tokens]
        assigned = assign_pages(
            msgspec.structs.replace(manifest, pages=pages), self._runtime.spec.world_size
        )
        prefix = tuple(coalesce(record.span for record in records) for records in assigned)
        held = self.begin_as(plan, token_ids, prefix, manifest.origin.provenance)
        try:
            mark = OpenMark(Path(root), manifest.context_id)
            with closing(mark), on_device(self._runtime.device):
                load_shard(root, manifest, assigned[self._rank], held.resident)
        except BaseException:
            self.drop(plan.context_id)
            raise
        return begun(plan, prefix, manifest.origin.provenance)

    def begin_as(
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
            total_tokens(self.dealt(plan, chunk)[self._rank]) for chunk in plan.chunks
        )
        shard = self._runtime.new_shard(
            pool_name(plan.context_id), plan.codec, mine, plan.page_tokens
        )
        keys = page_keys(
            self._runtime.facts.fingerprint, namespace_of(plan), token_ids, plan.page_tokens
        )
        held = HeldContext(
            shard,
            plan.num_tokens,
            prefix,
            origin_of(
                plan,
                namespace_of(plan),
                provenance,
                self._runtime.facts,
                self._runtime.spec.model,
            ),
            Prefill(plan, token_ids, tuple(keys), prefix),
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
        self.write_behind(context_id)
        held, prefill = self._prefilling(context_id)
        span = prefill.plan.chunks[chunk_index]
        return ChunkDone(
            context_id=context_id,
            rank=self._rank,
            chunk_index=chunk_index,
            span=span,
            rank_tokens=total_tokens(self.dealt(prefill.plan, span)[self._rank]),
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
        self.write_behind(context_id)
        _, prefill = self._prefilling(context_id)
        spans = self.dealt(prefill.plan, prefill.plan.chunks[chunk_index])[self._rank]
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
        dealt = self.dealt(plan, plan.chunks[chunk_index])
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
        if held.staging != staging:
            held.saved = ()
        path = new_segment(staging, self._rank)
        cipher = cipher_of(namespace_of(prefill.plan))
        before = len(held.saved)
        held.saving = PageWriter(held.resident, held.origin, prefill.keys, path, before, cipher)
        held.staging = staging

    def write_behind(self, context_id: str, settled: bool = False) -> None:
        """The chunk's pages to the writers. Raises what earlier pages failed by: after the chunk,
        so that the ranks stay in step.

        A rank that is lost later leaves what is in its files by then. On a CPU, whose cores write
        and compute alike, that is all of this chunk; on a GPU, which goes on meanwhile, all of the
        one before. settled: wait for all in any case.
        """
        saving = self[context_id].saving
        if saving is not None:
            before = saving.handed_over
            with on_device(self._runtime.device):
                saving.add()
            settled = settled or self._runtime.device.type != "cuda"
            saving.settle(saving.handed_over if settled else before)

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
        self.finish_saving(context_id, staging)
        return ShardSaved(
            context_id=context_id,
            rank=self._rank,
            records=held.saved,
            elapsed_s=time.perf_counter() - began,
        )

    def finish_saving(self, context_id: str, staging: str) -> None:
        """All pages of the shard are durable: `held.saved`. May be repeated."""
        held = self[context_id]
        if held.staging == staging and len(held.saved) == len(held.resident.pages()):
            return
        if held.saving is None or held.staging != staging:
            self.begin_saving(context_id, staging)
        saving, held.saving = held.saving, None
        assert saving is not None
        with on_device(self._runtime.device):
            held.saved += saving.finish()

    def open(self, manifest: Manifest, root: str, codec_name: str = "") -> ShardOpened:
        """Reads this rank's share of a stored context; every page is verified before use.
        codec_name: one to recode the pages to, on the device; empty: as they are."""
        began = time.perf_counter()
        self.drop(manifest.context_id)
        assigned = assign_pages(manifest, self._runtime.spec.world_size)
        records = assigned[self._rank]
        counters = StoreCounters(within=COUNTERS)
        mark = OpenMark(Path(root), manifest.context_id)
        shard: ContextShard | StreamedShard
        if codec_name:
            shard, origin = open_recoded(
                self._runtime, manifest, root, records, counters, codec_name
            )
        else:
            shard = open_shard(self._runtime, manifest, root, records, counters)
            origin = manifest.origin
        held = tuple(coalesce(record.span for record in records) for records in assigned)
        self._held[manifest.context_id] = HeldContext(
            shard, manifest.num_tokens, held, origin, mark=mark
        )
        return ShardOpened(
            context_id=manifest.context_id,
            rank=self._rank,
            num_pages=len(records),
            kv_bytes=shard.kv_bytes,
            elapsed_s=time.perf_counter() - began,
            pages=counters.snapshot(),
        )

    @property
    def _rank(self) -> int:
        return self._runtime.rank

    def _prefilling(self, context_id: str) -> tuple[HeldContext, Prefill]:
        held = self[context_id]
        if held.prefill is None:
            raise BadInput(f"context {context_id} was opened from a store: it is complete")
        return held, held.prefill

    def dealt(self, plan: PrefillPlan, chunk: Span) -> Deal:
        return deal(plan.layout, chunk, self._runtime.spec.world_size, plan.page_tokens)


def namespace_of(plan: PrefillPlan) -> bytes:
    return bytes.fromhex(plan.namespace) if plan.namespace else PUBLIC_NAMESPACE
