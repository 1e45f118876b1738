"""A stored context to one file, which `kvstore.importing` takes in again; see `kvstore.archive`.

Every page is read and verified as for use, from whatever tier has it, then written to a file that
appears whole or not at all. Of an encrypted context the file is encrypted like the store: whoever
is to read it needs the tenant's namespace, hence the server's secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from ringspan.errors import BadInput
from ringspan.kvstore import archive
from ringspan.kvstore.archive import ArchiveHead, ArchiveWriter
from ringspan.kvstore.frame import encode_head
from ringspan.kvstore.manifest import as_written, cipher_for
from ringspan.kvstore.packed import archive_codec, encode_packed
from ringspan.kvstore.tokens import tokens_name
from ringspan.kvstore.transcode import Progress, Recoder, stored_pages

if TYPE_CHECKING:
    import torch

    from ringspan.kvstore.folder import Store
    from ringspan.kvstore.page import Page


class Exported(NamedTuple):
    """What was written."""

    path: Path
    num_pages: int
    payload_bytes: int
    """Of the pages, as they are once they are unpacked."""
    file_bytes: int


def export_context(
    store: Store,
    name: str,
    path: Path,
    *,
    codec_name: str = "",
    stored: str = archive.FRAMES,
    replace: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Exported:
    """A context (id or prefix) of the store to the file `path`.

    codec_name: its pages are recoded on the way, on `device`; empty: as they are. stored: `frames`,
    or an archive codec. Raises `CorruptPage`, `StoreError`; BadInput where the file exists and
    `replace` is not set, and as `transcode.recoded_form` does. No half-written file stays.
    """
    manifest = store.manifest(name)
    loses = stored != archive.FRAMES and not archive_codec(stored).exact
    if loses and codec_name:
        raise BadInput(
            f"codec {codec_name} for pages that are stored as {stored}, which is lossy: give one "
            "of the two here, and the other one to import"
        )
    change: Recoder | None = None
    if loses or codec_name:
        change = Recoder(manifest, codec_name, device, through=stored if loses else "")
    form, origin = (change.form, change.origin) if change else (manifest.form, manifest.origin)
    cipher = cipher_for(manifest)
    if cipher is not None and stored != archive.FRAMES:
        raise BadInput(
            f"context {manifest.context_id} is encrypted, and ciphertext cannot be packed: leave "
            "--cold and --cachegen out, or re-key it without --encrypt first"
        )
    tokens = np.ascontiguousarray(store.tokens(manifest), dtype="<i4").data
    if cipher is not None:
        tokens = memoryview(cipher.seal_blob(tokens, tokens_name(manifest.context_id)))
    head = ArchiveHead(
        stored=stored,
        manifest=as_written(
            msgspec.structs.replace(
                manifest, form=form, origin=origin, pages=(), payload_bytes=0, checksum=""
            )
        ),
    )
    payload_bytes = stored_bytes = 0
    with ArchiveWriter(path, replace) as writer:
        writer.add(archive.HEAD, msgspec.json.encode(head))
        writer.add(archive.TOKENS, tokens)

        def parts(page: Page) -> tuple[int, tuple[bytes | memoryview, ...]]:
            page = page if change is None else change(page)
            if cipher is not None:
                page = cipher.seal(page)
            if stored == archive.FRAMES:
                return page.payload.nbytes, (encode_head(page.header), page.payload)
            return page.payload.nbytes, encode_packed(page, stored)

        pages = stored_pages(store.root, manifest, parts, progress)
        for size, page in pages:
            payload_bytes += size
            stored_bytes += writer.add(archive.PAGE, *page)
        writer.end(len(manifest.pages), payload_bytes, stored_bytes)
    return Exported(path, len(manifest.pages), payload_bytes, writer.written_bytes)
