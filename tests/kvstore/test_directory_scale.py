"""A million tokens in a directory: 8,192 pages, hashed once, matched among many contexts.

The times are written to the test's record (`pytest -rP`), for a reader; no machine is held to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringspan.kvstore.catalog import Space
from ringspan.kvstore.directory import Directory, open_directory
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.prefixes import known_pages
from ringspan.kvstore.records import PageEntry, Shelf, Tier

TOKENS = np.random.default_rng(1).integers(0, 128_000, size=1 << 20, dtype=np.int32)
SPACE = "ten"


def timed(what: str, act: Callable[[], Any], repeats: int = 5) -> Any:
    best_s, found = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        found = act()
        best_s = min(best_s, time.perf_counter() - began)
    print(f"{what}: {1e3 * best_s:.2f} ms (best of {repeats})")  # noqa: T201  # the record
    return found


def test_a_million_tokens_are_matched_by_their_keys(tmp_path: Path) -> None:
    directory = open_directory(str(tmp_path / "journal"))
    gang, disk = directory.join("gang"), directory.join("disk")
    keys = timed("hash 2^20 tokens", lambda: page_keys("0a" * 32, PUBLIC_NAMESPACE, TOKENS, 128), 3)
    assert len(keys) == 8192

    def put(holder: str, epoch: int, name: str, pages: list[str], tier: Tier) -> None:
        at = Shelf(tier, name, "raw", 64)
        entries = [PageEntry(key, 1 << 24, key[:32]) for key in pages]
        directory.declare(SPACE, name, pages, 128 * len(pages), owner=holder, epoch=epoch, ref=name)
        directory.stage(holder, epoch, name, SPACE, at, entries)
        directory.publish(holder, epoch, name, len(pages))
        directory.release(holder, epoch, name)

    timed(
        "publish 8,192 pages, journalled and synced",
        lambda: put("gang", gang, "whole", keys, Tier.GPU),
        1,
    )
    for number in range(15):  # documents that part from it at some page
        own = page_keys("0a" * 32, b"%d" % number, TOKENS[: 64 * 128], 128)
        put("disk", disk, f"other {number}", keys[: 500 * number] + own, Tier.DISK)
    question = [*keys[:8000], *(f"{page:064x}" for page in range(192))]
    known = timed("pages known", lambda: directory.known(SPACE, question))
    rows = timed(
        "longest rows of 16 contexts", lambda: directory.leading(SPACE, question, form="raw")
    )
    copies = timed(
        "best copy of each page", lambda: directory.locate(SPACE, question, here=["gang"])
    )
    miss = timed("a miss", lambda: directory.leading("nobody", question))
    assert known == 8000
    assert (rows[0].holder, rows[0].pages) == ("gang", 8000)
    assert [row.pages for row in rows[1:]] == [500 * n for n in range(14, 0, -1)]
    assert [copy is not None for copy in copies] == [True] * 8000 + [False] * 192
    assert miss == []
    state = directory.records()
    directory.close()
    again = timed("replay", lambda: open_directory(str(tmp_path / "journal")), 1)
    assert again.records() == state
    again.close()


def test_bisection_looks_at_few_pages() -> None:
    looked: list[str] = []

    class Listening(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            looked.append(str(key))
            return super().__contains__(key)

    keys = [f"{page:064x}" for page in range(8192)]
    space = Space(pages=Listening(dict.fromkeys(keys[:5000])))
    assert known_pages(space, keys) == 5000
    assert len(looked) <= 14


def test_a_miss_touches_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a look-up reads depends on the asker's own namespace alone, and so does its time."""
    keys = [f"{page:064x}" for page in range(100)]
    directory = Directory()
    epoch = directory.join("gang")
    directory.declare("other", "theirs", keys, 12800, owner="gang", epoch=epoch, ref="w")
    theirs = directory._catalog.spaces["other"]
    monkeypatch.setattr(theirs, "pages", None)  # whoever reads them fails
    monkeypatch.setattr(theirs, "contexts", None)
    assert directory.known("mine", keys) == 0
    assert directory.leading("mine", keys) == []
    assert directory.locate("mine", keys) == [None] * 100
    assert directory.contexts("mine") == ()
    assert directory.in_use("mine", keys[0]) == 0
    assert directory.forget_lost("mine") == ()
    assert "mine" not in directory._catalog.spaces
