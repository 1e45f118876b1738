"""Read a whole stored context and say what is wrong with it, page by page."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from ringspan.errors import CorruptPage, StoreError
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.index_copy import check_index_copy, check_locked_tokens
from ringspan.kvstore.journal import journal_problems
from ringspan.kvstore.manifest import cipher_for, read_manifest
from ringspan.kvstore.page import Page, verify_payload, verify_sums
from ringspan.kvstore.parity import FILE as PARITY
from ringspan.kvstore.parity import ParityRows, check_parity, parity_rows
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.side_file import side_file_problems
from ringspan.kvstore.supply import NO_QUARANTINE, Supply
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.placement import FILE as TIERS
from ringspan.kvstore.tiers.placement import Placement, TierName, read_placement, reader_of
from ringspan.kvstore.tokens import TOKENS, read_tokens
from ringspan.types import Span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.manifest import Manifest

READERS = min(8, os.cpu_count() or 1)
"""Threads; each reads, hashes and sums a page at a time, at 1 GB/s or less."""

Progress = Callable[[int, int], None]
"""(pages read, pages in all)."""


class BadPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page that may not be used."""

    key: str
    span: Span
    tier: TierName
    """Whose copy it is."""
    segment: str
    offset: int
    what: str


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` read and found."""

    context_id: str
    num_pages: int
    payload_bytes: int
    problems: tuple[str, ...]
    """With the manifest or the tokens: the context as a whole cannot be used."""
    side_problems: tuple[str, ...] = ()
    """With the copy of the index, `tiers.json`, `parity.json`: a repair writes them anew."""
    notes: tuple[str, ...] = ()
    """With journals (`*.journal`) in the store's folder: no page is lost by it."""
    locked: bool = False
    """A tenant's, not known here: keys were not made again from tokens, nothing was decrypted."""
    bad_pages: tuple[BadPage, ...]
    bad_parity: tuple[str, ...] = ()
    """A line about each piece of parity that is damaged, and about pages that none covers."""
    parity_rows: int = 0
    """Pages of parity to a stripe."""
    elapsed_s: float

    @property
    def ok(self) -> bool:
        found = (self.problems, self.side_problems, self.bad_pages, self.bad_parity)
        return not any(found)


def verify(
    folder: Path,
    progress: Progress | None = None,
    readers: int = 2,
    *,
    namespaces: Sequence[bytes] = (),
) -> VerifyReport:
    """Read and verify every frame of the context in `folder`, its tokens and its key chain.

    A tenant's context whose namespace is none of these is verified as it is stored: rot is found
    without any secret. Otherwise what is encrypted is decrypted too. Raises nothing: all damage
    goes into the report.
    """
    began = time.perf_counter()
    problems: list[str] = []
    bad: list[BadPage] = []
    bad_parity: list[str] = []
    side = side_file_problems(folder / TIERS, Placement)
    side += side_file_problems(folder / PARITY, ParityRows)
    rows = 0
    locked = False
    records: tuple[PageRecord, ...] = ()
    try:
        manifest = read_manifest(folder, namespaces)
        records, locked = manifest.pages, manifest.locked
    except StoreError as error:
        problems.append(str(error))
    else:
        problems += _token_problems(folder, manifest)
        side += check_index_copy(folder, manifest)
        try:
            bad = _verify_pages(folder, manifest, progress, readers)
        except StoreError as error:  # nothing says where the pages are
            problems.append(str(error))
        try:
            rows = parity_rows(folder)
            bad_parity = check_parity(folder, records)
        except StoreError as error:
            bad_parity.append(str(error))
    return VerifyReport(
        context_id=folder.name,
        num_pages=len(records),
        payload_bytes=sum(record.payload_bytes for record in records),
        problems=tuple(problems),
        side_problems=tuple(side),
        notes=tuple(_journal_notes(folder.parent.parent)),
        locked=locked,
        bad_pages=tuple(bad),
        bad_parity=tuple(bad_parity),
        parity_rows=rows,
        elapsed_s=time.perf_counter() - began,
    )


def _journal_notes(root: Path) -> list[str]:
    return [line for path in sorted(root.glob("*.journal")) for line in journal_problems(path)]


def _token_problems(folder: Path, manifest: Manifest) -> Sequence[str]:
    if manifest.locked:
        return check_locked_tokens(folder, manifest)
    try:
        read_tokens(folder / TOKENS, manifest)
    except StoreError as error:
        return (str(error),)
    return ()


def _verify_pages(
    folder: Path, manifest: Manifest, progress: Progress | None, readers: int
) -> list[BadPage]:
    """Of every tier that holds the context; each copy of a page counts by itself."""
    bad: list[BadPage] = []
    pending: deque[tuple[PageRecord, TierName, Future[str | None]]] = deque()
    names = read_placement(folder).tiers
    done, total = 0, len(manifest.pages) * len(names)
    with ThreadPoolExecutor(readers, "verify") as pool, ExitStack() as open_tiers:
        jobs = []
        for name in names:
            reader = reader_of(name, folder, manifest, manifest.pages)
            supply = Supply(manifest, [reader], NO_QUARANTINE, StoreCounters())
            open_tiers.enter_context(supply)
            jobs += [(name, supply, record) for record in manifest.pages]
        for job in (*jobs, None):
            while pending and (job is None or len(pending) > 2 * readers):
                read, tier, future = pending.popleft()
                what = future.result()
                if what is not None:
                    bad.append(_bad_page(read, tier, what))
                done += 1
                if progress is not None:
                    progress(done, total)
            if job is not None:
                tier, supply, record = job
                pending.append((record, tier, pool.submit(_problem, supply, record)))
    return bad


def _problem(supply: Supply, record: PageRecord) -> str | None:
    room = memoryview(bytearray(aligned(record.payload_bytes)))
    try:
        header = supply.stored_page(record, room).header
        form, payload = header.form, room[: record.payload_bytes]
        verify_sums(header, payload_sums(payload, form.specs, form.num_layers, record.span.tokens))
        if header.sealed is not None and not supply.manifest.locked:
            _verify_opened(supply.manifest, Page(header, payload))
    except (CorruptPage, StoreError) as error:
        return str(error)
    return None


def _verify_opened(manifest: Manifest, page: Page) -> None:
    """It is the page that was encrypted. Decrypted in its place. Raises `CorruptPage`."""
    cipher = cipher_for(manifest)
    assert cipher is not None
    plain = cipher.open_header(page.header)
    cipher.open_payload(page.header, page.payload)
    verify_payload(plain, page.payload)


def _bad_page(record: PageRecord, tier: TierName, what: str) -> BadPage:
    return BadPage(
        key=record.key,
        span=record.span,
        tier=tier,
        segment=record.segment,
        offset=record.offset,
        what=what,
    )
