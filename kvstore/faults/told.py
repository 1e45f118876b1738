"""What must hold of the directory, in sets of its own: the oracle of `messages`."""

from __future__ import annotations

from typing import Any, NamedTuple

from ringspan.kvstore.catalog import Catalog
from ringspan.kvstore.directory import Directory
from ringspan.kvstore.leases import Lease
from ringspan.kvstore.records import AnyRecord, Shelf


class Said(NamedTuple):
    """A message of a holder."""

    method: str
    holder: str
    epoch: int
    args: tuple[Any, ...]


class Reading(NamedTuple):
    """A lease and until when its reader relies on it, by the reader's clock."""

    lease: Lease
    until_s: float
    run: int
    """Of the directory, that gave it."""


class Told:
    """What must be so; see `messages`."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}
        self.given: set[int] = set()
        self.whole: dict[tuple[str, int, str, Shelf], set[str]] = {}
        self.refs: dict[tuple[str, int, str], tuple[str, str]] = {}
        self.released: set[tuple[str, int, str]] = set()

    def joined(self, holder: str, epoch: int) -> None:
        self.epochs[holder] = epoch
        self.given.add(epoch)
        self.whole = {at: keys for at, keys in self.whole.items() if at[0] != holder}
        self.refs = {ref: at for ref, at in self.refs.items() if ref[0] != holder}

    def referred(self, holder: str, epoch: int, ref: str, space: str, context: str) -> None:
        if (holder, epoch, ref) not in self.released:
            self.refs.setdefault((holder, epoch, ref), (space, context))

    def done(self, holder: str, epoch: int, ref: str) -> None:
        self.refs.pop((holder, epoch, ref), None)
        self.released.add((holder, epoch, ref))

    def references(self, space: str, context: str) -> int:
        return sum(at == (space, context) for at in self.refs.values())


def twin_of(records: tuple[AnyRecord, ...]) -> Directory:
    """A directory in this state, without a journal."""
    twin = Directory()
    catalog = Catalog()
    for record in records:
        catalog.apply(record)
    twin._catalog = catalog
    return twin
