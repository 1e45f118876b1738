"""A stored context under another namespace: another tenant's, another secret's, encrypted or not.

Page keys are hashes under the namespace, and encryption keys are derived from it, so every page
gets another name and is written anew; KV, tokens, codec and fidelity stay bit for bit. That is how
a secret is rotated: each context is re-keyed under the new one, then the old secret can go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ringspan.errors import BadInput
from ringspan.kvstore.encryption import cipher_of
from ringspan.kvstore.folder import segment_path
from ringspan.kvstore.frame import ALIGN, aligned
from ringspan.kvstore.keys import ROOT_KEY, context_id, namespace_digest, page_keys
from ringspan.kvstore.page import Page
from ringspan.kvstore.segment import SegmentWriter
from ringspan.kvstore.transcode import Progress, stored_pages

if TYPE_CHECKING:
    from ringspan.kvstore.folder import Store
    from ringspan.kvstore.manifest import Manifest

FRAME_BYTES = 3 * ALIGN
"""What a frame on disk has beside its payload, at most."""


def rekey(
    store: Store, name: str, namespace: bytes, *, progress: Progress | None = None
) -> Manifest:
    """A context (id or prefix) that the store shows, once more under `namespace`; its manifest.

    It lies on the disk, without parity (`contexts repair --parity` makes some); the old one stays
    as it is. Every page is verified before it is named anew. Raises `CorruptPage`, `StoreError`;
    BadInput where it is of that namespace already, or of a tenant that is not known here.
    """
    manifest = store.manifest(name)
    tokens = store.tokens(manifest)
    digest = namespace_digest(namespace)
    if manifest.origin.namespace == digest:
        raise BadInput(
            f"context {manifest.context_id} is under that tenant, secret and encryption already: "
            "name another tenant or secret, or add or leave out --encrypt"
        )
    keys = page_keys(manifest.origin.fingerprint, namespace, tokens, manifest.page_tokens)
    new_id, cipher = context_id(keys), cipher_of(namespace)
    page_bytes = aligned(manifest.form.bytes_of(manifest.page_tokens)) + FRAME_BYTES
    need_bytes = len(keys) * page_bytes + 4 * manifest.num_tokens
    store.check_room(need_bytes, keep=(manifest.context_id,))

    def named(page: Page) -> Page:
        index = page.header.span.start // manifest.page_tokens
        header = msgspec.structs.replace(
            page.header,
            key=keys[index],
            parent_key=keys[index - 1] if index else ROOT_KEY,
            origin=msgspec.structs.replace(page.header.origin, namespace=digest),
        )
        return Page(header, page.payload)

    with store.staged(new_id, tokens, cipher) as staging:
        with SegmentWriter(segment_path(staging, 0), cipher=cipher) as writer:
            pages = stored_pages(store.root, manifest, named, progress)
            records = tuple(writer.append(page) for page in pages)
        made = msgspec.structs.replace(
            manifest,
            context_id=new_id,
            namespace=namespace.hex(),
            hidden="",
            origin=msgspec.structs.replace(manifest.origin, namespace=digest),
            pages=records,
        )
        return store.publish(staging, made)
