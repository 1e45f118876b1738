"""The contexts on a rank: prefilled chunk by chunk, saved, opened, dropped."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from ringspan.attention.audit import Audit
from ringspan.attention.engine import HeldKeys, PrefillStep, Proof
from ringspan.attention.layout import Deal, deal, positions
from ringspan.cluster.device import on_device
from ringspan.cluster.messages import ChunkDone, PrefillPlan, ShardOpened, ShardSaved
from ringspan.cluster.runtime import Runtime
from ringspan.errors import BadInput, TooLarge
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.folder import segment_path
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, namespace_digest, page_keys
from ringspan.kvstore.manifest import Manifest, assign_pages
from ringspan.kvstore.page import EXACT, Origin
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.transfer import load_shard, save_shard
from ringspan.types import Span, coalesce, total_tokens


@dataclass
class HeldContext:
    """This rank's shard of a context."""

    shard: ContextShard
    num_tokens: int
    prefill: Prefill | None = None
    """None when it was opened from a store."""


@dataclass
class Prefill:
    """How far a prefill is, and what every rank holds of it."""

    plan: PrefillPlan
    token_ids: np.ndarray
    cached: Deal
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
        if self._held.pop(context_id, None) is not None:
            self._runtime.pool.free(_pool_name(context_id))

    def clear(self) -> None:
        for context_id in list(self._held):
            self.drop(context_id)

    def begin(self, plan: PrefillPlan, token_ids: np.ndarray) -> None:
        """Memory for this rank's whole shard of the context."""
        if len(token_ids) != plan.num_tokens:
            raise BadInput(f"the plan is for {plan.num_tokens} tokens, {len(token_ids)} came")
        self.drop(plan.context_id)
        mine = sum(total_tokens(self._dealt(plan, chunk)[self._rank]) for chunk in plan.chunks)
        shard = self._runtime.new_shard(
            _pool_name(plan.context_id), plan.codec, mine, plan.page_tokens
        )
        cached: Deal = ((),) * self._runtime.spec.world_size
        self._held[plan.context_id] = HeldContext(
            shard, plan.num_tokens, Prefill(plan, token_ids, cached)
        )

    def run_chunk(self, context_id: str, chunk_index: int) -> ChunkDone:
        began = time.perf_counter()
        transport, device = self._runtime.transport, self._runtime.device
        waited, sent = transport.exchange_s, transport.sent_bytes
        transport.exposure.collect()
        _, proof = self._forward_chunk(context_id, chunk_index, logits=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
            exposed_s=transport.exposure.collect(),
            seen_keys=proof.seen or 0,
            audited_rows=proof.audit.rows if proof.audit else 0,
            audit_error=proof.audit.relative_error if proof.audit else 0.0,
            sent_bytes=transport.sent_bytes - sent,
            kv_bytes=held.shard.kv_bytes,
        )

    def chunk_logits(
        self, context_id: str, chunk_index: int
    ) -> tuple[tuple[Span, ...], np.ndarray]:
        """This rank's spans of the chunk and their logits, fp32 [T, vocabulary]."""
        logits, _ = self._forward_chunk(context_id, chunk_index, logits=True)
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
        held.shard.reserve(spans)
        step = PrefillStep(
            runtime.transport,
            runtime.buffers,
            runtime.compute,
            plan.scheme,
            held.shard,
            dealt,
            (HeldKeys(held.shard, prefill.cached),),
            deterministic=plan.deterministic,
            audit=self._audit(plan, chunk_index),
        )
        # A rank that got no tokens still serves every hop: it takes one that counts for nothing.
        where = positions(spans) if spans else torch.zeros(1, dtype=torch.int64)
        ids = torch.from_numpy(prefill.token_ids[where.numpy()].astype(np.int64))
        try:
            out = runtime.forward(ids, where, step, logits=logits, last_only=False)
            proof = step.prove(runtime.device)
        except torch.OutOfMemoryError as error:
            held.shard.cancel()
            why = str(error).strip().splitlines()[0]
            raise TooLarge(
                f"chunk {chunk_index} of {plan.chunk_tokens} tokens does not fit beside the KV on "
                f"{runtime.device} ({why}); use a smaller --chunk-tokens"
            ) from None
        except BaseException:
            held.shard.cancel()
            raise
        prefill.cached = tuple(
            coalesce((*held_spans, *new))
            for held_spans, new in zip(prefill.cached, dealt, strict=True)
        )
        prefill.chunks_done += 1
        return out, proof

    def _audit(self, plan: PrefillPlan, chunk_index: int) -> Audit | None:
        """At one layer of each chunk, another one every time."""
        if not plan.audit_rows:
            return None
        layer = (7 * chunk_index + 1) % self._runtime.facts.num_layers
        return Audit(frozenset((layer,)), seed=chunk_index, rows=plan.audit_rows)

    def save(self, context_id: str, staging: str) -> ShardSaved:
        """Writes this rank's pages into the staging folder."""
        began = time.perf_counter()
        held, prefill = self._prefilling(context_id)
        plan = prefill.plan
        if prefill.chunks_done != len(plan.chunks):
            raise BadInput(
                f"context {context_id} has {prefill.chunks_done} of {len(plan.chunks)} chunks: it "
                "is saved when it is whole"
            )
        keys = page_keys(
            self._runtime.facts.fingerprint, PUBLIC_NAMESPACE, prefill.token_ids, plan.page_tokens
        )
        with on_device(self._runtime.device):
            records = save_shard(
                held.shard, self._origin(plan), keys, segment_path(staging, self._rank)
            )
        return ShardSaved(
            context_id=context_id,
            rank=self._rank,
            records=records,
            elapsed_s=time.perf_counter() - began,
        )

    def open(self, manifest: Manifest, root: str) -> ShardOpened:
        """Reads this rank's share of a stored context; every page is verified before use."""
        began = time.perf_counter()
        self.drop(manifest.context_id)
        records = assign_pages(manifest, self._runtime.spec.world_size)[self._rank]
        name = _pool_name(manifest.context_id)
        tokens = sum(record.span.tokens for record in records)
        shard = self._runtime.new_shard(name, manifest.codec, tokens, manifest.page_tokens)
        try:
            with on_device(self._runtime.device):
                load_shard(root, manifest, records, shard)
        except BaseException:
            del shard
            self._runtime.pool.free(name)
            raise
        self._held[manifest.context_id] = HeldContext(shard, manifest.num_tokens)
        return ShardOpened(
            context_id=manifest.context_id,
            rank=self._rank,
            num_pages=len(records),
            kv_bytes=shard.kv_bytes,
            elapsed_s=time.perf_counter() - began,
        )

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

    def _origin(self, plan: PrefillPlan) -> Origin:
        """With a lossy codec every chunk but the first was computed over decoded pages."""
        exact = codec(plan.codec).exact or len(plan.chunks) == 1
        return Origin(
            fingerprint=self._runtime.facts.fingerprint,
            namespace=namespace_digest(PUBLIC_NAMESPACE),
            rope=f"applied, scaling {self._runtime.spec.model.rope_scaling or 'none'}",
            provenance=EXACT if exact else (f"attended over {plan.codec} pages",),
        )


def _pool_name(context_id: str) -> str:
    return f"context {context_id}"
