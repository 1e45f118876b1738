"""One rank of a gang, as the controller calls it.

A plain class without Ray. The controller calls each method on every rank of the gang with the same
arguments (SPMD); inside, ranks meet in exchanges of the same order. What a rank does is in
`runtime` (model, device, transport), `prefills` (contexts) and `answers` (sessions).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import numpy as np

from ringspan.attention.loopback import LoopbackWorld
from ringspan.cluster.answers import Answers
from ringspan.cluster.handoff import Handoffs, Offer
from ringspan.cluster.heap import trim
from ringspan.cluster.messages import (
    AnswerRequest,
    ChunkDone,
    GangRepair,
    GangSpec,
    PageDeviation,
    PagesRecomputed,
    PrefillBegun,
    PrefillPlan,
    PrefillStands,
    RankReady,
    ShardOpened,
    ShardSaved,
    ShardSurvived,
    TokenChunk,
    TokenChunks,
)
from ringspan.cluster.prefills import Contexts
from ringspan.cluster.repair import Repairs
from ringspan.cluster.resuming import Resuming
from ringspan.cluster.runtime import TILE_ROWS, Rendezvous, Runtime
from ringspan.kvstore.handoff import HandoffPlan, Moved
from ringspan.kvstore.manifest import Manifest
from ringspan.types import Span, page_tokens_for


class Rank:
    def __init__(self, rank: int, spec: GangSpec) -> None:
        self._runtime = Runtime(rank, spec)
        self.contexts = Contexts(self._runtime)
        self.answers = Answers(self._runtime, self.contexts)
        self.repairs = Repairs(self._runtime)
        self.handoffs = Handoffs(self._runtime, self.contexts)
        self.resuming = Resuming(self._runtime, self.contexts)

    def host_store(self, address: str = "") -> tuple[str, int]:
        """On rank 0 only, before the others join: where the gang's ranks meet."""
        return self._runtime.host_store(address)

    def load(self, world: LoopbackWorld | None = None) -> RankReady:
        """Once, for a rank that takes a lost one's place; `join` comes next. Compiles what it can
        without its peers."""
        ready = self._runtime.load(world)
        if self._runtime.device.type == "cuda":
            self._runtime.compile_attention()
        return msgspec.structs.replace(ready, tile_rows=TILE_ROWS)

    def join(self, rendezvous: Rendezvous) -> str:
        """All ranks, with the new ones: the gang's group is formed anew. What this rank holds it
        keeps."""
        return self._runtime.join(rendezvous)

    def leave(self, why: str) -> None:
        """After a failed exchange. May be repeated; `join` is next, or the end."""
        self._runtime.leave(why)

    def start(self, rendezvous: Rendezvous) -> RankReady:
        """Once: loads the weights, joins the group, on a GPU compiles what will be needed."""
        began = time.perf_counter()
        ready = self._runtime.start(rendezvous)
        if self._runtime.device.type == "cuda":
            self._warm_up(page_tokens_for(ready.facts.head_dim))
        speeds, link = self._runtime.measure_speeds()
        return msgspec.structs.replace(
            ready,
            speeds=speeds,
            link=link,
            tile_rows=TILE_ROWS,
            elapsed_s=time.perf_counter() - began,
        )

    def _warm_up(self, page_tokens: int) -> None:
        """A few pages through the real path: kernels are compiled and connections made before the
        first chunk (FlashAttention 4 alone takes 6 s)."""
        self._runtime.compile_attention()
        num_tokens = 8 * page_tokens * self._runtime.spec.world_size
        plan = PrefillPlan(
            context_id="warm-up",
            num_tokens=num_tokens,
            page_tokens=page_tokens,
            chunk_tokens=num_tokens // 2,
            layout="zigzag",
            scheme="ring",
            codec="raw",
        )
        self.begin_prefill(plan, np.zeros(num_tokens, dtype=np.int32))
        for index in range(len(plan.chunks)):
            self.prefill_chunk(plan.context_id, index)
        self.contexts[plan.context_id].resident.all_plane_sums()
        request = AnswerRequest(
            session_id="warm-up", context_id=plan.context_id, token_ids=(0,), max_tokens=2
        )
        for _ in self.generate(request):
            pass
        self.drop(plan.context_id)

    def begin_prefill(self, plan: PrefillPlan, token_ids: np.ndarray) -> PrefillBegun:
        """Takes memory for the context. token_ids: int32 [n], all of it. Repeating starts over."""
        self.drop(plan.context_id)
        return self.contexts.begin(plan, token_ids)

    def begin_prefill_on_held(self, plan: PrefillPlan, token_ids: np.ndarray) -> PrefillBegun:
        """`begin_prefill` with the first pages of the context `plan.prefix_id`, which this gang
        holds and keeps."""
        self.drop(plan.context_id)
        return self.contexts.begin_on_held(plan, token_ids)

    def begin_prefill_on_stored(
        self, plan: PrefillPlan, token_ids: np.ndarray, manifest: Manifest, root: str
    ) -> PrefillBegun:
        """`begin_prefill` with the first pages of a stored context, verified."""
        self.drop(plan.context_id)
        return self.contexts.begin_on_stored(plan, token_ids, manifest, root)

    def prefill_stands(
        self, plan: PrefillPlan, token_ids: np.ndarray, begun: PrefillBegun, staging: str
    ) -> PrefillStands:
        """After the gang was mended: what this rank holds of a prefill, or would find of it in the
        staging folder (empty: there is none)."""
        return self.resuming.stands(plan, token_ids, begun, staging)

    def resume_prefill(
        self,
        plan: PrefillPlan,
        token_ids: np.ndarray,
        begun: PrefillBegun,
        chunks_done: int,
        staging: str,
    ) -> PrefillStands:
        """Every rank stands behind so many chunks then: what is more is forgotten, what a lost
        rank held is read. May be repeated."""
        self.handoffs.close(plan.context_id, "its prefill went back behind a chunk")
        return self.resuming.resume(plan, token_ids, begun, chunks_done, staging)

    def prefill_chunk(self, context_id: str, chunk_index: int) -> ChunkDone:
        """For each chunk, in order, once."""
        done = self.contexts.run_chunk(context_id, chunk_index)
        self.handoffs.sealed(context_id)
        return done

    def chunk_logits(
        self, context_id: str, chunk_index: int
    ) -> tuple[tuple[Span, ...], np.ndarray]:
        """`prefill_chunk` for those who compare: this rank's spans, logits fp32 [T, vocabulary]."""
        return self.contexts.chunk_logits(context_id, chunk_index)

    def begin_saving(self, context_id: str, staging: str) -> None:
        """After `begin_prefill`: from now on pages go to the staging folder behind each chunk."""
        self.contexts.begin_saving(context_id, staging)

    def save(self, context_id: str, staging: str) -> ShardSaved:
        """After the last chunk: what of this rank's pages is not in the staging folder yet."""
        return self.contexts.save(context_id, staging)

    def open(self, manifest: Manifest, root: str, codec_name: str = "") -> ShardOpened:
        """A stored context, whatever ranks saved it; codec_name: recoded on the device. May be
        repeated: reads it again."""
        self.drop(manifest.context_id)
        return self.contexts.open(manifest, root, codec_name)

    def open_surviving(
        self, manifest: Manifest, root: str, without: tuple[Span, ...]
    ) -> ShardSurvived:
        """What can be had of a stored context but for the pages `without`. May be repeated."""
        self.drop(manifest.context_id)
        return self.repairs.open_surviving(manifest, root, without)

    def recompute_pages(self, repair: GangRepair) -> PagesRecomputed:
        """After `open_surviving` on all ranks, with the pages that any of them lacks."""
        return self.repairs.recompute_pages(repair)

    def write_recomputed(self, context_id: str, nonce: str) -> ShardSaved:
        """This rank's recomputed pages into new segments of the context's folder."""
        return self.repairs.write_recomputed(context_id, nonce)

    def compare_recomputed(self, context_id: str) -> tuple[PageDeviation, ...]:
        """This rank's recomputed pages against the stored ones."""
        return self.repairs.compare_recomputed(context_id)

    def write_parity(self, manifest: Manifest, staging: str, rows: int) -> int:
        """This rank's share of the parity over a context whose segments are all written."""
        return self.repairs.write_parity(manifest, staging, rows)

    def drop(self, context_id: str) -> None:
        """Forgets a context and the sessions on it. May be repeated."""
        self.repairs.close(context_id)
        self.handoffs.close(context_id)
        self.answers.end_all_on(context_id)
        self.contexts.drop(context_id)
        trim()

    def offer_handoff(
        self, context_id: str, epoch: int, codec_name: str, token_ids: np.ndarray, namespace: str
    ) -> Offer:
        """Of the sending gang: what it would hand over. epoch: newer than of any offer before."""
        return self.handoffs.offer(context_id, epoch, codec_name, token_ids, namespace)

    def host_handoff(self, handoff_id: str) -> tuple[str, int] | None:
        """Of the receiving gang: rank 0 opens the place where the ranks of both meet."""
        return self.handoffs.host_store(handoff_id)

    def begin_receiving(self, plan: HandoffPlan, token_ids: np.ndarray, namespace: str) -> None:
        """Of the receiving gang: from now on pages come. What it holds of the context goes."""
        self.drop(plan.fence.context_id)
        self.handoffs.begin_receiving(plan, token_ids, namespace)

    def begin_sending(self, plan: HandoffPlan) -> None:
        """Of the sending gang: what it has goes on its way, the rest behind each chunk."""
        self.handoffs.begin_sending(plan)

    def end_sending(self, handoff_id: str, timeout_s: float) -> Moved:
        """Of the sending gang, after the last chunk: every receiver has what this rank had."""
        return self.handoffs.end_sending(handoff_id, timeout_s)

    def end_receiving(self, handoff_id: str, timeout_s: float) -> Moved:
        """Of the receiving gang: this rank's share is there and right."""
        return self.handoffs.end_receiving(handoff_id, timeout_s)

    def install_handoff(self, handoff_id: str) -> ShardOpened:
        """Of the receiving gang, after `end_receiving` without failure on all its ranks."""
        return self.handoffs.install(handoff_id)

    def abandon_handoff(self, handoff_id: str, why: str) -> None:
        """Either gang: gives it up. May be repeated."""
        self.handoffs.abandon(handoff_id, why)

    def generate(self, request: AnswerRequest) -> Iterator[TokenChunk]:
        """The answer's tokens; all ranks are advanced in step and yield the same ones.

        Closed early, the session stays at the last token yielded.
        """
        return self.answers.generate(request)

    def generate_together(self, requests: tuple[AnswerRequest, ...]) -> Iterator[TokenChunks]:
        """Several sessions' tokens, one of each with every step; otherwise as `generate`."""
        return self.answers.generate_together(requests)

    def end_session(self, session_id: str) -> None:
        """Forgets a session's tail. May be repeated."""
        self.answers.end(session_id)
        trim()

    def measure_link(self, num_bytes: int, repeats: int) -> float:
        """Seconds of one ring exchange of `num_bytes`, the median of `repeats`."""
        return self._runtime.measure_link(num_bytes, repeats)

    def stop(self) -> None:
        """Last. May be repeated."""
        self.answers.clear()
        self.repairs.clear()
        self.handoffs.clear()
        self.contexts.clear()
        self._runtime.stop()
