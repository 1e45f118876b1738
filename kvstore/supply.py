"""Where the pages of a stored context can be had: roads in order, and the same checks on each.

A page is read by the first road that has it and that passes: header checksum; the header is that of
the record, of this context, behind the right page; xxh3 of the payload; zeros behind it. (The plane
sums follow where the rows lie: `kvstore.transfer`. What a GPU fetches out of mapped memory is
verified by them, in place of xxh3.) A page that fails is quarantined and counted, and the next road
is asked.

Pages of an encrypted context are checked as they are stored, then decrypted, which checks them once
more; `stored_page` gives them as they are stored, for whoever only moves or mends them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from ringspan.errors import CorruptPage, RingspanError, StoreError
from ringspan.kvstore.frame import is_zero
from ringspan.kvstore.manifest import cipher_for
from ringspan.kvstore.page import as_sealed, differences, verify_payload
from ringspan.kvstore.segment_reader import check_record
from ringspan.kvstore.tiers.base import MapsFrames, PageMissing
from ringspan.kvstore.tiers.counters import COUNTERS, QUARANTINED, StoreCounters

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.encryption import PageCipher
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.page import PageHeader
    from ringspan.kvstore.tiers.base import Reader


class Had(NamedTuple):
    """A page that was read and verified on the host."""

    header: PageHeader
    road: int
    """Index of the road it came by."""


class Aside(Protocol):
    """What keeps bad frames aside: `tiers.quarantine.Quarantine`."""

    def holds(self, reader: Reader, record: PageRecord) -> bool: ...

    def keep(self, reader: Reader, record: PageRecord, why: RingspanError) -> None: ...


class _Nothing:
    """For those who only look."""

    def holds(self, reader: Reader, record: PageRecord) -> bool:
        return False

    def keep(self, reader: Reader, record: PageRecord, why: RingspanError) -> None:
        pass


NO_QUARANTINE: Aside = _Nothing()


class Supply:
    """The roads of one context. Any number of threads may read; `close` it at the end."""

    def __init__(
        self,
        manifest: Manifest,
        readers: Sequence[Reader],
        quarantine: Aside,
        counters: StoreCounters = COUNTERS,
    ) -> None:
        self.manifest = manifest
        self.counters = counters
        self._readers = tuple(readers)
        self._quarantine = quarantine
        self._sealed: dict[tuple[str, int], PageHeader] = {}
        """Of an encrypted context, headers as they are stored, by page and road."""

    def page(self, record: PageRecord, room: memoryview, first_road: int = 0) -> Had:
        """The payload and the zeros behind it to `room`, from a road not before `first_road`.

        Raises `CorruptPage` when one road had it and none had it whole, `StoreError` when none had
        it; the text says what was wrong on each. BadInput for an encrypted context whose tenant is
        not known here.
        """
        return self._try(record, first_road, room, self._cipher)

    def stored_page(self, record: PageRecord, room: memoryview, first_road: int = 0) -> Had:
        """As `page`, but of an encrypted context header and payload as they are stored."""
        return self._try(record, first_road, room, None)

    def head(self, record: PageRecord, first_road: int = 0) -> Had:
        """Its header alone; the payload is not looked at."""
        return self._try(record, first_road, None, self._cipher)

    def mapped(
        self, records: Sequence[PageRecord], pinned: bool, at_once: bool
    ) -> Sequence[torch.Tensor] | None:
        """Payloads in the memory of the first road, uint8 [payload bytes], not verified: whoever
        takes them compares plane sums, and reads by `page` what differs. None where the road has
        not all of them in memory, one is in quarantine, or they must be decrypted; see
        `MapsFrames`."""
        reader = self._readers[0] if self._readers else None
        if not isinstance(reader, MapsFrames) or self.manifest.encrypted:
            return None
        if any(self._quarantine.holds(reader, record) for record in records):
            return None
        return reader.mapped(records, pinned, at_once)

    def part(self, record: PageRecord, road: int, room: memoryview, first: int) -> None:
        """Bytes of the payload from `first` on by this road; not verified, but where they are
        decrypted."""
        reader, cipher = self._readers[road], self._cipher
        if cipher is None:
            reader.payload(record, room, first)
            return
        header = self._sealed.get((record.key, road))
        if header is None:
            header = reader.head(record)
        cipher.open_part(header, lambda into, at: reader.payload(record, into, at), room, first)

    @property
    def _cipher(self) -> PageCipher | None:
        return cipher_for(self.manifest)

    @property
    def roads(self) -> tuple[str, ...]:
        """In the order in which they are asked."""
        return tuple(reader.road for reader in self._readers)

    def road(self, index: int) -> str:
        return self._readers[index].road

    def quarantine(self, record: PageRecord, road: int, why: CorruptPage) -> None:
        """What came by this road is not the page: never ask this road for it again."""
        reader = self._readers[road]
        self._quarantine.keep(reader, record, why)
        self.counters.add(QUARANTINED, reader.road)

    def _try(
        self,
        record: PageRecord,
        first_road: int,
        room: memoryview | None,
        cipher: PageCipher | None,
    ) -> Had:
        failures: list[RingspanError] = []
        for road in range(first_road, len(self._readers)):
            reader = self._readers[road]
            if self._quarantine.holds(reader, record):
                failures.append(CorruptPage(f"{reader.where(record)}: is in quarantine"))
                continue
            try:
                header = self._checked(reader, record, room)
                if cipher is not None:
                    self._sealed[record.key, road] = header
                    header = _opened(cipher, header, room)
                return Had(header, road)
            except CorruptPage as error:
                self.quarantine(record, road, error)
                failures.append(error)
            except StoreError as error:
                failures.append(error)
        raise _summed(record, failures)

    def _checked(self, reader: Reader, record: PageRecord, room: memoryview | None) -> PageHeader:
        where = reader.where(record)
        header = reader.head(record)
        check_record(header, record, where)
        check_context(header, self.manifest, where)
        if (header.sealed is not None) != self.manifest.encrypted:
            found, wanted = ("", "not") if header.sealed is not None else ("not ", "")
            raise CorruptPage(f"{where}: is {found}encrypted, its context is {wanted}".rstrip())
        if room is not None:
            reader.payload(record, room)
            verify_payload(header, room[: header.payload_bytes])
            if not is_zero(room[header.payload_bytes :]):
                raise CorruptPage(f"{where}: bytes behind the payload are not zero")
        return header

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> Supply:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def check_context(header: PageHeader, manifest: Manifest, where: str) -> None:
    """The page is this context's: origin, form and the page before it. Raises `CorruptPage`."""
    origin = as_sealed(header.origin)
    if (origin, header.form) != (manifest.origin, manifest.form):
        other = differences(manifest.origin, origin) or differences(manifest.form, header.form)
        raise CorruptPage(f"{where}: is a page of another context: {other}")
    index = header.span.start // manifest.page_tokens
    parent = manifest.pages[index - 1].key if index else header.parent_key
    if header.parent_key != parent:
        raise CorruptPage(f"{where}: its parent is {header.parent_key[:16]}, not {parent[:16]}")


def _opened(cipher: PageCipher, header: PageHeader, room: memoryview | None) -> PageHeader:
    """The plain page's header; its payload to its place."""
    plain = cipher.open_header(header)
    if room is not None:
        cipher.open_payload(header, room[: header.payload_bytes])
    return plain


def _summed(record: PageRecord, failures: Sequence[RingspanError]) -> RingspanError:
    """One error for what every road said; that of the only one as it is."""
    told = [error for error in failures if not isinstance(error, PageMissing)] or list(failures)
    if len(told) == 1:
        return told[0]
    name = f"page {record.key[:16]} [{record.span.start}, {record.span.stop})"
    text = f"{name} cannot be had: " + ("; ".join(map(str, told)) or "no tier is left to ask")
    corrupt = any(isinstance(error, CorruptPage) for error in failures)
    return CorruptPage(text) if corrupt else StoreError(text)
