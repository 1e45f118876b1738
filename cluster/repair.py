"""Pages computed again on a rank: those that were lost, or a sample to compare with what is stored.

The ranks open what survives of a context and run the model on the lost pages' tokens alone. At
every layer these attend to the surviving keys and to each other's new ones, causally by position:
keys behind a page, which it must not see, are cut away as in any step (attention/problem.py), so
several gaps go through the model together, in position order, as one chunk. For `raw` that is what
the first prefill computed, up to the rounding of another order of sums; for a lossy codec the keys
of a page's own chunk were plain then and are decoded now.

Nothing of it is served: recomputed pages are written to the store under provenance `recomputed
after loss`, and are opened from there as all others are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ringspan.attention.audit import Audit
from ringspan.attention.engine import HeldKeys, PrefillStep
from ringspan.attention.group import synchronize
from ringspan.attention.layout import Deal, positions
from ringspan.cluster.device import on_device
from ringspan.cluster.messages import (
    GangRepair,
    PageDeviation,
    PageRecord,
    PagesRecomputed,
    ShardSaved,
    ShardSurvived,
)
from ringspan.cluster.runtime import Runtime
from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.manifest import Manifest, assign_pages, cipher_for
from ringspan.kvstore.page import Page, recomputed, verify_sums
from ringspan.kvstore.parity import dealt_rows, parity_path, stripes, write_parity
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.repair import PageWriter
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.supply import NO_QUARANTINE, Supply
from ringspan.kvstore.tiers.counters import COUNTERS, RECOMPUTED, StoreCounters
from ringspan.kvstore.tiers.disk import SegmentReader
from ringspan.kvstore.tiers.placement import context_supply
from ringspan.kvstore.tokens import TOKENS, read_tokens
from ringspan.kvstore.transcode import decoded, encoded
from ringspan.kvstore.transfer import load_shard
from ringspan.types import Span, coalesce, total_tokens


@dataclass
class _Open:
    """What is held of a context while pages of it are computed again."""

    manifest: Manifest
    root: Path
    assigned: list[tuple[PageRecord, ...]]
    shard: ContextShard
    """What survives of this rank's pages."""
    scratch: ContextShard | None = None
    """The recomputed pages that were dealt to this rank."""
    mine: tuple[PageRecord, ...] = field(default=())
    """Their records, in the scratch's order."""


