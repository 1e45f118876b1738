"""What a stored context is: which model and tokens, how its pages look, where each one lies.

A manifest is a JSON file with a checksum of itself. It is an index: every fact in it about a page
stands in that page's frame too, and the two are compared before a page is used.

A tenant's namespace is never written: a manifest names it by its digest, and is locked until it is
told the namespace (`unlocked`). Of an encrypted context title and sources are encrypted too.
"""

from __future__ import annotations

import base64
import binascii
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import xxhash

from ringspan.cluster.messages import ModelSpec, PageRecord
from ringspan.errors import BadInput, StoreError, UnknownName
from ringspan.kvstore.encryption import PageCipher, checked_blob, cipher_of
from ringspan.kvstore.fidelity import Fidelity, fidelity_of
from ringspan.kvstore.frame import ALIGN, aligned
from ringspan.kvstore.keys import (
    CONTEXT_ID_CHARS,
    PUBLIC_NAMESPACE,
    is_encrypted,
    namespace_digest,
)
from ringspan.kvstore.page import Origin, PageForm
from ringspan.kvstore.segment import store_error
from ringspan.types import Span

if TYPE_CHECKING:
    from collections.abc import Iterable
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
    """Hex of the namespace that the keys were made under; of a tenant's only in memory. Empty: it
    is a tenant's and not known here; `origin.namespace` says whose."""
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
    hidden: str = ""
    """Of an encrypted context: title and sources, encrypted, in base64; empty: it is not."""
    checksum: str = ""
    """xxh3-128 of the JSON of all other fields as they are written; `sealed` sets it."""

    @property
    def codec(self) -> str:
        return self.form.codec

    @property
    def page_tokens(self) -> int:
        return self.form.page_tokens

    @property
    def encrypted(self) -> bool:
        """Pages, tokens, title and sources are encrypted at rest."""
        return bool(self.hidden) or is_encrypted(_space(self))

    @property
    def locked(self) -> bool:
        """Of a tenant that is not known here: its tokens and keys cannot be checked, and nothing
        that is encrypted can be read; see `unlocked`."""
        return not self.namespace

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
    hidden = as_written(manifest).hidden
    return msgspec.structs.replace(manifest, hidden=hidden, checksum=_checksum(manifest))


def encode_manifest(manifest: Manifest) -> bytes:
    """As it is written: nothing in it tells a tenant's namespace."""
    return msgspec.json.encode(as_written(manifest))


def as_written(manifest: Manifest) -> Manifest:
    """Without what only its tenant may know; the same manifest gives the same bytes each time."""
    space = _space(manifest)
    if not space:
        return manifest
    hidden = ""
    if (cipher := cipher_of(space)) is not None:
        told = msgspec.json.encode((manifest.title, manifest.sources))
        sealing = cipher.seal_blob(told, f"title of context {manifest.context_id}")
        hidden = base64.b64encode(sealing).decode()
        manifest = msgspec.structs.replace(manifest, title="", sources=())
    kept = manifest.namespace if space == PUBLIC_NAMESPACE else ""
    return msgspec.structs.replace(manifest, namespace=kept, hidden=hidden)


def unlocked(manifest: Manifest, namespaces: Iterable[bytes]) -> Manifest:
    """The manifest with its namespace in it, if that is one of these, and all that it hides.
    Raises `StoreError` where what is hidden is damaged."""
    if not manifest.locked:
        return manifest
    for namespace in namespaces:
        if namespace_digest(namespace) != manifest.origin.namespace:
            continue
        manifest = msgspec.structs.replace(manifest, namespace=namespace.hex())
        if (cipher := cipher_of(namespace)) is not None:
            name = f"title of context {manifest.context_id}"
            told = cipher.open_blob(_hidden(manifest), name)
            title, sources = msgspec.json.decode(told, type=tuple[str, tuple[str, ...]])
            manifest = msgspec.structs.replace(manifest, title=title, sources=sources)
        break
    return manifest


def check_unlocked(manifest: Manifest) -> None:
    """BadInput for a context of a tenant that is not known here."""
    if manifest.locked:
        raise BadInput(
            f"context {manifest.context_id} is a tenant's: name the tenant (--tenant NAME), under "
            f"the server's secret that it was made with (it wants key {manifest.origin.namespace})"
        )


def cipher_for(manifest: Manifest) -> PageCipher | None:
    """What opens and seals its pages; None for a context that is not encrypted. BadInput where its
    tenant is not known here."""
    if manifest.encrypted:
        check_unlocked(manifest)
    return cipher_of(_space(manifest))


def decode_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in a file. Raises `StoreError` naming `where` for anything not whole."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        _space(manifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise StoreError(f"{where}: the manifest cannot be read: {error}") from None
    if manifest.checksum != _checksum(manifest):
        raise StoreError(f"{where}: the manifest's checksum differs: it is damaged or was edited")
    check_manifest(manifest)
    return manifest


def read_manifest(folder: Path, namespaces: Iterable[bytes] = ()) -> Manifest:
    """Of the context in `folder`, which is named by its id; unlocked if it is of one of these
    namespaces. Raises `StoreError`."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise store_error(error, "cannot read", folder / MANIFEST) from None
    manifest = decode_manifest(data, f"context {folder.name}")
    if manifest.context_id != folder.name:
        raise StoreError(f"context {folder.name}: its manifest is that of {manifest.context_id}")
    return unlocked(manifest, namespaces)


def check_manifest(manifest: Manifest) -> None:
    """Pages tile the tokens, names stay in the folder, sizes add up. Raises `StoreError`."""
    name = f"manifest of {manifest.context_id!r}"
    if manifest.format != FORMAT:
        raise StoreError(f"{name}: format {manifest.format}, this version reads {FORMAT}")
    if not CONTEXT_NAME.fullmatch(manifest.context_id):
        raise StoreError(f"{name}: a context is named by {CONTEXT_ID_CHARS} hex characters")
    if manifest.locked and manifest.hidden:
        checked_blob(_hidden(manifest), f"{name}, what it hides")
    elif manifest.namespace and namespace_digest(_space(manifest)) != manifest.origin.namespace:
        raise StoreError(f"{name}: its namespace is not that of its pages")
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


def _space(manifest: Manifest) -> bytes:
    """Empty for a locked one. Raises ValueError."""
    return bytes.fromhex(manifest.namespace)


def _hidden(manifest: Manifest) -> bytes:
    try:
        return base64.b64decode(manifest.hidden, validate=True)
    except binascii.Error as error:
        name = f"manifest of {manifest.context_id!r}"
        raise StoreError(f"{name}: what it hides cannot be read: {error}") from None


def _checksum(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(as_written(manifest), checksum="")
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(bare))
