"""What the directory's journal says, one record per change, and the values in it.

The state of a directory is what its records make of an empty one, in order (`catalog.Catalog`).
No record holds a time: a journal that is replayed means the same whenever that is.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec


class Tier(StrEnum):
    """Where a page lies, nearest to a GPU first."""

    GPU = "gpu"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


class Shelf(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One place of one holder where pages of one form lie together.

    A holder that keeps contexts whole (a gang, a store folder) has a shelf for each context, of
    which it may drop one and keep another with the same pages; one that keeps pages by their keys
    has a shelf for each form.
    """

    tier: Tier
    place: str
    """A context id, or empty for a holder that keeps pages by key."""
    form: str
    """`form_id` of the pages' encoding: equal ids, equal layout of bytes."""
    fidelity: int
    """Of the pages: larger is better, equal to the original is largest."""


class PageEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A page on a shelf."""

    key: str
    """Hex of the chained BLAKE3 key."""
    size_bytes: int
    checksum: str = ""
    """Hex xxh3-128 of the payload, where the holder knows it."""


class Record(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of all records."""


class Joined(Record, frozen=True):
    """A holder begins its incarnation `epoch`: all that an earlier one had is gone."""

    holder: str
    epoch: int
    silence_s: float = 0.0
    """Not heard for so long it counts as dead; 0: never."""


class Left(Record, frozen=True):
    """The incarnation has ended, by itself or by death. Of no holder: epochs go on from there."""

    holder: str
    epoch: int


class Declared(Record, frozen=True):
    """A context exists by name. Its pages are those of `parent`'s chain, then `keys`."""

    namespace: str
    context_id: str
    num_tokens: int
    parent: str
    """The last of its pages that was known already; empty: none."""
    keys: tuple[str, ...]


class Staged(Record, frozen=True):
    """Pages were written by the write `write` of a holder; nobody may see them yet."""

    holder: str
    epoch: int
    write: str
    namespace: str
    shelf: Shelf
    pages: tuple[PageEntry, ...]


class Published(Record, frozen=True):
    """All that the write has staged is visible from now on."""

    holder: str
    epoch: int
    write: str


class Aborted(Record, frozen=True):
    """The write is given up; what it staged is gone."""

    holder: str
    epoch: int
    write: str


class Withdrawn(Record, frozen=True):
    """Copies are no more: pages `keys` of the shelf, or all of it where there are none."""

    holder: str
    epoch: int
    namespace: str
    shelf: Shelf
    keys: tuple[str, ...] = ()


class Referred(Record, frozen=True):
    """`owner` needs the context, until it is released or the owner's incarnation ends."""

    owner: str
    epoch: int
    ref: str
    namespace: str
    context_id: str
    holder: str = ""
    """The copies that must stay are this holder's at `place`; empty: any copy will do."""
    place: str = ""


class Released(Record, frozen=True):
    """The reference `ref` of `owner` is over."""

    owner: str
    epoch: int
    ref: str


class Forgotten(Record, frozen=True):
    """The context is not known any more, nor the pages that no other one has."""

    namespace: str
    context_id: str


AnyRecord: TypeAlias = (
    Joined
    | Left
    | Declared
    | Staged
    | Published
    | Aborted
    | Withdrawn
    | Referred
    | Released
    | Forgotten
)

encode_record = msgspec.msgpack.Encoder().encode
decode_record = msgspec.msgpack.Decoder(AnyRecord).decode
