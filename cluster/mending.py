"""A stored context that has lost pages, made whole by a gang; and stored pages held against ones
computed again. What ranks do of it is in `cluster.repair`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from ringspan.cluster.gang import Gang
from ringspan.cluster.messages import (
    GangRepair,
    PageDeviation,
    PagesRecomputed,
    ShardSaved,
    ShardSurvived,
)
from ringspan.cluster.stored import check_model
from ringspan.errors import BadInput, CorruptPage, RingspanError
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.folder import Store
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.parity import spans_words
from ringspan.kvstore.repair import mend_parity, republish
from ringspan.types import Span, total_tokens

DISK_TIMEOUT_S = 3600.0
"""For ranks to read their pages, or to write some."""
COMPUTE_TIMEOUT_S = 3600.0
TIDY_TIMEOUT_S = 30.0
CODEC_FACTOR = 3.0
"""A stored page of a lossy codec may be so many times further from the recomputed one than its own
encoding takes it: what it attended to was encoded, too, and layer adds to layer."""
ROUNDING_FACTOR = 64.0
"""So many units in the last place, in the norm, may rounding differ by over all layers: orders of
sums differ between the prefill and the recomputation."""


class Recomputed(msgspec.Struct, frozen=True, kw_only=True):
    """What `recompute_lost` did."""

    manifest: Manifest
    spans: tuple[Span, ...]
    """Of the pages that were lost and are there again."""
    parity_stripes: int
    """Written for them."""
    elapsed_s: float


class DeepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `deep_verify` found, page by page."""

    context_id: str
    pages: tuple[PageDeviation, ...]
    rounding: float
    """Of the error allowed to each, beside the codec's."""
    elapsed_s: float

    def allowed(self, page: PageDeviation) -> float:
        return self.rounding + CODEC_FACTOR * max(page.k_codec, page.v_codec)

    @property
    def bad(self) -> tuple[PageDeviation, ...]:
        return tuple(
            page for page in self.pages if not max(page.k_error, page.v_error) <= self.allowed(page)
        )


def recompute_lost(gang: Gang, store: Store, manifest: Manifest) -> Recomputed:
    """Computes the pages again that can be had from nowhere, writes them to the context's folder
    and publishes it anew. With nothing lost, nothing changes.

    Raises `BadInput` for another model, `StoreError` where the tokens are lost too, and what a
    prefill raises; the context is then as it was.
    """
    began = time.perf_counter()
    check_model(manifest, gang.ready[0].facts)
    name = manifest.context_id
    stripes = 0
    try:
        lost = _open_surviving(gang, store, manifest, ())
        if lost:
            _recompute(gang, manifest, lost, exact=False)
            saved: list[ShardSaved] = gang.call(
                "write_recomputed",
                name,
                f"r{secrets.token_hex(4)}",
                timeout_s=DISK_TIMEOUT_S,
                what=f"writing the recomputed pages of context {name}",
            )
            records = [record for rank in saved for record in rank.records]
            manifest = republish(store, manifest, records)
            stripes = mend_parity(store, manifest)
    finally:
        _drop(gang, name)
    return Recomputed(
        manifest=manifest,
        spans=lost,
        parity_stripes=stripes,
        elapsed_s=time.perf_counter() - began,
    )


def deep_verify(
    gang: Gang, store: Store, manifest: Manifest, sample: int, seed: int = 0
) -> DeepReport:
    """Computes a sample of pages again from the tokens, over all other pages, and compares.

    Raises `BadInput` for another model or no sample, `CorruptPage` where a page cannot be had.
    """
    began = time.perf_counter()
    check_model(manifest, gang.ready[0].facts)
    name = manifest.context_id
    spans = drawn(manifest, sample, seed)
    try:
        lost = _open_surviving(gang, store, manifest, spans)
        if lost:
            raise CorruptPage(
                f"context {name}: pages {spans_words(lost)} cannot be had: repair it first "
                f"(ringspan contexts repair {name})"
            )
        _recompute(gang, manifest, spans, exact=True)
        found: list[tuple[PageDeviation, ...]] = gang.call(
            "compare_recomputed",
            name,
            timeout_s=DISK_TIMEOUT_S,
            what=f"comparing pages of context {name}",
        )
    finally:
        _drop(gang, name)
    pages = sorted((page for rank in found for page in rank), key=lambda page: page.span)
    return DeepReport(
        context_id=name,
        pages=tuple(pages),
        rounding=ROUNDING_FACTOR * _unit(manifest),
        elapsed_s=time.perf_counter() - began,
    )


def drawn(manifest: Manifest, sample: int, seed: int) -> tuple[Span, ...]:
    """Pages to hold against the tokens, in position order; equal seeds draw the same."""
    if sample < 1:
        raise BadInput(f"--sample {sample}: wanted at least one page")
    pages = manifest.pages
    chosen = np.random.default_rng(seed).permutation(len(pages))[:sample]
    return tuple(pages[index].span for index in sorted(chosen.tolist()))


def _unit(manifest: Manifest) -> float:
    import torch

    return float(torch.finfo(dtype_of(manifest.form.dtype)).eps)


def _open_surviving(
    gang: Gang, store: Store, manifest: Manifest, without: tuple[Span, ...]
) -> tuple[Span, ...]:
    """The pages that are lost beside."""
    survived: list[ShardSurvived] = gang.call(
        "open_surviving",
        manifest,
        str(store.root),
        without,
        timeout_s=DISK_TIMEOUT_S,
        what=f"opening what survives of context {manifest.context_id}",
    )
    return tuple(sorted(span for rank in survived for span in rank.lost))


def _recompute(gang: Gang, manifest: Manifest, spans: Sequence[Span], exact: bool) -> None:
    a_rank = manifest.chunk_tokens // manifest.world_size
    repair = GangRepair(
        context_id=manifest.context_id,
        spans=tuple(spans),
        chunk_tokens=max(manifest.page_tokens, a_rank * gang.world_size),
        exact=exact,
    )
    tokens = total_tokens(spans)
    what = f"recomputing {tokens} tokens of context {manifest.context_id}"
    done: list[PagesRecomputed] = gang.call(
        "recompute_pages", repair, timeout_s=COMPUTE_TIMEOUT_S, what=what
    )
    if sum(rank.num_pages for rank in done) != len(spans):
        raise CorruptPage(f"{what}: {sum(r.num_pages for r in done)} of {len(spans)} pages came")


def _drop(gang: Gang, name: str) -> None:
    if gang.lost:
        return
    try:
        gang.call("drop", name, timeout_s=TIDY_TIMEOUT_S, what=f"dropping context {name}")
    except RingspanError:
        gang.close()  # what went wrong before is what is told
