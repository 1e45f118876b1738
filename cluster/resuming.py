"""What a rank does for a prefill that goes on after another rank was lost.

All ranks come to stand behind the same chunk, the last one whose pages every rank has. Survivors
have theirs in memory and forget what they are ahead by. Whoever takes a lost rank's place reads
that rank's pages from the staging folder, where they were written behind each chunk, verifies them,
and writes them anew: the lost one's process may live on behind a cut link, and its files are then
nobody's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ringspan.cluster.device import on_device
from ringspan.cluster.messages import PageRecord, PrefillBegun, PrefillPlan, PrefillStands
from ringspan.cluster.page_writer import (
    found_pages,
    keep_only,
    pages_of,
    remove_segments,
)
from ringspan.cluster.prefills import Contexts, HeldContext, namespace_of
from ringspan.cluster.runtime import Runtime
from ringspan.errors import BadInput
from ringspan.kvstore.encryption import cipher_of, plain_page
from ringspan.kvstore.keys import page_keys
from ringspan.kvstore.segment_reader import read_frame
from ringspan.types import Span, coalesce


class Resuming:
    """Of one rank."""

    def __init__(self, runtime: Runtime, contexts: Contexts) -> None:
        self._runtime, self._contexts = runtime, contexts

    def stands(
        self, plan: PrefillPlan, token_ids: np.ndarray, begun: PrefillBegun, staging: str
    ) -> PrefillStands:
        """How many chunks this rank has, in memory or in the staging folder."""
        held = self._surviving(plan)
        if held is not None and held.prefill is not None:
            return self._standing(plan, held.prefill.chunks_done)
        if not staging:
            return self._standing(plan, -1)
        keys = tuple(self._keys(plan, token_ids))
        found = self._found(plan, keys, begun, staging, len(plan.chunks))
        there = sum(record.span.tokens for record in found)
        chunks_done = -1
        for chunks in range(len(plan.chunks) + 1):
            wanted = self._spans(plan, begun, chunks)
            if sum(span.tokens for span in wanted) > there:
                break
            chunks_done = chunks
        return self._standing(plan, chunks_done)

    def resume(
        self,
        plan: PrefillPlan,
        token_ids: np.ndarray,
        begun: PrefillBegun,
        chunks_done: int,
        staging: str,
    ) -> PrefillStands:
        """Stands behind `chunks_done` chunks. May be repeated."""
        held = self._surviving(plan)
        restored = 0
        if held is None:
            restored = self._restore(plan, token_ids, begun, chunks_done, staging)
        else:
            self._go_back(plan, held, begun, chunks_done, staging)
        return self._standing(plan, chunks_done, restored)

    def _surviving(self, plan: PrefillPlan) -> HeldContext | None:
        """This rank's share, if it is of this very prefill."""
        held = self._contexts.get(plan.context_id)
        same = held is not None and held.prefill is not None and held.prefill.plan == plan
        return held if same else None

    def _go_back(
        self,
        plan: PrefillPlan,
        held: HeldContext,
        begun: PrefillBegun,
        chunks_done: int,
        staging: str,
    ) -> None:
        prefill = held.prefill
        assert prefill is not None
        if chunks_done > prefill.chunks_done:
            raise BadInput(
                f"chunk {chunks_done} of context {plan.context_id} is to be next, this rank has "
                f"{prefill.chunks_done}"
            )
        if chunks_done < prefill.chunks_done:
            self._forget_behind(plan, held, begun, chunks_done, staging)
            prefill.chunks_done = chunks_done
        if (
            staging
            and held.saving is None
            and len(held.saved)
            < len(pages_of(self._spans(plan, begun, len(plan.chunks)), plan.page_tokens))
        ):
            self._contexts.begin_saving(plan.context_id, staging)

    def _forget_behind(
        self,
        plan: PrefillPlan,
        held: HeldContext,
        begun: PrefillBegun,
        chunks_done: int,
        staging: str,
    ) -> None:
        shard, spans = held.resident, self._spans(plan, begun, chunks_done)
        kept = len(pages_of(spans, plan.page_tokens))
        written = held.saving is not None and held.saving.handed_over > kept
        if staging and (written or len(held.saved) > kept):
            self._contexts.finish_saving(plan.context_id, staging)
            if held.saving is not None:  # it had nothing to write yet; the next begins elsewhere
                held.saving.abort()
                held.saving = None
            keep_only(staging, held.saved[:kept], held.saved[kept:])
            held.saved = held.saved[:kept]
        shard.take_back(spans)
        held.held = tuple(
            self._spans(plan, begun, chunks_done, rank) for rank in range(len(begun.prefix))
        )

    def _restore(
        self,
        plan: PrefillPlan,
        token_ids: np.ndarray,
        begun: PrefillBegun,
        chunks_done: int,
        staging: str,
    ) -> int:
        """In a lost rank's place; how many pages were read."""
        contexts, rank = self._contexts, self._runtime.rank
        held = contexts.begin_as(plan, token_ids, begun.prefix, begun.provenance)
        assert held.prefill is not None
        cipher = cipher_of(namespace_of(plan))
        try:
            records = self._found(plan, held.prefill.keys, begun, staging, chunks_done)
            wanted = pages_of(self._spans(plan, begun, chunks_done), plan.page_tokens)
            if len(records) < len(wanted):
                raise BadInput(
                    f"rank {rank}: {len(records)} of {len(wanted)} pages of context "
                    f"{plan.context_id} lie in {staging}, chunk {chunks_done} cannot be next"
                )
            for record in records:
                page = plain_page(read_frame(Path(staging) / record.segment, record), cipher)
                with on_device(self._runtime.device):
                    held.resident.import_page(page)
                held.origin = page.header.origin
        except BaseException:
            contexts.drop(plan.context_id)
            raise
        held.prefill.chunks_done = chunks_done
        held.held = tuple(
            self._spans(plan, begun, chunks_done, each) for each in range(len(begun.prefix))
        )
        contexts.begin_saving(plan.context_id, staging)
        contexts.write_behind(plan.context_id, settled=True)
        assert held.saving is not None
        remove_segments(staging, rank, held.saving.paths)
        return len(records)

    def _found(
        self,
        plan: PrefillPlan,
        keys: tuple[str, ...],
        begun: PrefillBegun,
        staging: str,
        chunks: int,
    ) -> tuple[PageRecord, ...]:
        wanted = pages_of(self._spans(plan, begun, chunks), plan.page_tokens)
        return found_pages(staging, self._runtime.rank, wanted, keys, plan.page_tokens)

    def _spans(
        self, plan: PrefillPlan, begun: PrefillBegun, chunks: int, rank: int | None = None
    ) -> tuple[Span, ...]:
        """What a rank (None: this one) holds after so many chunks."""
        rank = self._runtime.rank if rank is None else rank
        spans = list(begun.prefix[rank])
        for chunk in plan.chunks[:chunks]:
            spans += self._contexts.dealt(plan, chunk)[rank]
        return coalesce(spans)

    def _keys(self, plan: PrefillPlan, token_ids: np.ndarray) -> list[str]:
        fingerprint = self._runtime.facts.fingerprint
        return page_keys(fingerprint, namespace_of(plan), token_ids, plan.page_tokens)

    def _standing(self, plan: PrefillPlan, chunks_done: int, restored: int = 0) -> PrefillStands:
        return PrefillStands(
            context_id=plan.context_id,
            rank=self._runtime.rank,
            chunks_done=chunks_done,
            restored_pages=restored,
        )