class Repairs:
    """Used by `cluster.rank.Rank`; every method is called on all ranks alike."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._open: dict[str, _Open] = {}

    def open_surviving(
        self, manifest: Manifest, root: str, without: tuple[Span, ...]
    ) -> ShardSurvived:
        """This rank's pages but those `without`, verified; says which could not be had."""
        name = manifest.context_id
        self.close(name)
        assigned = assign_pages(manifest, self._runtime.spec.world_size)
        mine = [record for record in assigned[self._rank] if record.span not in set(without)]
        tokens = sum(record.span.tokens for record in mine)
        shard = self._runtime.new_shard(
            _survivors(name), manifest.codec, tokens, manifest.page_tokens
        )
        self._open[name] = _Open(manifest, Path(root), assigned, shard)
        counters = StoreCounters(within=COUNTERS)
        try:
            with on_device(self._runtime.device):
                lost = _load_what_is_whole(root, manifest, mine, shard, counters)
        except BaseException:
            self.close(name)
            raise
        return ShardSurvived(
            context_id=name,
            rank=self._rank,
            lost=tuple(record.span for record in lost),
            pages=counters.snapshot(),
        )

    def recompute_pages(self, repair: GangRepair) -> PagesRecomputed:
        """The pages of `repair.spans` from their tokens, over what `open_surviving` left. All ranks
        must have been without exactly these. Raises WrongAttention as a prefill's chunk does."""
        began = time.perf_counter()
        held = self._held(repair.context_id)
        world_size, manifest = self._runtime.spec.world_size, held.manifest
        gone = set(repair.spans)
        survivors: Deal = tuple(
            coalesce(record.span for record in records if record.span not in gone)
            for records in held.assigned
        )
        if total_tokens(survivors[self._rank]) != held.shard.num_tokens:
            raise BadInput(
                f"context {repair.context_id}: rank {self._rank} holds {held.shard.num_tokens} "
                f"tokens, without the pages to recompute it should hold "
                f"{total_tokens(survivors[self._rank])}: open it anew"
            )
        ids = read_tokens(held.root / "contexts" / repair.context_id / TOKENS, manifest)
        pages = [record for record in manifest.pages if record.span in gone]
        steps = [
            [tuple(step[rank::world_size]) for rank in range(world_size)]
            for step in _steps(pages, repair.chunk_tokens)
        ]
        held.mine = tuple(record for step in steps for record in step[self._rank])
        held.scratch = self._runtime.new_shard(
            _scratch(repair.context_id),
            "raw" if repair.exact else manifest.codec,
            sum(record.span.tokens for record in held.mine),
            manifest.page_tokens,
        )
        done: Deal = ((),) * world_size
        for index, step in enumerate(steps):
            dealt = tuple(coalesce(record.span for record in records) for records in step)
            earlier = HeldKeys(held.shard, survivors), HeldKeys(held.scratch, done)
            self._forward(held.scratch, ids, dealt, earlier, index, repair)
            done = tuple(coalesce((*old, *new)) for old, new in zip(done, dealt, strict=True))
        return PagesRecomputed(
            context_id=repair.context_id,
            rank=self._rank,
            num_pages=len(held.mine),
            elapsed_s=time.perf_counter() - began,
        )

    def _forward(
        self,
        scratch: ContextShard,
        ids: np.ndarray,
        dealt: Deal,
        earlier: tuple[HeldKeys, ...],
        index: int,
        repair: GangRepair,
    ) -> None:
        runtime, spans = self._runtime, dealt[self._rank]
        scratch.reserve(spans)
        step = PrefillStep(
            runtime.transport,
            runtime.buffers,
            runtime.compute,
            repair.scheme,
            scratch,
            dealt,
            earlier,
            audit=Audit.drawn(index, runtime.facts.num_layers, repair.audit_rows),
        )
        # A rank that got no page still serves every hop; see Contexts.run_chunk.
        where = positions(spans) if spans else torch.zeros(1, dtype=torch.int64)
        tokens = torch.from_numpy(ids[where.numpy()].astype(np.int64))
        try:
            runtime.forward(tokens, where, step, logits=False, last_only=False)
            synchronize(runtime.transport, runtime.device)
            step.prove(runtime.device)
        except BaseException:
            scratch.cancel()
            raise

    def write_recomputed(self, context_id: str, nonce: str) -> ShardSaved:
        """This rank's recomputed pages to new segments of the context's folder, durable; nobody
        reads them before a manifest names them."""
        began = time.perf_counter()
        held = self._held(context_id)
        folder = held.root / "contexts" / context_id
        cipher = cipher_for(held.manifest)
        with PageWriter(folder, f"{nonce}-{self._rank}", cipher) as writer:
            for old, page in self._recomputed(held):
                writer.append(old, page)
        COUNTERS.add(RECOMPUTED, "gang", len(writer.records))
        return ShardSaved(
            context_id=context_id,
            rank=self._rank,
            records=writer.records,
            elapsed_s=time.perf_counter() - began,
        )

    def _recomputed(self, held: _Open) -> Iterator[tuple[PageRecord, Page]]:
        origin, keys = recomputed(held.manifest.origin), held.manifest.keys
        for index, old in enumerate(held.mine):
            assert held.scratch is not None
            yield old, held.scratch.export_page(index, origin, keys)

    def compare_recomputed(self, context_id: str) -> tuple[PageDeviation, ...]:
        """How far this rank's recomputed pages, which must be exact, are from the stored ones."""
        held = self._held(context_id)
        with context_supply(held.root, held.manifest, held.mine) as supply:
            found = []
            for index, record in enumerate(held.mine):
                room = memoryview(bytearray(aligned(record.payload_bytes)))
                header = supply.page(record, room).header
                payload, form = room[: record.payload_bytes], header.form
                sums = payload_sums(payload, form.specs, form.num_layers, record.span.tokens)
                verify_sums(header, sums)
                found.append(self._deviation(held, index, Page(header, payload)))
        return tuple(found)

    def _deviation(self, held: _Open, index: int, stored: Page) -> PageDeviation:
        assert held.scratch is not None
        scratch, header = held.scratch, stored.header
        tokens, device = header.span.tokens, self._runtime.device
        first = scratch.pages()[index][1]
        layers = [scratch.tensors(n, first + tokens, first) for n in range(scratch.num_layers)]
        k, v = (torch.cat([layer[side] for layer in layers]) for side in (0, 1))
        with on_device(device):
            k_stored, v_stored = decoded(stored, device)
            again = encoded(header.form, k, v, tokens).cpu().numpy()
            k_coded, v_coded = decoded(Page(header, memoryview(again)), device)
        num_layers = scratch.num_layers
        return PageDeviation(
            span=header.span,
            error=_larger(_errors(k, k_stored, num_layers), _errors(v, v_stored, num_layers)),
            codec=_larger(_errors(k, k_coded, num_layers), _errors(v, v_coded, num_layers)),
        )

    def write_parity(self, manifest: Manifest, staging: str, rows: int) -> int:
        """This rank's share of the parity over the segments in a folder; the bytes written."""
        folder, world_size = Path(staging), self._runtime.spec.world_size
        found = stripes(manifest.pages)
        dealt = dealt_rows(len(found), rows, self._rank, world_size)
        with Supply(manifest, [SegmentReader(folder)], NO_QUARANTINE, StoreCounters()) as supply:
            wanted = [(found[stripe], row) for stripe, row in dealt]
            return write_parity(parity_path(folder, self._rank), supply, wanted)

    def close(self, context_id: str) -> None:
        """Gives the memory back. May be repeated."""
        self._open.pop(context_id, None)
        self._runtime.pool.free(_survivors(context_id))
        self._runtime.pool.free(_scratch(context_id))

    def clear(self) -> None:
        for context_id in list(self._open):
            self.close(context_id)

    def _held(self, context_id: str) -> _Open:
        if context_id not in self._open:
            raise BadInput(f"rank {self._rank} has not opened what survives of {context_id}")
        return self._open[context_id]

    @property
    def _rank(self) -> int:
        return self._runtime.rank


