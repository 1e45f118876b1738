"""From what the ranks saved to the manifest of a stored context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringspan.cluster.messages import GangSpec, ModelFacts, PrefillPlan, ShardSaved
from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.frame import ALIGN, aligned
from ringspan.kvstore.keys import PUBLIC_NAMESPACE
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.parity import GROUP_PAGES
from ringspan.kvstore.segment_reader import read_frame
from ringspan.types import Span

HEAD_BYTES = 2 * ALIGN
"""Of a page's frame on disk, at most."""
RECORD_BYTES = 512
"""Of a page in the manifest, at most."""


@dataclass(frozen=True)
class Description:
    """What a person wants to know of a context; no part of its identity."""

    title: str = ""
    sources: tuple[str, ...] = ()
    """Paths as the user gave them."""
    chat: bool = False
    """The tokens begin with a chat template's opening, which an answer goes on with."""
    document: Span | None = None
    """Where the document lies between the template's prefix and suffix; None: everywhere."""


def manifest_of(
    plan: PrefillPlan,
    spec: GangSpec,
    saved: Sequence[ShardSaved],
    staging: str,
    description: Description,
    *,
    created_unix_s: float,
    namespace: bytes = PUBLIC_NAMESPACE,
) -> Manifest:
    """Pages of all ranks in position order. Model, form and provenance are taken from the first
    page as it lies on the disk: pages describe themselves. Raises StoreError, CorruptPage."""
    pages = sorted(
        (record for shard in saved for record in shard.records), key=lambda page: page.span
    )
    if not pages:
        raise StoreError(f"context {plan.context_id}: no rank saved any page")
    header = read_frame(Path(staging) / pages[0].segment, pages[0]).header
    return Manifest(
        context_id=plan.context_id,
        model=spec.model,
        origin=header.origin,
        form=header.form,
        namespace=namespace.hex(),
        num_tokens=plan.num_tokens,
        layout=plan.layout,
        chunk_tokens=plan.chunk_tokens,
        world_size=spec.world_size,
        created_unix_s=created_unix_s,
        title=description.title,
        sources=description.sources,
        chat=description.chat,
        document_tokens=description.document or Span(0, plan.num_tokens),
        payload_bytes=sum(page.payload_bytes for page in pages),
        pages=tuple(pages),
    )


def store_bytes(plan: PrefillPlan, kv_bytes: int, world_size: int) -> int:
    """What a context takes on disk, at most: frames, parity, tokens, manifest."""
    num_pages = -(-plan.num_tokens // plan.page_tokens)
    page_bytes = kv_bytes * plan.page_tokens // plan.num_tokens
    width = world_size if world_size > 1 else GROUP_PAGES
    uneven = 2 * len(plan.chunks)  # pages that one rank may have more than another
    frames = num_pages + plan.parity * (-(-num_pages // width) + uneven)
    frames *= HEAD_BYTES + aligned(page_bytes)
    return frames + num_pages * RECORD_BYTES + 4 * plan.num_tokens + ALIGN


def check_model(manifest: Manifest, facts: ModelFacts) -> None:
    """BadInput unless the stored context was made with the model of these facts."""
    if manifest.origin.fingerprint == facts.fingerprint:
        return
    made_with = manifest.model
    scaling = f" --rope-scaling {made_with.rope_scaling}" if made_with.rope_scaling else ""
    raise BadInput(
        f"context {manifest.context_id} was made with --model {made_with.name}{scaling} "
        f"(dtype {manifest.form.dtype}, fingerprint {manifest.origin.fingerprint[:12]}), this "
        f"gang runs {facts.name} (dtype {facts.dtype}, fingerprint "
        f"{facts.fingerprint[:12]}): ask with that model, or prefill it with this one"
    )
