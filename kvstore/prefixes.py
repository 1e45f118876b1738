"""Which pages of a new sequence are known already, and where the best copies of them lie.

Keys are chained: a key says that all tokens before it are equal too. So the known pages of a list
of keys are its first ones, and their number is found by bisection, with 14 look-ups for the 8,192
pages of a million tokens. The sequence is hashed once, by whoever asks; only keys come here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from ringspan.kvstore.catalog import HeldShelf, Space
from ringspan.kvstore.records import Shelf, Tier


class Copy(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """directory -> reader: a copy of a page, as of now; `Directory.lease` makes it stay."""

    key: str
    holder: str
    epoch: int
    shelf: Shelf
    size_bytes: int
    checksum: str


class Leading(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """directory -> reader: a shelf that has the first `pages` pages of a sequence."""

    pages: int
    holder: str
    epoch: int
    shelf: Shelf


def known_pages(space: Space, keys: Sequence[str]) -> int:
    """How many of the first keys are some context's."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if keys[middle - 1] in space.pages else (low, middle - 1)
    return low


def leading(space: Space, keys: Sequence[str], form: str = "", lowest: int = 0) -> list[Leading]:
    """Shelves with the first page and as many after it as they have in a row, the longest row
    first, among equals the best fidelity. form: only pages of this one; empty: any."""
    found: list[Leading] = []
    alive: tuple[HeldShelf, ...] = ()
    known = known_pages(space, keys)
    for index in range(known + 1):
        at = space.pages[keys[index]].at if index < known else ()
        if index == 0:
            alive = tuple(held for held in at if _fits(held.shelf, form, lowest))
            continue
        if at == alive:
            continue
        staying = tuple(held for held in alive if held in at)
        found += [_leading(held, index) for held in alive if held not in staying]
        alive = staying
        if not alive:
            break
    return sorted(
        found, key=lambda row: (-row.pages, -row.shelf.fidelity, row.holder, row.shelf.place)
    )


def distance(holder: str, tier: Tier, here: Collection[str]) -> int:
    """How far a copy is from the holders that are `here`: gpu < peer < host < disk < remote.

    Memory of a holder elsewhere is a peer's: its GPU is nearer than our host's memory (NVLink), its
    host memory is as far as a disk.
    """
    match tier, holder in here:
        case Tier.GPU, True:
            return 0
        case Tier.GPU, False:
            return 1
        case Tier.HOST, True:
            return 2
        case Tier.REMOTE, _:
            return 4
    return 3


def best_copies(
    space: Space, keys: Sequence[str], here: Collection[str] = (), lowest: int = 0
) -> list[Copy | None]:
    """For each key the nearest copy of at least fidelity `lowest`, among equally near ones the
    best; None where there is none."""
    found: list[Copy | None] = []
    at: tuple[HeldShelf, ...] = ()
    best: HeldShelf | None = None
    for key in keys:
        page = space.pages.get(key)
        if page is None:
            found.append(None)
            continue
        if page.at != at:  # pages of one context lie on the same shelves, most of the time
            at, best = page.at, _best(page.at, here, lowest)
        entry = best.pages[key] if best is not None else None
        found.append(
            Copy(key, best.holder, best.epoch, best.shelf, entry.size_bytes, entry.checksum)
            if best is not None and entry is not None
            else None
        )
    return found


def _best(at: Sequence[HeldShelf], here: Collection[str], lowest: int) -> HeldShelf | None:
    fit = [held for held in at if held.shelf.fidelity >= lowest]
    return min(
        fit,
        key=lambda held: (
            distance(held.holder, held.shelf.tier, here),
            -held.shelf.fidelity,
            held.holder,
            held.shelf.place,
            held.shelf.form,
        ),
        default=None,
    )


def _fits(shelf: Shelf, form: str, lowest: int) -> bool:
    return shelf.fidelity >= lowest and (not form or shelf.form == form)


def _leading(held: HeldShelf, pages: int) -> Leading:
    return Leading(pages, held.holder, held.epoch, held.shelf)
