"""A stored context that has lost pages, made whole by a gang; and stored pages held against ones
computed again. What ranks do of it is in `cluster.repair`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from ringspan.cluster.gang import Gang
from ringspan.cluster.messages import (
    GangRepair,
    PageDeviation,
    PagesRecomputed,
    ShardSaved,
    ShardSurvived,
)
from ringspan.cluster.stored import check_model
from ringspan.errors import BadInput, CorruptPage, RingspanError, StoreError
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.folder import Store
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.parity import spans_words
from ringspan.kvstore.repair import adopt, mend_parity
from ringspan.types import Span, total_tokens

DISK_TIMEOUT_S = 3600.0
"""For ranks to read their pages, or to write some."""
COMPUTE_TIMEOUT_S = 3600.0
TIDY_TIMEOUT_S = 30.0
FIRST_LAYER_FACTOR = 1.1
"""The first layer's K and V hang on the tokens alone: a stored page is as far from the recomputed
one as its own encoding takes it."""
LAYER_FACTOR = 5.0
"""In the others it may be further: what was attended to was encoded then, or is now. Seen were 1.3
times in a model of 30 layers and 3.3 in one of random weights."""
ROUNDING_UNITS = {"float32": 64.0, "bfloat16": 16.0, "float16": 16.0}
"""So many units in the last place, in the norm, may K and V differ by because sums were taken in
another order; seen were 11 in fp32 and 2 in bf16."""
LARGEST_DEVIATION = 0.5
"""Of any layer, whatever the codec: KV of other tokens is 1.0 to 1.4 away."""


class Recomputed(msgspec.Struct, frozen=True, kw_only=True):
    """What `recompute_lost` did."""

    manifest: Manifest
    spans: tuple[Span, ...]
    """Of the pages that were lost and are there again."""
    parity_stripes: int
    """Written for them."""
    elapsed_s: float


class LayerDeviation(NamedTuple):
    """How far a stored page is from the recomputed one in a layer, and may be."""

    layer: int
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.error <= self.allowed


class DeepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `deep_verify` found, page by page."""

    context_id: str
    pages: tuple[PageDeviation, ...]
    rounding: float
    """Of the error allowed to each layer, beside the codec's."""
    elapsed_s: float

    def worst(self, page: PageDeviation) -> LayerDeviation:
        """Of the layers the one whose error is nearest to, or furthest beyond, what it may be."""
        layers = [
            LayerDeviation(layer, error, self._allowed(layer, codec))
            for layer, (error, codec) in enumerate(zip(page.error, page.codec, strict=True))
        ]
        return max(layers, key=lambda layer: layer.error / layer.allowed)

    def _allowed(self, layer: int, codec: float) -> float:
        factor = LAYER_FACTOR if layer else FIRST_LAYER_FACTOR
        return min(LARGEST_DEVIATION, self.rounding + factor * codec)

    @property
    def bad(self) -> tuple[PageDeviation, ...]:
        return tuple(page for page in self.pages if not self.worst(page).good)


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
            manifest = adopt(store, manifest, records)
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
            raise CorruptPage(f"pages {spans_words(lost)} cannot be had")
        _recompute(gang, manifest, spans, exact=True)
        found: list[tuple[PageDeviation, ...]] = gang.call(
            "compare_recomputed",
            name,
            timeout_s=DISK_TIMEOUT_S,
            what=f"comparing pages of context {name}",
        )
    except (CorruptPage, StoreError) as error:
        raise type(error)(
            f"context {name} is not whole: {error}; repair it first (ringspan contexts repair "
            f"{name})"
        ) from error
    finally:
        _drop(gang, name)
    pages = sorted((page for rank in found for page in rank), key=lambda page: page.span)
    return DeepReport(
        context_id=name,
        pages=tuple(pages),
        rounding=_rounding(manifest),
        elapsed_s=time.perf_counter() - began,
    )


def drawn(manifest: Manifest, sample: int, seed: int) -> tuple[Span, ...]:
    """Pages to hold against the tokens, in position order; equal seeds draw the same."""
    if sample < 1:
        raise BadInput(f"--sample {sample}: wanted at least one page")
    pages = manifest.pages
    chosen = np.random.default_rng(seed).permutation(len(pages))[:sample]
    return tuple(pages[index].span for index in sorted(chosen.tolist()))


def _rounding(manifest: Manifest) -> float:
    dtype = manifest.form.dtype
    return ROUNDING_UNITS[dtype] * float(torch.finfo(dtype_of(dtype)).eps)


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
