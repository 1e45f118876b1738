"""A second copy of the two small files without which a context's pages say nothing.

    CONTEXT/index.copy    xxh3-128 (16 bytes) of what follows | msgpack of `IndexCopy`

Pages have other tiers, parity and the tokens to come back from; manifest and tokens would be lost
with one bit. Readers refuse a context with a damaged one, as ever; `mend_index` puts it right, from
a copy that is verified like the file itself.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import msgspec
import xxhash

from ringspan.errors import StoreError
from ringspan.kvstore import staging
from ringspan.kvstore.encryption import checked_blob
from ringspan.kvstore.manifest import (
    MANIFEST,
    Manifest,
    decode_manifest,
    encode_manifest,
    read_manifest,
    unlocked,
)
from ringspan.kvstore.segment import store_error
from ringspan.kvstore.tokens import TOKENS, read_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FILE = "index.copy"
_DIGEST_BYTES = 16


class IndexCopy(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Both files, byte for byte."""

    manifest: bytes
    tokens: bytes


def write_index_copy(folder: Path, manifest: Manifest) -> None:
    """Of this manifest and the tokens that lie in `folder`; durable, in one step. Raises OSError,
    and `StoreError` where the tokens there are not the manifest's."""
    if not manifest.locked:
        read_tokens(folder / TOKENS, manifest)
    elif problems := check_locked_tokens(folder, manifest):
        raise StoreError(problems[0])
    copy = IndexCopy(encode_manifest(manifest), (folder / TOKENS).read_bytes())
    data = msgspec.msgpack.encode(copy)
    _replace(folder / FILE, xxhash.xxh3_128_digest(data) + data)


def mend_index(folder: Path, namespaces: Iterable[bytes] = ()) -> tuple[str, ...]:
    """Manifest, tokens and their copy, each from the other where one is damaged or missing; names
    of the files written. Raises `StoreError` where both are, with what is wrong with the file, and
    BadInput for a tenant's context whose namespace is none of these."""
    copy = _read(folder)
    mended: list[str] = []
    try:
        try:
            manifest = read_manifest(folder, namespaces)
        except StoreError:
            if copy is None:
                raise
            manifest = decode_manifest(copy.manifest, f"context {folder.name}: {FILE}")
            if manifest.context_id != folder.name:
                raise
            manifest = unlocked(manifest, namespaces)
            _replace(folder / MANIFEST, copy.manifest)
            mended.append(MANIFEST)
        try:
            read_tokens(folder / TOKENS, manifest)
        except StoreError:
            if copy is None:
                raise
            _put_tokens(folder, manifest, copy.tokens)
            mended.append(TOKENS)
        if copy is None or copy.manifest != encode_manifest(manifest):
            write_index_copy(folder, manifest)
            mended.append(FILE)
        staging.sync_folder(folder)
    except OSError as error:
        raise store_error(error, "cannot mend the index in", folder) from None
    return tuple(mended)


def check_index_copy(folder: Path, manifest: Manifest | None = None) -> Sequence[str]:
    """A line if there is no copy that could be used, or it is not that of this manifest and of the
    tokens beside it; contexts of before have none. Nothing is decrypted for it."""
    copy = _read(folder)
    if copy is None:
        return (f"context {folder.name}: {FILE} is missing or damaged: repair the context",)
    if manifest is not None and copy.manifest != encode_manifest(manifest):
        return (f"context {folder.name}: {FILE} is not that of its {MANIFEST}: repair the context",)
    return ()


def check_locked_tokens(folder: Path, manifest: Manifest) -> Sequence[str]:
    """A line if the tokens of a tenant's context that is locked are not those that were written:
    without its namespace they cannot be held against the keys."""
    try:
        data = (folder / TOKENS).read_bytes()
        if manifest.encrypted:
            checked_blob(data, f"context {folder.name}: {TOKENS}")
    except OSError as error:
        return (str(store_error(error, f"context {folder.name}: cannot read", folder / TOKENS)),)
    except StoreError as error:
        return (str(error),)
    copy = _read(folder)
    if copy is not None and copy.tokens != data:
        return (f"context {folder.name}: {TOKENS} and its copy in {FILE} differ: repair it",)
    return ()


def _put_tokens(folder: Path, manifest: Manifest, data: bytes) -> None:
    """The name appears only over tokens that are the manifest's."""
    beside = folder / f"{TOKENS}.{secrets.token_hex(4)}.part"
    try:
        _write(beside, data)
        read_tokens(beside, manifest)
        os.replace(beside, folder / TOKENS)
    finally:
        beside.unlink(missing_ok=True)


def _read(folder: Path) -> IndexCopy | None:
    """None where there is no whole one."""
    try:
        data = (folder / FILE).read_bytes()
    except OSError:
        return None
    if xxhash.xxh3_128_digest(data[_DIGEST_BYTES:]) != data[:_DIGEST_BYTES]:
        return None
    try:
        return msgspec.msgpack.decode(data[_DIGEST_BYTES:], type=IndexCopy)
    except (msgspec.DecodeError, ValueError):
        return None


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        _write(beside, data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
