"""A context from a file (`kvstore.archive`) into a store.

The tokens must give the context's name and every page's key; each page must be the next one of this
context, and is verified with all its sums; the file's end must count and digest what came. Only
then does the context appear in the store, in one step.

What a file says is checked against itself. Who could write a file of consistent lies, wrong values
under right sums, is a matter of whom one takes files from; `contexts verify --deep` computes a
sample anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ringspan.attention.kv import unit_tokens
from ringspan.errors import BadInput, CorruptPage, RingspanError, StoreError, UnknownName
from ringspan.kvstore import archive
from ringspan.kvstore.archive import ArchiveHead, ArchiveReader, BadArchive, Record
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.encryption import plain_page
from ringspan.kvstore.folder import segment_path
from ringspan.kvstore.frame import ALIGN, aligned, decode_head
from ringspan.kvstore.keys import (
    PUBLIC_NAMESPACE,
    ROOT_KEY,
    context_id,
    namespace_digest,
    page_keys,
)
from ringspan.kvstore.manifest import (
    CONTEXT_NAME,
    FORMAT,
    Manifest,
    check_unlocked,
    cipher_for,
    unlocked,
)
from ringspan.kvstore.packed import archive_codec, decode_packed
from ringspan.kvstore.page import Page, differences, page_form, verify_payload, verify_sums
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.segment import SegmentWriter, room_bytes
from ringspan.kvstore.tokens import tokens_name
from ringspan.kvstore.transcode import Progress, Recoder, in_order
from ringspan.types import Span

if TYPE_CHECKING:
    import torch

    from ringspan.kvstore.encryption import PageCipher
    from ringspan.kvstore.folder import Store

FRAME_BYTES = 3 * ALIGN
"""What a frame on disk has beside its payload, at most."""
MOST = 1 << 24
"""Of layers, heads, dimensions and tokens of a page, as in page headers."""


def import_context(
    store: Store,
    path: Path,
    *,
    codec_name: str = "",
    replace: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Manifest:
    """The context in the file `path` to the store; the manifest under which it is there.

    codec_name: its pages are recoded on the way, on `device`. A tenant's context comes in only for
    a store that shows that tenant's. Raises `BadArchive` (a StoreError)
    saying what is wrong with the file and where, `StoreError` when the store has no room, BadInput
    where it has the context already and `replace` is not set. The store is then as before.
    """
    with ArchiveReader(path) as reader:
        records = reader.records()
        known = (PUBLIC_NAMESPACE,) if store.namespaces is None else store.namespaces
        coming = _Coming(reader, next(records), next(records), known)
        if coming.manifest.context_id in store.ids() and not replace:
            raise BadInput(
                f"{reader.name}: the store has context {coming.manifest.context_id} already: "
                "remove it first, or pass --force to replace it"
            )
        recoder = Recoder(coming.manifest, codec_name, device) if codec_name else None
        coming.check_room(
            store, recoder.form.bytes_of if recoder else coming.manifest.form.bytes_of
        )
        return _publish(store, coming, records, recoder, progress)


def _publish(
    store: Store,
    coming: _Coming,
    records: Iterator[Record],
    recoder: Recoder | None,
    progress: Progress | None,
) -> Manifest:
    manifest = coming.manifest
    form, origin = (recoder.form, recoder.origin) if recoder else (manifest.form, manifest.origin)

    def verified(item: tuple[int, Record]) -> Page:
        page = coming.page(*item)
        return recoder(page) if recoder else page

    with store.staged(manifest.context_id, coming.token_ids, coming.cipher) as staging:
        written = []
        with SegmentWriter(segment_path(staging, 0), cipher=coming.cipher) as writer:
            for page in in_order(verified, enumerate(records)):
                written.append(writer.append(page))
                if progress is not None:
                    progress(len(written), len(coming.keys))
            coming.check_end(len(written))
        whole = msgspec.structs.replace(
            manifest,
            form=form,
            origin=origin,
            pages=tuple(written),
            payload_bytes=sum(record.payload_bytes for record in written),
        )
        return store.publish(staging, whole)


class _Coming:
    """A context on its way in: what its head promises, and whether its pages keep it."""

    def __init__(
        self, reader: ArchiveReader, head: Record, tokens: Record, namespaces: Sequence[bytes]
    ) -> None:
        """Raises `BadArchive` for a head that contradicts itself, its tokens or the file's size."""
        self._reader = reader
        self._where = head.where
        self._unpacked_bytes = 0
        self.stored, self.manifest = self._head(head)
        self.manifest = self._unlocked(self.manifest, namespaces)
        self.cipher = cipher_for(self.manifest)
        manifest, step = self.manifest, self.manifest.page_tokens
        body: bytes | memoryview = tokens.body
        if self.cipher is not None:
            body = self._opened(bytes(body), self.cipher)
        if len(body) != 4 * manifest.num_tokens:
            raise self._bad(
                f"{len(body)} bytes of tokens, {manifest.num_tokens} tokens are promised"
            )
        self.token_ids = np.frombuffer(body, dtype="<i4")
        self.keys = self._keys()
        self._check_owner(namespaces)
        full, short = divmod(manifest.num_tokens, step)
        self._page_bytes = manifest.form.bytes_of(step)
        self.payload_bytes = full * self._page_bytes
        if short:
            self.payload_bytes += manifest.form.bytes_of(short)
        least = self.payload_bytes if self.stored == archive.FRAMES else len(self.keys)
        if least > reader.size_bytes:
            raise self._bad(
                f"{len(self.keys)} pages of {self.payload_bytes} bytes are promised, the file has "
                f"{reader.size_bytes}"
            )

    def _bad(self, text: str) -> BadArchive:
        return BadArchive(f"{self._where}: {text}")

    def _head(self, record: Record) -> tuple[str, Manifest]:
        try:
            head = msgspec.json.decode(record.body, type=ArchiveHead)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise self._bad(f"the head cannot be read: {error}") from None
        manifest = head.manifest
        if manifest.format != FORMAT:
            raise self._bad(f"format {manifest.format}, this version reads {FORMAT}")
        if manifest.pages or manifest.payload_bytes or manifest.checksum:
            raise self._bad("a manifest with pages of its own; they are to follow")
        document = manifest.document_tokens
        if manifest.num_tokens < 1 or document.stop > manifest.num_tokens:
            raise self._bad(
                f"{manifest.num_tokens} tokens, the document in [{document.start}, {document.stop})"
            )
        self._check_words(manifest)
        self._check_form(manifest)
        try:
            if head.stored != archive.FRAMES:
                archive_codec(head.stored)
        except UnknownName as error:
            raise self._bad(f"{error}; a newer version may have written it") from None
        return head.stored, manifest

    def _check_words(self, manifest: Manifest) -> None:
        words = (manifest.title, manifest.layout, *manifest.sources, *_strings(manifest.model))
        if not all(word.isprintable() for word in (*words, manifest.origin.namespace)):
            raise self._bad("a title or name with characters that cannot be printed")

    def _unlocked(self, manifest: Manifest, namespaces: Sequence[bytes]) -> Manifest:
        """With its namespace, which is one of these. BadInput where it is another tenant's."""
        if manifest.locked and not CONTEXT_NAME.fullmatch(manifest.context_id):
            raise self._bad(f"context {manifest.context_id[:40]!r} is no context's name")
        try:
            bytes.fromhex(manifest.namespace)
            manifest = unlocked(manifest, namespaces)
            check_unlocked(manifest)
            if bool(manifest.hidden) != manifest.encrypted:
                raise self._bad("it hides nothing and is encrypted, or the other way round")
        except ValueError as error:
            raise self._bad(f"its pages have no keys: {error}") from None
        except BadInput as error:
            raise BadInput(f"{self._reader.name}: {error}") from None
        except StoreError as error:
            raise self._bad(str(error)) from None
        self._check_words(manifest)
        return manifest

    def _check_owner(self, namespaces: Sequence[bytes]) -> None:
        """BadInput where the file names its namespace, and that is none of these."""
        manifest = self.manifest
        if bytes.fromhex(manifest.namespace) in namespaces:
            return
        public = manifest.namespace == PUBLIC_NAMESPACE.hex()
        advice = "leave --tenant out" if public else "name its tenant (--tenant NAME)"
        raise BadInput(
            f"{self._reader.name}: context {manifest.context_id} is not of the tenant that it is "
            f"imported for: {advice}"
        )

    def _opened(self, body: bytes, cipher: PageCipher) -> bytes:
        try:
            return cipher.open_blob(body, tokens_name(self.manifest.context_id))
        except StoreError as error:
            raise self._bad(str(error)) from None

    def _check_form(self, manifest: Manifest) -> None:
        form = manifest.form
        sizes = (form.num_layers, form.num_kv_heads, form.head_dim, form.page_tokens)
        if min(sizes) < 1 or max(sizes) > MOST:
            raise self._bad(f"pages of sizes {sizes} make no sense")
        try:
            wanted = page_form(codec(form.codec), *sizes[:3], dtype_of(form.dtype), sizes[3])
        except (UnknownName, ValueError) as error:
            raise self._bad(f"{error}; a newer version may have written it") from None
        if form != wanted:
            raise self._bad(f"form differs: {differences(wanted, form)}")
        if (unit := unit_tokens(wanted.specs)) not in (1, form.page_tokens):
            raise self._bad(
                f"pages of {form.page_tokens} tokens, codec {form.codec} makes pages of {unit}"
            )

    def _keys(self) -> list[str]:
        manifest, origin = self.manifest, self.manifest.origin
        try:
            namespace = bytes.fromhex(manifest.namespace)
            keys = page_keys(origin.fingerprint, namespace, self.token_ids, manifest.page_tokens)
        except (ValueError, BadInput) as error:
            raise self._bad(f"its pages have no keys: {error}") from None
        if origin.namespace != namespace_digest(namespace):
            raise self._bad("the namespace of its pages is not that of its keys")
        if manifest.context_id != context_id(keys):
            raise self._bad(
                f"context {manifest.context_id!r}, its tokens and model make {context_id(keys)}: "
                "the tokens or the model's fingerprint are not this context's"
            )
        return keys

    def check_room(self, store: Store, bytes_of: Callable[[int], int]) -> None:
        """StoreError unless the disk takes it; bytes_of: of a page as it will lie there."""
        need = len(self.keys) * (FRAME_BYTES + aligned(bytes_of(self.manifest.page_tokens)))
        need += self.token_ids.nbytes
        free = room_bytes(store.root)
        if need > free:
            raise StoreError(
                f"{self._reader.name}: the context needs {need / 1e9:.2f} GB in {store.root}, "
                f"which has {free / 1e9:.2f} GB free: free space, or import it with --codec int8"
            )
        store.check_quota(need)

    def page(self, index: int, record: Record) -> Page:
        """Page `index` of the context, verified in full. Raises `BadArchive`."""
        if index >= len(self.keys):
            raise BadArchive(f"{record.where}: a page more than the {len(self.keys)} promised")
        try:
            page = self._decoded(record)
            self._check_page(page, index)
            header, form = page.header, page.header.form
            sums = payload_sums(page.payload, form.specs, form.num_layers, header.span.tokens)
            verify_sums(header, sums)
            page = plain_page(page, self.cipher)
        except RingspanError as error:
            text = str(error)
            said = text if text.startswith(record.where) else f"{record.where}: {text}"
            raise BadArchive(said) from None
        return page

    def _decoded(self, record: Record) -> Page:
        if self.stored != archive.FRAMES:
            return decode_packed(record.body, self.stored, record.where)
        header, head_bytes = decode_head(record.body, record.where)
        payload = record.body[head_bytes:]
        verify_payload(header, payload)
        return Page(header, payload)

    def _check_page(self, page: Page, index: int) -> None:
        """The next page of this context, and no other."""
        header, manifest = page.header, self.manifest
        start = index * manifest.page_tokens
        span = Span(start, min(start + manifest.page_tokens, manifest.num_tokens))
        parent = self.keys[index - 1] if index else ROOT_KEY
        found = (header.key, header.parent_key, header.span)
        if found != (self.keys[index], parent, span):
            raise CorruptPage(
                f"holds page {header.key[:16]} [{header.span.start}, {header.span.stop}), wanted "
                f"{self.keys[index][:16]} [{span.start}, {span.stop})"
            )
        other = differences(manifest.origin, header.origin)
        other = other or differences(manifest.form, header.form)
        if other:
            raise CorruptPage(f"is a page of another context: {other}")

    def check_end(self, num_pages: int) -> None:
        """All pages came, and are as large as the end says."""
        name = self._reader.name
        if num_pages != len(self.keys):
            raise BadArchive(f"{name}: {num_pages} pages came, {len(self.keys)} are promised")
        if self._reader.payload_bytes != self.payload_bytes:
            raise BadArchive(
                f"{name}: {self.payload_bytes} bytes of pages came, its end says "
                f"{self._reader.payload_bytes}"
            )


def _strings(struct: msgspec.Struct) -> Sequence[str]:
    values = (getattr(struct, name) for name in struct.__struct_fields__)
    return [value for value in values if isinstance(value, str)]
