"""What ranks and a node's host store say to each other over a unix socket.

    length (u32, of what follows)  msgpack  crc32 (u32) of the msgpack              little-endian

Payloads never go this way, they lie in slabs that both sides map. Every request has one reply. A
place with a bit flipped would be another page's: a message whose sum differs ends the connection.
"""

from __future__ import annotations

import socket
import struct
import zlib
from typing import TypeAlias

import msgspec

from ringspan.errors import StoreError
from ringspan.kvstore.tiers.ids import PageId

LENGTH = struct.Struct("<I")
_SUM = struct.Struct("<I")
MOST_BYTES = 64 << 20
"""Of one message: what is longer was not written by us."""
SOCKET = "store.sock"
LOCK = "store.lock"


class Wire(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of the messages."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """One slot of a slab file."""

    slab: str
    offset: int
    frame_bytes: int
    generation: int
    """Another one for every page that the slot takes."""


class Reserve(Wire, frozen=True, kw_only=True):
    """rank -> store: room for frames. They are visible once published; never, if the connection
    ends before."""

    pages: tuple[PageId, ...]
    frame_bytes: tuple[int, ...]


class Publish(Wire, frozen=True, kw_only=True):
    """rank -> store: the frames lie in their places, whole."""

    places: tuple[Place, ...]


class Lookup(Wire, frozen=True, kw_only=True):
    """rank -> store: where are these? They stay there until the lease is released or the
    connection ends."""

    pages: tuple[PageId, ...]


class Release(Wire, frozen=True, kw_only=True):
    lease: int


class Holds(Wire, frozen=True, kw_only=True):
    pages: tuple[PageId, ...]


class Delete(Wire, frozen=True, kw_only=True):
    pages: tuple[PageId, ...]


class Stat(Wire, frozen=True, kw_only=True):
    pass


class Stop(Wire, frozen=True, kw_only=True):
    """anyone -> store: end; `keep` leaves the slabs for the next one."""

    keep: bool


class Places(Wire, frozen=True, kw_only=True):
    """store -> rank. None: the page is held already (Reserve), or is not there (Lookup)."""

    places: tuple[Place | None, ...]
    lease: int = 0
    gone: tuple[str, ...] = ()
    """Slabs that are no more: unmap them."""


class Answers(Wire, frozen=True, kw_only=True):
    held: tuple[bool, ...]


class Done(Wire, frozen=True, kw_only=True):
    pass


class Stated(Wire, frozen=True, kw_only=True):
    pages: int
    used_bytes: int
    capacity_bytes: int
    pid: int


class Refused(Wire, frozen=True, kw_only=True):
    """store -> rank: what was wanted, found, and what to do."""

    why: str


Request: TypeAlias = Reserve | Publish | Lookup | Release | Holds | Delete | Stat | Stop
Reply: TypeAlias = Places | Answers | Done | Stated | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def framed(message: Wire) -> bytes:
    data = encode(message)
    return LENGTH.pack(len(data) + _SUM.size) + data + _SUM.pack(zlib.crc32(data))


def checked(body: bytes) -> bytes:
    """The msgpack of what follows a length. Raises ConnectionError where its sum differs."""
    data = body[: -_SUM.size]
    if len(body) < _SUM.size or _SUM.unpack(body[len(data) :]) != (zlib.crc32(data),):
        raise ConnectionError("a message whose checksum differs")
    return data


def receive(connection: socket.socket) -> bytes:
    """One message. Raises ConnectionError at the end, OSError, StoreError for no message."""
    (size,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    if size > MOST_BYTES:
        raise StoreError(f"a message of {size} bytes from the host store: not one of ours")
    return checked(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError("the host store closed the connection")
        data += more
    return bytes(data)
