"""Names of pages and contexts, made from what they hold.

    key_i = BLAKE3(DOMAIN ‖ len(fingerprint) ‖ fingerprint ‖ len(namespace) ‖ namespace
                   ‖ key_{i-1} ‖ count ‖ token ids)            key_{-1} = 32 zero bytes

len: 8 bytes little-endian; key: 32 bytes; count: 8 bytes little-endian; token ids: int32
little-endian. Every field is of fixed width or carries its length, so that no two inputs give the
same bytes. A key names all tokens up to its page's end, hence a prefix; a short last page has a
key of its own. How a page is encoded is not part of its name.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from ringspan.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

DOMAIN = b"ringspan page v1"
ROOT_KEY = "00" * 32
"""Parent key of a context's first page."""

PUBLIC_NAMESPACE = b"ringspan public namespace v1"
"""Where contexts go that need no wall between tenants (the command line's)."""

ENCRYPTED = b"ringspan encrypted v1 "
"""How a namespace begins whose contexts are encrypted at rest."""

CONTEXT_ID_CHARS = 16


def page_keys(
    fingerprint: str, namespace: bytes, token_ids: np.ndarray, page_tokens: int
) -> list[str]:
    """Hex keys of the pages of `token_ids` [n] (integers), in position order.

    fingerprint: of the model, hex. Raises BadInput for ids that are no int32 >= 0, ValueError for
    a fingerprint that is not hex. A million tokens take about 10 ms.
    """
    ids = _int32(token_ids)
    printed = bytes.fromhex(fingerprint)
    head = DOMAIN + _prefixed(printed) + _prefixed(namespace)
    data = memoryview(ids.tobytes())
    step = 4 * page_tokens
    parent = bytes.fromhex(ROOT_KEY)
    keys: list[str] = []
    for at in range(0, len(data), step):
        tokens = data[at : at + step]
        count = (len(tokens) // 4).to_bytes(8, "little")
        parent = blake3(b"".join((head, parent, count, tokens))).digest()
        keys.append(parent.hex())
    return keys


def context_id(keys: Sequence[str]) -> str:
    """A context's name: the first 16 hex characters of its last page's key.

    That key covers model, namespace and every token. 64 bits name what one store holds; that it
    is the context meant is checked with the full keys of its manifest.
    """
    if not keys:
        raise BadInput("a context of 0 tokens has no name: give at least one token")
    return keys[-1][:CONTEXT_ID_CHARS]


def namespace_for(secret: bytes, tenant: str, encrypted: bool = False) -> bytes:
    """HMAC-SHA256 of the tenant under a secret of the server; never take one from a request, never
    write one down: who has it can name the tenant's pages, and make the keys that encrypt them.

    encrypted: of what the tenant has encrypted at rest, which shares no page with the rest.
    """
    domain = b"ringspan encrypted namespace v1\0" if encrypted else b"ringspan namespace v1\0"
    made = hmac.new(secret, domain + tenant.encode(), hashlib.sha256).digest()
    return ENCRYPTED + made if encrypted else made


def is_encrypted(namespace: bytes) -> bool:
    """Whether contexts of this namespace are encrypted at rest."""
    return namespace.startswith(ENCRYPTED)


def namespace_digest(namespace: bytes) -> str:
    """16 hex characters that stand for a namespace in page headers and manifests: of those that
    are secret they tell nothing else."""
    return blake3(b"ringspan namespace digest v1\0" + namespace).hexdigest()[:16]


def _prefixed(field: bytes) -> bytes:
    return len(field).to_bytes(8, "little") + field


def _int32(token_ids: np.ndarray) -> np.ndarray:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BadInput(
            f"token ids of shape {ids.shape} and dtype {ids.dtype}; wanted one row of integers"
        )
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > np.iinfo(np.int32).max):
        raise BadInput(
            f"token ids reach from {ids.min()} to {ids.max()}; wanted 0 to {np.iinfo(np.int32).max}"
        )
    return ids.astype("<i4", copy=False)
