"""Second forms of stored contexts: the same pages under the same keys in another codec.

    ROOT/forms/<codec>/contexts/<context id>/       a store of its own for each codec

The context itself stays what it is. A second form is as whole and as verified as any context; it
can be opened, exported, verified and moved by naming the store that it lies in.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ringspan.errors import BadInput, StoreError, UnknownName
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.kvstore.folder import Store, segment_path
from ringspan.kvstore.frame import ALIGN, aligned
from ringspan.kvstore.manifest import cipher_for, unlocked
from ringspan.kvstore.segment import SegmentWriter
from ringspan.kvstore.tiers.disk import DISK
from ringspan.kvstore.tiers.placement import read_placement, write_placement
from ringspan.kvstore.transcode import Progress, Recoder, stored_pages

if TYPE_CHECKING:
    import torch

    from ringspan.kvstore.manifest import Manifest

FORMS = "forms"
FRAME_BYTES = 3 * ALIGN
"""What a frame on disk has beside its payload, at most."""


def form_store(store: Store, codec_name: str) -> Store:
    """Where second forms in this codec lie; it need not exist yet."""
    return Store(store.root / FORMS / codec_name, store.namespaces)


def second_form(store: Store, manifest: Manifest, codec_name: str) -> tuple[Store, Manifest] | None:
    """The form of this very context in a codec, and the store it lies in; None where there is none,
    or none that can be read."""
    if not (store.root / FORMS / codec_name).is_dir() or codec_name not in CODECS:
        return None
    found = form_store(store, codec_name)
    with contextlib.suppress(StoreError, UnknownName):
        other = found.manifest(manifest.context_id)
        other = unlocked(other, (bytes.fromhex(manifest.namespace),))
        if other.keys == manifest.keys:
            return found, other
    return None


def recode(
    store: Store,
    name: str,
    codec_name: str,
    *,
    replace: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[Store, Manifest]:
    """Make a second form of a context (id or prefix), or put it in the place of the first.

    Every page is verified before it is decoded. Gives back the store the form lies in, and its
    manifest. Raises `CorruptPage`, `StoreError`, and as `transcode.recoded_form` does; what was
    there before is then as it was.
    """
    manifest = store.manifest(name)
    recoder = Recoder(manifest, codec_name, device)
    placement = read_placement(store.folder(manifest))
    if replace and [tier.kind for tier in placement.tiers] != [DISK]:
        raise BadInput(
            f"context {manifest.context_id} lies in {', '.join(map(str, placement.tiers))}: bring "
            "it to disk alone first (ringspan contexts move --to disk), or leave --replace out"
        )
    target = store if replace else form_store(store, codec_name)
    page_bytes = aligned(recoder.form.bytes_of(manifest.page_tokens)) + FRAME_BYTES
    need_bytes = len(manifest.pages) * page_bytes + 4 * manifest.num_tokens
    target.check_room(need_bytes, keep=(manifest.context_id,))
    cipher = cipher_for(manifest)
    with target.staged(manifest.context_id, store.tokens(manifest), cipher) as staging:
        with SegmentWriter(segment_path(staging, 0), cipher=cipher) as writer:
            pages = stored_pages(store.root, manifest, recoder, progress)
            records = tuple(writer.append(page) for page in pages)
        if replace:
            write_placement(Path(staging), placement)
        made = msgspec.structs.replace(
            manifest,
            form=recoder.form,
            origin=recoder.origin,
            pages=records,
            payload_bytes=sum(record.payload_bytes for record in records),
        )
        return target, target.publish(staging, made)


def remove_forms(store: Store, context_id: str) -> list[str]:
    """Remove all second forms of a context (its id); the codecs they were in."""
    removed = []
    folder = store.root / FORMS
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = Store(path)
        if context_id in found.ids():
            found.remove(context_id)
            removed.append(path.name)
    return removed
