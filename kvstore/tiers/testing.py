"""Conformance of a tier: what every implementation must do. For tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringspan.errors import CorruptPage, StoreError
from ringspan.kvstore.frame import aligned, encode_head
from ringspan.kvstore.segment import record_of
from ringspan.kvstore.tiers.base import PageMissing, form_id, page_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.page import Page
    from ringspan.kvstore.tiers.base import Reader, Tier


def records_of(pages: Sequence[Page]) -> list[PageRecord]:
    """Records that name the pages and no place."""
    return [
        record_of(
            page.header,
            "elsewhere.seg",
            0,
            len(encode_head(page.header)) + aligned(page.payload.nbytes),
        )
        for page in pages
    ]


def check_tier(make: Callable[[], Tier], pages: Sequence[Page]) -> None:
    """AssertionError that says which promise of `base.Tier` is broken. make: a tier over the same
    storage each time, empty at first. pages: at least three, of one form."""
    made: list[Tier] = []

    def again() -> Tier:
        made.append(make())
        return made[-1]

    try:
        _check_tier(again, pages)
    finally:
        for tier in made:
            tier.close()


def _check_tier(make: Callable[[], Tier], pages: Sequence[Page]) -> None:
    tier = make()
    names = [page_id(page.header) for page in pages]
    form = form_id(pages[0].header.form, pages[0].header.origin)
    records = records_of(pages)
    assert tier.holds(names) == [False] * len(pages), "an empty tier holds pages"
    tier.put(pages[:-1])
    used = tier.stat()
    assert used.pages == len(pages) - 1, f"{used.pages} pages of {len(pages) - 1} put"
    tier.put(pages)  # only the last is new
    assert tier.stat().pages == len(pages), "a page put twice is kept twice, or lost"
    for other in (tier, make()):
        assert other.holds(names) == [True] * len(pages), "what was put is not held"
        reader = other.reading(form, records)
        for page, record in zip(pages, records, strict=True):
            _check_page(reader, page, record)
        reader.close()
        reader.close()
    reader = tier.reading("0" * 16, records)
    _wants_missing(reader, records[0], "another form's page is given")
    reader.close()
    tier.delete([names[0], names[0]])
    assert tier.holds(names) == [False] + [True] * (len(pages) - 1), "delete missed its page"
    reader = make().reading(form, records)
    _wants_missing(reader, records[0], "a deleted page is given")
    _check_page(reader, pages[1], records[1])
    reader.close()
    tier.delete(names)
    assert tier.stat()[:2] == (0, 0), "a tier whose pages were all deleted is not empty"
    tier.put(pages)
    assert make().holds(names) == [True] * len(pages), "a page cannot be put again"


def _check_page(reader: Reader, page: Page, record: PageRecord) -> None:
    assert reader.head(record) == page.header, "another header"
    room = memoryview(bytearray(b"\xff" * aligned(page.payload.nbytes)))
    reader.payload(record, room)
    assert room[: page.payload.nbytes] == page.payload, "another payload"
    assert not any(room[page.payload.nbytes :]), "what lies behind the payload is not zero"
    part = memoryview(bytearray(100))
    reader.payload(record, part, 50)
    assert part == page.payload[50:150], "another part of the payload"


def _wants_missing(reader: Reader, record: PageRecord, why: str) -> None:
    try:
        reader.head(record)
    except PageMissing:
        return
    except (CorruptPage, StoreError) as error:
        raise AssertionError(f"{why}: {error}") from None
    raise AssertionError(why)
