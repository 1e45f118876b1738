"""A page as an archive keeps it: its frame's header, and its payload packed by an archive codec.

    0   magic 8 bytes | version u32 | head bytes u32 | checksum 16 bytes      (little-endian)
    32  head (msgpack of `PackedHead`)
    ..  stored bytes

checksum = xxh3-128 of the 16 bytes before it and the head. The head holds xxh3-128 of the stored
bytes; the page's header within it has xxh3-128 and plane sums of the payload. So bytes are verified
before they are unpacked, and what was unpacked before it is used. Of a lossy archive codec these
are the sums of what comes out of it, which is the same on every machine.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from ringspan.errors import CorruptPage, UnknownName
from ringspan.kvstore.codecs import cachegen, cold
from ringspan.kvstore.fidelity import decoded_from
from ringspan.kvstore.page import Page, PageHeader, page_name, verify_header, verify_payload
from ringspan.kvstore.transcode import resealed

if TYPE_CHECKING:
    from ringspan.kvstore.page import PageForm

MAGIC = b"RSPANPZ\n"
VERSION = 1
MAX_PAYLOAD_BYTES = 256 << 20
"""Of one page that is unpacked: twice that of the largest models known in fp32. It bounds what a
file can make a reader allocate beyond its own size."""

_PREFIX = struct.Struct("<8sII")
_HEAD_BYTES = _PREFIX.size + 16


class ArchiveCodec(NamedTuple):
    """pack(form, tokens, payload) -> stored bytes; unpack(form, tokens, stored) -> payload."""

    pack: Callable[[PageForm, int, memoryview], bytes]
    unpack: Callable[[PageForm, int, memoryview], memoryview]
    exact: bool
    """A lossy one takes pages of codec raw, whose provenance names it."""


ARCHIVE_CODECS = {
    cold.NAME: ArchiveCodec(cold.pack, cold.unpack, exact=True),
    cachegen.NAME: ArchiveCodec(cachegen.pack, cachegen.unpack, exact=False),
}
"""By the name under which a packed frame states them."""


class PackedHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands before the stored bytes."""

    stored: str
    """The archive codec."""
    stored_bytes: int
    xxh3: str
    """Hex xxh3-128 of the stored bytes."""
    header: PageHeader


def archive_codec(name: str) -> ArchiveCodec:
    """The archive codec of that name; `UnknownName` lists the known ones."""
    try:
        return ARCHIVE_CODECS[name]
    except KeyError:
        raise UnknownName("archive codec", name, tuple(ARCHIVE_CODECS)) from None


def encode_packed(page: Page, stored: str) -> tuple[bytes, bytes]:
    """(everything before the stored bytes, the stored bytes) of a sealed page."""
    header, chosen = page.header, archive_codec(stored)
    form, tokens = header.form, header.span.tokens
    if not chosen.exact and not _may_lose(header, stored):
        raise ValueError(f"{page_name(header)} does not say that it went through {stored}")
    data = chosen.pack(form, tokens, page.payload)
    if not chosen.exact:
        header = resealed(header, chosen.unpack(form, tokens, memoryview(data))).header
    head = PackedHead(
        stored=stored,
        stored_bytes=len(data),
        xxh3=xxhash.xxh3_128_hexdigest(data),
        header=header,
    )
    body = msgspec.msgpack.encode(head)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(body))
    return b"".join((prefix, xxhash.xxh3_128_digest(prefix + body), body)), data


def decode_packed(data: memoryview, stored: str, where: str = "packed frame") -> Page:
    """The page in a packed frame; header, both xxh3 verified, plane sums not yet.

    `data` is exactly one packed frame of this archive codec. Raises `CorruptPage` naming `where`.
    """
    head, packed = _decode_head(data, where)
    header = head.header
    if head.stored != stored:
        raise CorruptPage(f"{where}: stored as {head.stored!r}, wanted {stored!r}")
    if packed.nbytes != head.stored_bytes:
        raise CorruptPage(f"{where}: {packed.nbytes} bytes, its head says {head.stored_bytes}")
    if xxhash.xxh3_128_hexdigest(packed) != head.xxh3:
        raise CorruptPage(f"{where}: the xxh3-128 of its stored bytes differs from the head's")
    verify_header(header)
    if not archive_codec(stored).exact and not _may_lose(header, stored):
        raise CorruptPage(
            f"{where}: {page_name(header)} is in codec {header.form.codec} and "
            f"{', '.join(header.origin.provenance)}, which no page stored as {stored} is"
        )
    if header.payload_bytes > MAX_PAYLOAD_BYTES:
        raise CorruptPage(
            f"{where}: {page_name(header)} would become {header.payload_bytes} bytes, at most "
            f"{MAX_PAYLOAD_BYTES} are unpacked"
        )
    try:
        payload = archive_codec(stored).unpack(header.form, header.span.tokens, packed)
    except CorruptPage as error:
        raise CorruptPage(f"{where}: {error}") from None
    verify_payload(header, payload)
    return Page(header, payload)


def _may_lose(header: PageHeader, stored: str) -> bool:
    """It is in the codec that a lossy archive codec takes, and claims no more than comes out."""
    return header.form.codec == "raw" and decoded_from(stored) in header.origin.provenance


def _decode_head(data: memoryview, where: str) -> tuple[PackedHead, memoryview]:
    """The head, and the stored bytes behind it."""
    if data.nbytes < _HEAD_BYTES:
        raise CorruptPage(f"{where}: {data.nbytes} bytes, too short for a packed frame")
    magic, version, size = _PREFIX.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise CorruptPage(
            f"{where}: no packed frame of version {VERSION} (it begins with {magic.hex()}, "
            f"version {version})"
        )
    body = data[_HEAD_BYTES : _HEAD_BYTES + size]
    digest = xxhash.xxh3_128(data[: _PREFIX.size])
    digest.update(body)
    if body.nbytes != size or digest.digest() != bytes(data[_PREFIX.size : _HEAD_BYTES]):
        raise CorruptPage(f"{where}: the head's checksum differs")
    try:
        head = msgspec.msgpack.decode(body, type=PackedHead)
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptPage(f"{where}: the head cannot be read: {error}") from None
    return head, data[_HEAD_BYTES + size :]
