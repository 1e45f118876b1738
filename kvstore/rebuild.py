"""Road `parity`: a page that no tier has whole, made again from its stripe.

To whoever reads, one more road, asked after all tiers. What it gives is bit for bit what was
sealed: digest and plane sums are compared with those that the manifest and the stripe state. A
stripe's other pages come by the other roads, verified; those that cannot be had count as lost too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ringspan.errors import CorruptPage, RingspanError, StoreError
from ringspan.kvstore.erasure import rebuild
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.page import Page, payload_digest, seal, verify_sums
from ringspan.kvstore.parity import parity_rows, read_parity, scan_parity
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.tiers.base import PageMissing
from ringspan.kvstore.tiers.counters import REPAIRED

if TYPE_CHECKING:
    from pathlib import Path

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.page import PageHeader
    from ringspan.kvstore.parity import ParityFrame, ParityMember
    from ringspan.kvstore.supply import Supply

PARITY = "parity"
KEPT_BYTES = 256 << 20
"""Of pages made again that are kept for whoever reads them in parts."""

_Stripe = dict[int, "ParityFrame"]
"""Frames of one stripe by row."""


class ParityReader:
    """A `tiers.base.Reader` of the context in `folder`; `others`: its other roads, not closed here.

    Any number of threads may read.
    """

    road = PARITY

    def __init__(self, folder: Path, others: Supply) -> None:
        self._folder, self._others = folder, others
        self._records = {record.key: record for record in others.manifest.pages}
        self._keys = others.manifest.keys
        self._stripes: dict[str, list[_Stripe]] | None = None
        self._made: OrderedDict[str, Page] = OrderedDict()
        self._counted: set[str] = set()
        self._lock = threading.Lock()

    def where(self, record: PageRecord) -> str:
        return f"parity of {self._folder.name} for page {record.key[:16]}"

    def place(self, record: PageRecord) -> str:
        return f"{self._folder} {record.xxh3}"

    def head(self, record: PageRecord) -> PageHeader:
        return self.page(record).header

    def payload(self, record: PageRecord, room: memoryview, first: int = 0) -> None:
        data = self.page(record).payload[first : first + room.nbytes]
        room[: data.nbytes] = data
        room[data.nbytes :] = bytes(room.nbytes - data.nbytes)

    def page(self, record: PageRecord) -> Page:
        """As it was sealed. `PageMissing` where there is no parity for it, `StoreError` where too
        much of its stripe is lost."""
        with self._lock:
            made = self._made.get(record.key)
            if made is not None:
                self._made.move_to_end(record.key)
                return made
        page = self._make(record)
        with self._lock:
            self._made[record.key] = page
            used = sum(kept.payload.nbytes for kept in self._made.values())
            while used > KEPT_BYTES and len(self._made) > 1:
                used -= self._made.popitem(last=False)[1].payload.nbytes
            if record.key not in self._counted:
                self._counted.add(record.key)
                self._others.counters.add(REPAIRED, PARITY)
        return page

    def close(self) -> None:
        pass

    def _make(self, record: PageRecord) -> Page:
        failures: list[RingspanError] = []
        for stripe in self._stripes_of(record):
            try:
                return self._from_stripe(stripe, record)
            except (CorruptPage, StoreError) as error:
                failures.append(error)
        if not failures:
            raise PageMissing(f"{self.where(record)}: there is none")
        raise StoreError("; ".join(map(str, failures)))

    def _stripes_of(self, record: PageRecord) -> list[_Stripe]:
        with self._lock:
            if self._stripes is None:
                self._stripes = _by_key(self._folder)
            return self._stripes.get(record.key, [])

    def _from_stripe(self, stripe: _Stripe, record: PageRecord) -> Page:
        members = next(iter(stripe.values())).header.members
        at = next(i for i, member in enumerate(members) if member.key == record.key)
        if members[at].xxh3 != record.xxh3:
            raise StoreError(f"{self.where(record)}: it was made before the page was sealed anew")
        rows = self._rows(stripe)
        present: dict[int, np.ndarray] = {}
        lost = [at]
        for index, member in enumerate(members):
            if index != at:
                data = self._member(member)
                if data is None:
                    lost.append(index)
                else:
                    present[index] = data
        if len(lost) > len(rows):
            raise StoreError(
                f"{self.where(record)}: {len(lost)} of {len(members)} pages of its stripe are "
                f"lost, {len(rows)} of {len(stripe)} rows of parity are whole"
            )
        data = rebuild(tuple(sorted(lost)), present, rows)[at]
        return self._sealed(record, members[at], data[: record.payload_bytes])

    def _rows(self, stripe: _Stripe) -> dict[int, np.ndarray]:
        """Those that are whole."""
        found: dict[int, np.ndarray] = {}
        for row, frame in stripe.items():
            try:
                found[row] = read_parity(frame)
            except (CorruptPage, StoreError):
                continue  # too few of them is what is told
        return found

    def _member(self, member: ParityMember) -> np.ndarray | None:
        """Its payload, verified; None where it cannot be had as it was."""
        record = self._records.get(member.key)
        if record is None or record.xxh3 != member.xxh3:
            return None
        room = memoryview(bytearray(aligned(record.payload_bytes)))
        try:
            self._others.stored_page(record, room)
        except (CorruptPage, StoreError):
            return None
        return np.frombuffer(room, dtype=np.uint8)[: record.payload_bytes]

    def _sealed(self, record: PageRecord, member: ParityMember, data: np.ndarray) -> Page:
        payload = np.ascontiguousarray(data).data
        if payload_digest(payload) != record.xxh3:
            raise CorruptPage(f"{self.where(record)}: what it gives has another xxh3-128")
        manifest = self._others.manifest
        form, tokens = manifest.form, record.span.tokens
        sums = payload_sums(payload, form.specs, form.num_layers, tokens)
        origin = msgspec.structs.replace(manifest.origin, provenance=member.provenance)
        page = seal(form, origin, record.span, self._keys, sums, payload)
        if member.sealed is not None:
            page = Page(msgspec.structs.replace(page.header, sealed=member.sealed), payload)
        verify_sums(page.header, member.plane_sums)
        return page


def _by_key(folder: Path) -> dict[str, list[_Stripe]]:
    """Stripes that each page belongs to; frames of the same pages are one stripe."""
    joined: dict[tuple[tuple[str, str], ...], _Stripe] = {}
    for frame in scan_parity(folder)[0]:
        if frame.header.context_id == folder.name:
            name = tuple((member.key, member.xxh3) for member in frame.header.members)
            joined.setdefault(name, {})[frame.header.row] = frame
    found: dict[str, list[_Stripe]] = defaultdict(list)
    for name, stripe in joined.items():
        for key, _ in name:
            found[key].append(stripe)
    return dict(found)


def has_parity(folder: Path) -> bool:
    """Whether the road is worth asking."""
    try:
        return parity_rows(folder) > 0
    except StoreError:
        return True  # its frames say what is there
