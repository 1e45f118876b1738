"""Encryption at rest: AES-256-GCM, bound to each page's key and header.

    data key   HKDF-SHA256(namespace), which is an HMAC under the server's secret and never leaves
               memory (`kvstore.tenancy`)
    salt       BLAKE3 keyed by another HKDF of the namespace, over header, sums and plain payload
    page key   HKDF-SHA256(data key, salt); chunk i is encrypted under nonce i + 1, the hidden sums
               under nonce 0
    bound      header without sums and sealing: page key, parent, span, origin, form, length. It is
               associated data of every chunk, with the chunk's number and how many there are

A nonce never meets a page key twice: the salt is a pseudorandom function of all that is encrypted
under it (the synthetic-IV idea, RFC 5297), so that two pages with one salt are one page. It needs
no random numbers and no counter, survives cloned machines, and the same pages still make the same
files. What it tells is which pages are equal, which their keys tell already.

What is in clear: page keys (BLAKE3 under the namespace: nobody else can guess them), lengths,
model, codec, sums of the ciphertext. Source of the mode: NIST SP 800-38D; of the derivation: RFC
5869.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash
from blake3 import blake3

from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.keys import is_encrypted, namespace_digest
from ringspan.kvstore.page import Page, page_name, payload_digest
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.sealing import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    SALT_BYTES,
    SUM_BYTES,
    TAG_BYTES,
    Sealed,
    chunks,
    hidden_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringspan.kvstore.page import PageHeader

BLOB_MAGIC = b"RSPANEN\n"
_BLOB_HEAD_BYTES = len(BLOB_MAGIC) + SALT_BYTES + DIGEST_BYTES
_LARGEST_SUM = (1 << 64) - 1
_encode = msgspec.msgpack.Encoder().encode


class PageCipher:
    """Seals and opens what lies at rest in one namespace. Any number of threads may use it."""

    def __init__(self, namespace: bytes) -> None:
        """BadInput where the namespace is not an encrypted one or the package is missing."""
        if not is_encrypted(namespace):
            raise BadInput(
                "this namespace is not encrypted: its contexts are written as they are; encryption "
                "wants a tenant (--tenant NAME --encrypt)"
            )
        self.key_id = namespace_digest(namespace)
        """16 hex characters that name the key; `Origin.namespace` of all pages under it."""
        self._data_key = _derived(namespace, b"", b"ringspan data key v1")
        self._salt_key = _derived(namespace, b"", b"ringspan salt key v1")
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"PageCipher({self.key_id})"

    # pages

    def draft(self, header: PageHeader) -> PageHeader:
        """A header of the length that `seal` will give this one; only sizes must be right in it."""
        count, layers = chunks(header.payload_bytes), header.form.num_layers
        return msgspec.structs.replace(
            header,
            xxh3="0" * 2 * DIGEST_BYTES,
            plane_sums=(_LARGEST_SUM,) * layers,
            sealed=Sealed(bytes(SALT_BYTES), bytes(TAG_BYTES * count), bytes(hidden_bytes(layers))),
        )

    def seal(self, page: Page, room: memoryview | None = None) -> Page:
        """The page with its payload encrypted into `room` (at least as long; None: a new one)."""
        header, payload = page.header, page.payload.cast("B")
        if header.sealed is not None:
            raise ValueError(f"{page_name(header)} is encrypted already")
        bound, sums = _bound(header), _hidden(header)
        salted = blake3(key=self._salt_key)
        for part in (len(bound).to_bytes(8, "little"), bound, sums, payload):
            salted.update(part)
        salt = salted.digest(SALT_BYTES)
        aead, name = self._aead(salt), blake3(bound).digest()
        size, count = payload.nbytes, chunks(payload.nbytes)
        room = memoryview(bytearray(size)) if room is None else room[:size]
        tags = bytearray()
        for chunk in range(count):
            at, stop = chunk * CHUNK_BYTES, min(size, (chunk + 1) * CHUNK_BYTES)
            scratch = self._scratch(stop - at + TAG_BYTES)
            aead.encrypt_into(
                _nonce(chunk + 1), payload[at:stop], _aad(name, chunk, count), scratch
            )
            room[at:stop] = scratch[:-TAG_BYTES]
            tags += scratch[-TAG_BYTES:]
        form = header.form
        hidden = aead.encrypt(_nonce(0), sums, _aad(name, count, count))
        sealing = Sealed(salt, bytes(tags), hidden)
        new = msgspec.structs.replace(
            header,
            xxh3=payload_digest(room),
            plane_sums=tuple(payload_sums(room, form.specs, form.num_layers, header.span.tokens)),
            sealed=sealing,
        )
        short = len(_encode(self.draft(header))) - len(_encode(new))
        if short:
            sealing = msgspec.structs.replace(sealing, pad=bytes(short))
            new = msgspec.structs.replace(new, sealed=sealing)
        return Page(new, room)

    def open_header(self, header: PageHeader) -> PageHeader:
        """The plain page's header. Raises `CorruptPage` where it was not sealed with it."""
        sealed = self._sealed(header)
        count, layers = chunks(header.payload_bytes), header.form.num_layers
        name = blake3(_bound(header)).digest()
        try:
            sums = self._aead(sealed.salt).decrypt(
                _nonce(0), sealed.hidden, _aad(name, count, count)
            )
        except _invalid() as error:
            raise _refused(page_name(header)) from error
        plain = [
            int.from_bytes(sums[at : at + SUM_BYTES], "little")
            for at in range(DIGEST_BYTES, DIGEST_BYTES + SUM_BYTES * layers, SUM_BYTES)
        ]
        return msgspec.structs.replace(
            header, xxh3=sums[:DIGEST_BYTES].hex(), plane_sums=tuple(plain), sealed=None
        )

    def open_payload(self, header: PageHeader, payload: memoryview) -> None:
        """Decrypt in place; `header` as stored. Raises `CorruptPage`; `payload` is then spoilt."""
        self._open_chunks(header, payload.cast("B"), 0)

    def open_page(self, page: Page) -> Page:
        """The plain page, in memory of its own. Raises `CorruptPage`."""
        header, payload = self.open_header(page.header), memoryview(bytearray(page.payload))
        self.open_payload(page.header, payload)
        return Page(header, payload)

    def open_part(
        self,
        header: PageHeader,
        read: Callable[[memoryview, int], None],
        room: memoryview,
        first: int,
    ) -> None:
        """Plain bytes from `first` on to `room`, with zeros behind the payload's end.

        read(room, first): stored bytes of the payload. Whole chunks are read and authenticated.
        """
        begin = first // CHUNK_BYTES * CHUNK_BYTES
        wanted = min(first + room.nbytes, header.payload_bytes)
        stop = min(chunks(wanted) * CHUNK_BYTES, header.payload_bytes)
        data = memoryview(bytearray(max(0, stop - begin)))
        if data.nbytes:
            read(data, begin)
            self._open_chunks(header, data, begin // CHUNK_BYTES)
        plain = data[first - begin : max(first, wanted) - begin]
        room[: plain.nbytes] = plain
        room[plain.nbytes :] = bytes(room.nbytes - plain.nbytes)

    def _open_chunks(self, header: PageHeader, data: memoryview, first: int) -> None:
        sealed = self._sealed(header)
        aead, name = self._aead(sealed.salt), blake3(_bound(header)).digest()
        count = chunks(header.payload_bytes)
        for at in range(0, data.nbytes, CHUNK_BYTES):
            chunk = first + at // CHUNK_BYTES
            piece = data[at : at + CHUNK_BYTES]
            scratch = self._scratch(piece.nbytes + TAG_BYTES)
            scratch[:-TAG_BYTES] = piece
            scratch[-TAG_BYTES:] = sealed.tags[chunk * TAG_BYTES : (chunk + 1) * TAG_BYTES]
            try:
                aead.decrypt_into(_nonce(chunk + 1), scratch, _aad(name, chunk, count), piece)
            except _invalid() as error:
                raise _refused(page_name(header)) from error

    def _sealed(self, header: PageHeader) -> Sealed:
        if header.sealed is None:
            raise CorruptPage(f"{page_name(header)}: is not encrypted, its context is")
        if header.origin.namespace != self.key_id:
            raise CorruptPage(
                f"{page_name(header)}: is encrypted under key {header.origin.namespace}, not under "
                f"{self.key_id}"
            )
        return header.sealed

    # small files

    def seal_blob(self, data: bytes | memoryview, what: str) -> bytes:
        """A small file; what: its name and whose it is, which `open_blob` must say again."""
        name, data = what.encode(), bytes(data)
        salted = blake3(key=self._salt_key)
        for part in (b"blob", len(name).to_bytes(8, "little"), name, data):
            salted.update(part)
        salt = salted.digest(SALT_BYTES)
        body = self._aead(salt).encrypt(_nonce(0), data, b"blob " + name)
        return b"".join((BLOB_MAGIC, salt, xxhash.xxh3_128_digest(salt + body), body))

    def open_blob(self, data: bytes, what: str) -> bytes:
        """Raises `StoreError` naming `what` for anything that `seal_blob` did not make of it."""
        salt, body = checked_blob(data, what)
        try:
            plain: bytes = self._aead(salt).decrypt(_nonce(0), body, b"blob " + what.encode())
        except _invalid() as error:
            raise StoreError(str(_refused(what))) from error
        return plain

    # helpers

    def _aead(self, salt: bytes) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(_derived(self._data_key, salt, b"ringspan page v1"))

    def _scratch(self, size: int) -> memoryview:
        """A thread's own."""
        room = getattr(self._local, "room", None)
        if room is None:
            room = self._local.room = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
        return room[:size]


@functools.lru_cache(maxsize=64)
def cipher_of(namespace: bytes) -> PageCipher | None:
    """Of an encrypted namespace; None for any other. Raises as `PageCipher` does."""
    return PageCipher(namespace) if is_encrypted(namespace) else None


def plain_page(page: Page, cipher: PageCipher | None) -> Page:
    """A page as it is stored in a namespace of this cipher -> the plain one. Raises `CorruptPage`
    where it is not encrypted and should be, or the other way round."""
    if cipher is not None:
        return cipher.open_page(page)
    if page.header.sealed is not None:
        raise CorruptPage(f"{page_name(page.header)}: is encrypted, its context is not")
    return page


def checked_blob(data: bytes, what: str) -> tuple[bytes, bytes]:
    """(salt, ciphertext) of an encrypted file whose checksum is right, which needs no secret.
    Raises `StoreError`."""
    salt = data[len(BLOB_MAGIC) : len(BLOB_MAGIC) + SALT_BYTES]
    digest, body = data[_BLOB_HEAD_BYTES - DIGEST_BYTES : _BLOB_HEAD_BYTES], data[_BLOB_HEAD_BYTES:]
    if not data.startswith(BLOB_MAGIC) or len(body) < TAG_BYTES:
        raise StoreError(f"{what}: is not encrypted, or not whole")
    if xxhash.xxh3_128_digest(salt + body) != digest:
        raise StoreError(f"{what}: the checksum of what is encrypted differs: it is damaged")
    return salt, body


def _bound(header: PageHeader) -> bytes:
    return _encode(msgspec.structs.replace(header, xxh3="", plane_sums=(), sealed=None))


def _hidden(header: PageHeader) -> bytes:
    sums = (value.to_bytes(SUM_BYTES, "little") for value in header.plane_sums)
    return b"".join((bytes.fromhex(header.xxh3), *sums))


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _aad(name: bytes, chunk: int, count: int) -> bytes:
    return b"".join((name, chunk.to_bytes(8, "big"), count.to_bytes(8, "big")))


def _refused(what: str) -> CorruptPage:
    return CorruptPage(
        f"{what}: its encryption does not hold: it was altered, or belongs to another page or place"
    )


def _derived(key: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256."""
    try:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError:
        raise BadInput(
            "encryption at rest wants the package cryptography: pip install cryptography"
        ) from None
    made: bytes = HKDF(hashes.SHA256(), 32, salt, info).derive(key)
    return made


def _invalid() -> type[Exception]:
    from cryptography.exceptions import InvalidTag

    return InvalidTag
