"""The tokens of a stored context: one file, checked against the key of every page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.keys import page_keys
from ringspan.kvstore.segment import store_error

if TYPE_CHECKING:
    from pathlib import Path

    from ringspan.kvstore.manifest import Manifest

TOKENS = "tokens.npy"


def encode_tokens(token_ids: np.ndarray) -> memoryview:
    """The bytes of a tokens.npy: int32, little-endian."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(token_ids, dtype="<i4"), allow_pickle=False)
    return buffer.getbuffer()


def read_tokens(path: Path, manifest: Manifest) -> np.ndarray:
    """int32 [num_tokens] of a tokens.npy; `StoreError` unless they give every page's key."""
    name = f"context {manifest.context_id}"
    try:
        tokens = np.load(path, allow_pickle=False)
    except OSError as error:
        raise store_error(error, f"{name}: cannot read", path) from None
    except Exception as error:  # a damaged header makes numpy raise what its parsers raise
        raise StoreError(f"{name}: {path.name} cannot be read: {error}") from None
    if tokens.shape != (manifest.num_tokens,) or tokens.dtype != np.dtype("<i4"):
        raise StoreError(
            f"{name}: {path.name} holds {tokens.dtype} {tokens.shape}, wanted int32 "
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
