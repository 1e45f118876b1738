"""A rank's pages on their way to the staging folder, in a prefill that may be taken back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ringspan.cluster.messages import PageRecord
from ringspan.kvstore.encryption import PageCipher
from ringspan.kvstore.folder import segment_path
from ringspan.kvstore.page import Origin
from ringspan.kvstore.segment import store_error
from ringspan.kvstore.segment_reader import scan
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.write_behind import WriteBehind
from ringspan.types import Span


class PageWriter(WriteBehind):
    """A `WriteBehind` that begins behind the shard's first `first_page` pages, which lie in other
    segments."""

    def __init__(
        self,
        shard: ContextShard,
        origin: Origin,
        keys: Sequence[str],
        path: Path,
        first_page: int = 0,
        cipher: PageCipher | None = None,
    ) -> None:
        super().__init__(shard, origin, keys, path, cipher=cipher)
        self._pages = self.first_page = first_page

    @property
    def handed_over(self) -> int:
        """Pages of the shard that are written, or are on their way."""
        return self._pages

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of the segments so far."""
        return tuple(segment.path for segment in self._segments)

    def settle(self, pages: int) -> None:
        """Waits until the shard's first `pages` pages are in their files, where they outlive this
        process. Raises what one of them failed by."""
        left = pages - self.first_page
        for fed in self._fed:
            if left <= 0 or fed.exception() is not None:
                break
            for job in fed.result():
                if left > 0:
                    job.exception()  # waits; what it failed by is raised below, once
                left -= 1
        self._raise_failure()


def new_segment(staging: str, rank: int) -> Path:
    """A name that no segment of this rank has yet: `rank-1.seg`, then `rank-1.again-1.seg`, ...

    A process that was given up but lives on, behind a cut link, keeps writing to files that nobody
    else writes to.
    """
    path, again = segment_path(staging, rank), 0
    while path.exists():
        again += 1
        path = segment_path(staging, rank).with_suffix(f".again-{again}.seg")
    return path


def found_pages(
    staging: str, rank: int, wanted: Sequence[Span], keys: Sequence[str], page_tokens: int
) -> tuple[PageRecord, ...]:
    """What lies in a rank's segments of the pages `wanted`, in this order, up to the first that is
    missing. keys: of all pages of the context. Headers are verified here, payloads when they are
    read."""
    at: dict[str, PageRecord] = {}
    for path in sorted(Path(staging).glob(f"{segment_path('', rank).stem}.*")):
        at.update((record.key, record) for record in scan(path))
    found: list[PageRecord] = []
    for span in wanted:
        record = at.get(keys[span.start // page_tokens])
        if record is None or record.span != span:
            break
        found.append(record)
    return tuple(found)


def pages_of(spans: Sequence[Span], page_tokens: int) -> tuple[Span, ...]:
    """The spans cut into pages."""
    return tuple(
        Span(start, min(start + page_tokens, span.stop))
        for span in spans
        for start in range(span.start, span.stop, page_tokens)
    )


def keep_only(staging: str, records: Sequence[PageRecord], dropped: Sequence[PageRecord]) -> None:
    """Closed segments end behind the last page that is kept of them. Raises StoreError."""
    ends = {record.segment: 0 for record in dropped}
    for record in records:
        end = record.offset + record.frame_bytes
        ends[record.segment] = max(end, ends.get(record.segment, 0))
    for segment in {record.segment for record in dropped}:
        path = Path(staging) / segment
        try:
            os.truncate(path, ends[segment]) if ends[segment] else path.unlink()
        except OSError as error:
            raise store_error(error, "cannot shorten", path) from None


def remove_segments(staging: str, rank: int, but: Sequence[Path]) -> None:
    """A lost rank's segments, once its pages are written anew."""
    for path in Path(staging).glob(f"{segment_path('', rank).stem}.*"):
        if path not in but:
            path.unlink(missing_ok=True)
