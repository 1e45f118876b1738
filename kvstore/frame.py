"""A page as it lies on disk: it describes itself and says when it is damaged.

    0   magic 8 bytes | version u32 | header bytes u32 | checksum 16 bytes      (little-endian)
    32  header (msgpack of `PageHeader`), zeros up to a multiple of 4 KiB
    ..  payload, zeros up to a multiple of 4 KiB

checksum = xxh3-128 of the 16 bytes before it and the header; the header holds the payload's
xxh3-128. Zeros are checked: a frame has one encoding, and any other byte is damage.
"""

from __future__ import annotations

import struct

import msgspec
import xxhash

from ringspan.errors import CorruptPage
from ringspan.kvstore.page import Page, PageHeader, verify_header, verify_payload

MAGIC = b"RSPANPG\n"
VERSION = 1
ALIGN = 4096

_PREFIX = struct.Struct("<8sII")
_HEAD_BYTES = _PREFIX.size + 16
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PageHeader).decode


def aligned(size_bytes: int) -> int:
    """The next multiple of ALIGN."""
    return -(-size_bytes // ALIGN) * ALIGN


def is_zero(data: memoryview) -> bool:
    """Every byte is 0; for the few bytes of a padding."""
    return bytes(data) == bytes(len(data))


def encode_head(header: PageHeader) -> bytes:
    """Everything before the payload, padded to ALIGN."""
    data = _encode(header)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(data))
    checksum = xxhash.xxh3_128_digest(prefix + data)
    head = prefix + checksum + data
    return head.ljust(aligned(len(head)), b"\0")


def encode_frame(page: Page) -> bytes:
    """The whole frame in one piece; `SegmentWriter` writes its parts without this copy."""
    padding = bytes(aligned(page.payload.nbytes) - page.payload.nbytes)
    return b"".join((encode_head(page.header), page.payload, padding))


def decode_head(data: memoryview, where: str = "frame") -> tuple[PageHeader, int]:
    """(header, bytes before the payload) of a frame that begins with `data`.

    Raises `CorruptPage` that names `where` for anything that `encode_head` does not write.
    """
    if data.nbytes < _HEAD_BYTES:
        raise CorruptPage(f"{where}: {data.nbytes} bytes, too short for a page's frame")
    magic, version, size = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise CorruptPage(f"{where}: no frame begins here (its first 8 bytes are {magic.hex()})")
    if version != VERSION:
        raise CorruptPage(f"{where}: frame version {version}, this version reads {VERSION}")
    end = _HEAD_BYTES + size
    if data.nbytes < aligned(end):
        raise CorruptPage(f"{where}: a header of {size} bytes reaches beyond the frame's end")
    body = data[_HEAD_BYTES:end]
    digest = xxhash.xxh3_128(data[: _PREFIX.size])
    digest.update(body)
    if digest.digest() != bytes(data[_PREFIX.size : _HEAD_BYTES]):
        raise CorruptPage(f"{where}: the header's checksum differs")
    if not is_zero(data[end : aligned(end)]):
        raise CorruptPage(f"{where}: bytes behind the header are not zero")
    try:
        header = _decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptPage(f"{where}: the header cannot be read: {error}") from None
    verify_header(header)
    return header, aligned(end)


def decode_frame(data: memoryview, where: str = "frame") -> Page:
    """The page in a frame, payload in place; header and xxh3 verified, plane sums not yet.

    `data` is exactly one frame. Raises `CorruptPage`.
    """
    header, head_bytes = decode_head(data, where)
    end = head_bytes + header.payload_bytes
    if data.nbytes != aligned(end):
        raise CorruptPage(
            f"{where}: {data.nbytes} bytes for a frame that should have {aligned(end)}"
        )
    payload = data[head_bytes:end]
    verify_payload(header, payload)
    if not is_zero(data[end:]):
        raise CorruptPage(f"{where}: bytes behind the payload are not zero")
    return Page(header, payload)