def _load_what_is_whole(
    root: str,
    manifest: Manifest,
    records: Sequence[PageRecord],
    shard: ContextShard,
    counters: StoreCounters,
) -> list[PageRecord]:
    """Fills the empty shard with what can be had; the records of the rest. Pages are read twice
    where one is lost: a shard's rows follow each other."""
    lost: list[PageRecord] = []

    def note(gone: tuple[PageRecord, ...]) -> tuple[Page, ...]:
        lost.extend(gone)
        return ()

    while True:
        known = len(lost)
        whole = [record for record in records if record not in lost]
        tally = StoreCounters(within=counters if not known else None)
        supply = context_supply(Path(root), manifest, whole, tally)
        try:
            load_shard(root, manifest, whole, shard, supply=supply, repair=note)
        except (CorruptPage, StoreError):
            if len(lost) == known:
                raise
        else:
            return lost


def _steps(pages: Sequence[PageRecord], chunk_tokens: int) -> Iterator[list[PageRecord]]:
    """Pages that go through the model together, in position order."""
    step: list[PageRecord] = []
    for record in pages:
        if step and sum(page.span.tokens for page in step) + record.span.tokens > chunk_tokens:
            yield step
            step = []
        step.append(record)
    if step:
        yield step


def _errors(truth: torch.Tensor, found: torch.Tensor, num_layers: int) -> torch.Tensor:
    """||found - truth|| / ||truth|| of each layer, inf for what is not finite."""
    truth, found = (x.double().view(num_layers, -1) for x in (truth, found))
    size = truth.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - truth).norm(dim=1) / size).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _larger(a: torch.Tensor, b: torch.Tensor) -> tuple[float, ...]:
    return tuple(torch.maximum(a, b).tolist())


def _survivors(context_id: str) -> str:
    return f"survivors of {context_id}"


def _scratch(context_id: str) -> str:
    return f"recomputed of {context_id}"
