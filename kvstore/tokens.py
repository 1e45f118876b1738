"""The tokens of a stored context: one file, checked against the key of every page.

Of an encrypted context the file is encrypted whole (`encryption.PageCipher.seal_blob`).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.keys import page_keys
from ringspan.kvstore.manifest import check_unlocked, cipher_for
from ringspan.kvstore.segment import store_error

if TYPE_CHECKING:
    from pathlib import Path

    from ringspan.kvstore.encryption import PageCipher
    from ringspan.kvstore.manifest import Manifest

TOKENS = "tokens.npy"


def encode_tokens(
    token_ids: np.ndarray, context_id: str = "", cipher: PageCipher | None = None
) -> bytes | memoryview:
    """The bytes of a tokens.npy: int32, little-endian; encrypted if there is a cipher."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(token_ids, dtype="<i4"), allow_pickle=False)
    if cipher is not None:
        return cipher.seal_blob(buffer.getbuffer(), tokens_name(context_id))
    return buffer.getbuffer()


def tokens_name(context_id: str) -> str:
    """What the file is bound to where it is encrypted."""
    return f"tokens of context {context_id}"


def read_tokens(path: Path, manifest: Manifest) -> np.ndarray:
    """int32 [num_tokens] of a tokens.npy; `StoreError` unless they give every page's key, BadInput
    where the context's tenant is not known here."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise store_error(error, f"context {manifest.context_id}: cannot read", path) from None
    return decode_tokens(data, manifest, path.name)


def decode_tokens(data: bytes, manifest: Manifest, file_name: str = TOKENS) -> np.ndarray:
    """As `read_tokens`, of the file's bytes."""
    name = f"context {manifest.context_id}"
    check_unlocked(manifest)
    cipher = cipher_for(manifest)
    if cipher is not None:
        data = cipher.open_blob(data, tokens_name(manifest.context_id))
    try:
        tokens = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy raise what its parsers raise
        raise StoreError(f"{name}: {file_name} cannot be read: {error}") from None
    if tokens.shape != (manifest.num_tokens,) or tokens.dtype != np.dtype("<i4"):
        raise StoreError(
            f"{name}: {file_name} holds {tokens.dtype} {tokens.shape}, wanted int32 "
            f"({manifest.num_tokens},)"
        )
    try:
        namespace = bytes.fromhex(manifest.namespace)
        keys = page_keys(manifest.origin.fingerprint, namespace, tokens, manifest.page_tokens)
    except (ValueError, BadInput) as error:
        raise StoreError(f"{name}: its pages have no keys: {error}") from None
    for index, (page, key) in enumerate(zip(manifest.pages, keys, strict=True)):
        if page.key != key:
            raise StoreError(
                f"{name}: page {index} [{page.span.start}, {page.span.stop}) has key "
                f"{page.key[:16]}, its tokens and model make {key[:16]}: the tokens, the model's "
                f"fingerprint or the page is not this context's"
            )
    return tokens
