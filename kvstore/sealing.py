"""What an encrypted page's header says beside that of a plain one.

An encrypted page is a page whose payload is ciphertext of the same length: plane sums and xxh3 are
those of what is stored, so that it is verified, moved, mended and covered by parity by anybody, on
every road, like any other. Only `kvstore.encryption`, under the tenant's namespace, makes KV of it.
"""

from __future__ import annotations

import msgspec

CHUNK_BYTES = 1 << 18
"""Of a payload that is encrypted in one piece, with a tag of its own: layers can be read alone."""
SALT_BYTES = 32
TAG_BYTES = 16
DIGEST_BYTES = 16
SUM_BYTES = 8


class Sealed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a payload was encrypted; see `kvstore.encryption`."""

    salt: bytes
    """The page's own key is made of it."""
    tags: bytes
    """One of each chunk, in order."""
    hidden: bytes
    """Encrypted: xxh3-128 and plane sums of the plain payload."""
    pad: bytes = b""
    """Makes up for sums that msgpack writes shorter: a header's length is known before its sums."""


def chunks(payload_bytes: int) -> int:
    """Pieces of a payload."""
    return -(-payload_bytes // CHUNK_BYTES)


def hidden_bytes(num_layers: int) -> int:
    """Length of `Sealed.hidden`."""
    return DIGEST_BYTES + SUM_BYTES * num_layers + TAG_BYTES


def sealing_fault(sealed: Sealed, payload_bytes: int, num_layers: int) -> str:
    """What is wrong with the lengths; empty where they fit such a page."""
    wanted = (SALT_BYTES, TAG_BYTES * chunks(payload_bytes), hidden_bytes(num_layers))
    found = (len(sealed.salt), len(sealed.tags), len(sealed.hidden))
    if found != wanted or len(sealed.pad) > 255:
        return f"its sealing has {found} bytes of salt, tags and sums, wanted {wanted}"
    return ""
