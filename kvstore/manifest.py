"""What a stored context is: which model and tokens, how its pages look, where each one lies.

A manifest is a JSON file with a checksum of itself. It is an index: every fact in it about a page
stands in that page's frame too, and the two are compared before a page is used.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import xxhash

from ringspan.cluster.messages import ModelSpec, PageRecord
from ringspan.errors import StoreError, UnknownName
from ringspan.kvstore.fidelity import Fidelity, fidelity_of
from ringspan.kvstore.frame import ALIGN, aligned
from ringspan.kvstore.keys import CONTEXT_ID_CHARS
from ringspan.kvstore.page import Origin, PageForm
from ringspan.kvstore.segment import store_error
from ringspan.types import Span

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 2
MANIFEST = "manifest.json"
SEGMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.seg")
"""A segment is a plain file name: nothing in a manifest can point out of its folder."""

CONTEXT_NAME = re.compile(rf"[0-9a-f]{{{CONTEXT_ID_CHARS}}}")


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A context in a store folder. `pages` are in position order and tile [0, num_tokens)."""

    format: int = FORMAT
    context_id: str
    model: ModelSpec
    """What loads the weights again; `origin.fingerprint` says whether they are the same."""
    origin: Origin
    form: PageForm
    namespace: str
    """Hex of the namespace that the keys were made under."""
    num_tokens: int
    layout: str
    chunk_tokens: int
    world_size: int
    """Ranks that prefilled it; any number may open it."""
    created_unix_s: float
    title: str = ""
    sources: tuple[str, ...] = ()
    """Where the tokens came from: paths as the user gave them."""
    chat: bool = False
    """The tokens begin with a chat template's opening, which an answer goes on with."""
    document_tokens: Span
    """Where the document itself lies between the template's prefix and suffix."""
    payload_bytes: int
    pages: tuple[PageRecord, ...]
    checksum: str = ""
    """xxh3-128 of the JSON of all other fields; `sealed` sets it."""

    @property
    def codec(self) -> str:
        return self.form.codec

    @property
    def page_tokens(self) -> int:
        return self.form.page_tokens

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(page.key for page in self.pages)

    @property
    def fidelity(self) -> Fidelity:
        return fidelity_of(self.form, self.origin)

    @property
    def exact(self) -> bool:
        """KV as computed by the model, without approximation."""
        return self.origin.provenance == ("exact",) and self.form.codec == "raw"


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with its checksum, its structure checked. Raises `StoreError`."""
    check_manifest(manifest)
    return msgspec.structs.replace(manifest, checksum=_checksum(manifest))


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in a file. Raises `StoreError` naming `where` for anything not whole."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise StoreError(f"{where}: the manifest cannot be read: {error}") from None
    if manifest.checksum != _checksum(manifest):
        raise StoreError(f"{where}: the manifest's checksum differs: it is damaged or was edited")
    check_manifest(manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Of the context in `folder`, which is named by its id. Raises `StoreError`."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise store_error(error, "cannot read", folder / MANIFEST) from None
    manifest = decode_manifest(data, f"context {folder.name}")
    if manifest.context_id != folder.name:
        raise StoreError(f"context {folder.name}: its manifest is that of {manifest.context_id}")
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Pages tile the tokens, names stay in the folder, sizes add up. Raises `StoreError`."""
    name = f"manifest of {manifest.context_id!r}"
    if manifest.format != FORMAT:
        raise StoreError(f"{name}: format {manifest.format}, this version reads {FORMAT}")
    if not CONTEXT_NAME.fullmatch(manifest.context_id):
        raise StoreError(f"{name}: a context is named by {CONTEXT_ID_CHARS} hex characters")
    step = manifest.form.page_tokens
    if manifest.num_tokens < 1 or step < 1:
        raise StoreError(f"{name}: {manifest.num_tokens} tokens in pages of {step}")
    try:
        full_bytes = manifest.form.bytes_of(step)
    except UnknownName as error:
        raise StoreError(f"{name}: {error}; a newer version may have written it") from None
    position = 0
    for page in manifest.pages:
        stop = min(position + step, manifest.num_tokens)
        if page.span != Span(position, stop) or position == stop:
            raise StoreError(
                f"{name}: page [{page.span.start}, {page.span.stop}) where "
                f"[{position}, {stop}) should be"
            )
        if not SEGMENT_NAME.fullmatch(page.segment):
            raise StoreError(f"{name}: segment name {page.segment!r} is not a plain *.seg name")
        page_bytes = full_bytes
        if page.span.tokens < step:
            page_bytes = manifest.form.bytes_of(page.span.tokens)
        if page.payload_bytes != page_bytes:
            raise StoreError(
                f"{name}: page [{page.span.start}, {page.span.stop}) of {page.payload_bytes} "
                f"bytes, its form makes {page_bytes}"
            )
        head_bytes = page.frame_bytes - aligned(page.payload_bytes)
        if page.offset < 0 or page.offset % ALIGN or head_bytes < ALIGN or head_bytes % ALIGN:
            raise StoreError(
                f"{name}: page [{page.span.start}, {page.span.stop}) has a frame of "
                f"{page.frame_bytes} bytes at {page.offset}, which no frame can have"
            )
        position = stop
    if position != manifest.num_tokens:
        raise StoreError(f"{name}: pages hold {position} of {manifest.num_tokens} tokens")
    if not manifest.pages[-1].key.startswith(manifest.context_id):
        raise StoreError(f"{name}: its last page's key is {manifest.pages[-1].key!r}")
    if manifest.payload_bytes != sum(page.payload_bytes for page in manifest.pages):
        raise StoreError(f"{name}: payload_bytes {manifest.payload_bytes} is not its pages' sum")


def assign_pages(manifest: Manifest, world_size: int) -> list[tuple[PageRecord, ...]]:
    """Pages of each rank that opens the context: contiguous blocks, at most one page apart."""
    if world_size < 1:
        raise ValueError(f"world_size {world_size}: at least one rank must open a context")
    pages = manifest.pages
    cuts = [len(pages) * rank // world_size for rank in range(world_size + 1)]
    return [pages[start:stop] for start, stop in pairwise(cuts)]


def _checksum(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, checksum="")
    return xxhash.xxh3_128_hexdigest(encode_manifest(bare))
