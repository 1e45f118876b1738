"""What a tier is: a place where frames of pages lie, found by page key and form.

    put     frames go in; each is visible when all of it is there, or never
    reading frames come out through a `Reader`, which gives bytes and promises nothing about them:
            whoever reads verifies (`kvstore.supply`), whatever road the bytes came by
    delete  frames go away; what is being read stays until it is read

A page may lie in several tiers and in several encodings: `form_id` tells these apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import msgspec
import xxhash

from ringspan.errors import StoreError
from ringspan.kvstore.page import as_sealed
from ringspan.kvstore.tiers.ids import PageId as PageId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.page import Origin, Page, PageForm, PageHeader


class TierStat(NamedTuple):
    """How much a tier holds, and may hold (None: as much as there is room)."""

    pages: int
    used_bytes: int
    capacity_bytes: int | None


class PageMissing(StoreError):
    """The tier does not hold the page (any more): ask the next one."""


class Reader(Protocol):
    """Reads frames of one form from one tier. Any number of threads may read at once."""

    @property
    def road(self) -> str:
        """Which tier, in counters and messages: `host`, `disk`, `remote`."""

    def where(self, record: PageRecord) -> str:
        """How messages name the frame: file and byte, say."""

    def place(self, record: PageRecord) -> str:
        """Names these very bytes in the tier: another once they are written anew."""

    def head(self, record: PageRecord) -> PageHeader:
        """The frame's header, its checksum verified. Raises `PageMissing` where the tier does not
        hold the page, `CorruptPage`, `StoreError`."""

    def payload(self, record: PageRecord, room: memoryview, first: int = 0) -> None:
        """Bytes of the payload from `first` on to `room`, with the zeros behind it where the room
        reaches there; not verified."""

    def close(self) -> None:
        """May be repeated."""


@runtime_checkable
class MapsFrames(Protocol):
    """A reader whose frames lie in memory of this process, where a device can fetch them."""

    def mapped(
        self, records: Sequence[PageRecord], pinned: bool, at_once: bool
    ) -> Sequence[torch.Tensor] | None:
        """The payloads where they lie, uint8 [payload bytes], not verified; None unless all are
        there, or where they were to be pinned and are not: pinning pays for what is read often,
        unless it is wanted `at_once`. Valid until the reader is closed."""


class Tier(Protocol):
    """See the module. Raises `StoreError` when the tier cannot be reached or is full."""

    @property
    def name(self) -> str: ...

    def put(self, pages: Iterable[Page]) -> None:
        """Sealed pages. One that the tier holds already is left as it is."""

    def reading(self, form: str, records: Sequence[PageRecord]) -> Reader:
        """A reader of these pages; what is held now is not deleted before it is closed."""

    def holds(self, pages: Iterable[PageId]) -> list[bool]: ...

    def delete(self, pages: Iterable[PageId]) -> None:
        """Those that are not there do no harm."""

    def stat(self) -> TierStat: ...

    def close(self) -> None: ...


def form_id(form: PageForm, origin: Origin) -> str:
    """16 hex characters that differ where two encodings of a page do: another form, other positions
    in K, or computed otherwise. (Model and namespace are in the key; a page that was recomputed
    stands for the one that was lost.)"""
    provenance = as_sealed(origin).provenance
    return xxhash.xxh3_64_hexdigest(msgspec.msgpack.encode((form, origin.rope, provenance)))


def page_id(header: PageHeader) -> PageId:
    return PageId(header.key, form_id(header.form, header.origin))
