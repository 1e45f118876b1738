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

from ringspan.cluster.answers import Answers
from ringspan.cluster.messages import (
    AnswerRequest,
    ChunkDone,
    GangRepair,
    GangSpec,
    PageDeviation,
    PagesRecomputed,
    PrefillPlan,
    RankReady,
    ShardOpened,
    ShardSaved,
    ShardSurvived,
    TokenChunk,
    TokenChunks,
)
from ringspan.cluster.prefills import Contexts
from ringspan.cluster.repair import Repairs
from ringspan.cluster.runtime import TILE_ROWS, Rendezvous, Runtime
from ringspan.kvstore.manifest import Manifest
from ringspan.types import Span, page_tokens_for


class Rank:
    def __init__(self, rank: int, spec: GangSpec) -> None:
        self._runtime = Runtime(rank, spec)
        self.contexts = Contexts(self._runtime)
        self.answers = Answers(self._runtime, self.contexts)
        self.repairs = Repairs(self._runtime)

    def host_store(self) -> tuple[str, int]:
        """On rank 0 only, before `start`: where the gang's ranks meet."""
        return self._runtime.host_store()

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

    def begin_prefill(self, plan: PrefillPlan, token_ids: np.ndarray) -> None:
        """Takes memory for the context. token_ids: int32 [n], all of it. Repeating starts over."""
        self.drop(plan.context_id)
        self.contexts.begin(plan, token_ids)

    def begin_prefill_on_held(self, plan: PrefillPlan, token_ids: np.ndarray) -> None:
        """`begin_prefill` with the first pages of the context `plan.prefix_id`, which this gang
        holds and keeps."""
        self.drop(plan.context_id)
        self.contexts.begin_on_held(plan, token_ids)

    def begin_prefill_on_stored(
        self, plan: PrefillPlan, token_ids: np.ndarray, manifest: Manifest, root: str
    ) -> None:
        """`begin_prefill` with the first pages of a stored context, verified."""
        self.drop(plan.context_id)
        self.contexts.begin_on_stored(plan, token_ids, manifest, root)

    def prefill_chunk(self, context_id: str, chunk_index: int) -> ChunkDone:
        """For each chunk, in order, once."""
        return self.contexts.run_chunk(context_id, chunk_index)

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
        self.answers.end_all_on(context_id)
        self.contexts.drop(context_id)

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

    def measure_link(self, num_bytes: int, repeats: int) -> float:
        """Seconds of one ring exchange of `num_bytes`, the median of `repeats`."""
        return self._runtime.measure_link(num_bytes, repeats)

    def stop(self) -> None:
        """Last. May be repeated."""
        self.answers.clear()
        self.repairs.clear()
        self.contexts.clear()
        self._runtime.stop()
