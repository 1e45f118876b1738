"""The state of a directory, and what each record does to it.

`apply` checks nothing that a clock or a lease decides and refuses nothing: `Directory` does, before
it writes a record down. So a replay of the records gives the same state, and `records` writes any
state as the shortest list of records that gives it.

Pages are stored once, however many contexts begin with them; each namespace has maps of its own,
so that no lookup under one can find, or be slowed by, what lies under another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ringspan.kvstore.records import (
    Aborted,
    AnyRecord,
    Declared,
    Forgotten,
    Joined,
    Left,
    PageEntry,
    Published,
    Referred,
    Released,
    Shelf,
    Staged,
    Tier,
    Withdrawn,
)

REMEMBERED = 1024
"""Finished writes and released references of a holder that are told from unknown ones."""


@dataclass(eq=False, slots=True)
class HeldShelf:
    """A shelf with what lies on it."""

    holder: str
    epoch: int
    namespace: str
    shelf: Shelf
    pages: dict[str, PageEntry] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class KnownPage:
    """A page that some context has."""

    key: str
    index: int
    """In its contexts: 0 is the first page."""
    uses: int = 0
    """Contexts that have it."""
    at: tuple[HeldShelf, ...] = ()
    """Where its published copies lie."""


@dataclass(eq=False, slots=True)
class KnownContext:
    """A context by name."""

    context_id: str
    num_tokens: int
    keys: tuple[str, ...]
    refs: dict[tuple[str, str], Referred] = field(default_factory=dict)
    """By (owner, ref)."""


@dataclass(eq=False, slots=True)
class Space:
    """All that one namespace has."""

    pages: dict[str, KnownPage] = field(default_factory=dict)
    contexts: dict[str, KnownContext] = field(default_factory=dict)
    used_bytes: dict[Tier, int] = field(default_factory=dict)
    """Of copies, staged ones included."""


class Recent:
    """The last names said; older ones are forgotten."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        self._names.pop(name, None)
        self._names[name] = None
        if len(self._names) > REMEMBERED:
            del self._names[next(iter(self._names))]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)


@dataclass(eq=False, slots=True)
class Holder:
    """One incarnation of whoever holds copies or references."""

    epoch: int
    silence_s: float = 0.0
    """After which it counts as dead; 0: never."""
    shelves: dict[tuple[str, Shelf], HeldShelf] = field(default_factory=dict)
    """By (namespace, shelf)."""
    staged: dict[str, dict[tuple[str, Shelf], dict[str, PageEntry]]] = field(default_factory=dict)
    """By write, then (namespace, shelf), then key."""
    published: Recent = field(default_factory=Recent)
    aborted: Recent = field(default_factory=Recent)
    refs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Open ones: ref to (namespace, context id)."""
    released: Recent = field(default_factory=Recent)


class Gone(NamedTuple):
    """Copies that a record took away."""

    shelf: HeldShelf
    keys: tuple[str, ...]


class Catalog:
    def __init__(self) -> None:
        self.holders: dict[str, Holder] = {}
        self.spaces: dict[str, Space] = {}
        self.last_epoch = 0
        """Of any holder, ever: an epoch is given once, so that holders that left need no memory."""

    def apply(self, record: AnyRecord) -> list[Gone]:
        """Change the state; gives back which published copies went with it."""
        match record:
            case Joined():
                return self._join(record)
            case Left():
                return self._leave(record)
            case Declared():
                self._declare(record)
            case Staged():
                self._stage(record)
            case Published():
                self._publish(record)
            case Aborted():
                self._abort(record)
            case Withdrawn():
                return self._withdraw(record)
            case Referred():
                self._refer(record)
            case Released():
                self._release(record)
            case Forgotten():
                return self._forget(record)
        return []

    def space(self, namespace: str) -> Space:
        """Empty for a namespace without anything in it; asking does not make one."""
        return self.spaces.get(namespace) or Space()

    # holders

    def _join(self, record: Joined) -> list[Gone]:
        gone = self._clear(record.holder)
        self.holders[record.holder] = Holder(record.epoch, record.silence_s)
        self.last_epoch = max(self.last_epoch, record.epoch)
        return gone

    def _leave(self, record: Left) -> list[Gone]:
        gone = self._clear(record.holder)
        self.holders.pop(record.holder, None)
        self.last_epoch = max(self.last_epoch, record.epoch)
        return gone

    def _clear(self, name: str) -> list[Gone]:
        holder = self.holders.get(name)
        if holder is None:
            return []
        for write in list(holder.staged):
            self._unstage(holder, write)
        for ref in list(holder.refs):
            self._unrefer(name, holder, ref)
        gone = []
        for held in list(holder.shelves.values()):
            gone.append(Gone(held, tuple(held.pages)))
            self._take_off(holder, held, tuple(held.pages))
        return gone

    # contexts

    def _declare(self, record: Declared) -> None:
        space = self.spaces.setdefault(record.namespace, Space())
        head = self._chain(space, record.parent)
        known = KnownContext(record.context_id, record.num_tokens, head + record.keys)
        for index, key in enumerate(known.keys):
            page = space.pages.get(key)
            if page is None:
                page = space.pages[key] = KnownPage(key, index)
            page.uses += 1
        space.contexts[record.context_id] = known

    def _chain(self, space: Space, parent: str) -> tuple[str, ...]:
        """Keys up to `parent`, from any context that has it: equal keys have equal pasts."""
        if not parent:
            return ()
        length = space.pages[parent].index + 1
        for known in space.contexts.values():
            if len(known.keys) >= length and known.keys[length - 1] == parent:
                return known.keys[:length]
        raise KeyError(parent)

    def _forget(self, record: Forgotten) -> list[Gone]:
        space = self.spaces[record.namespace]
        known = space.contexts.pop(record.context_id)
        for owner, ref in list(known.refs):
            self.holders[owner].refs.pop(ref, None)
        lost: dict[HeldShelf, list[str]] = {}
        for key in known.keys:
            page = space.pages[key]
            page.uses -= 1
            if not page.uses:
                for held in page.at:
                    lost.setdefault(held, []).append(key)
                del space.pages[key]
        gone = [Gone(held, tuple(keys)) for held, keys in lost.items()]
        for held, keys in gone:
            self._take_off(self.holders[held.holder], held, keys)
        self._tidy(record.namespace)
        return gone

    # copies

    def _stage(self, record: Staged) -> None:
        holder = self.holders[record.holder]
        write = holder.staged.setdefault(record.write, {})
        pages = write.setdefault((record.namespace, record.shelf), {})
        for entry in record.pages:
            before = pages.get(entry.key)
            self._count(record.namespace, record.shelf.tier, before, entry)
            pages[entry.key] = entry
        self._tidy(record.namespace)

    def _publish(self, record: Published) -> None:
        holder = self.holders[record.holder]
        for (namespace, shelf), pages in holder.staged.pop(record.write, {}).items():
            space = self.spaces.setdefault(namespace, Space())
            slot = (namespace, shelf)
            held = holder.shelves.get(slot)
            if held is None:
                held = HeldShelf(record.holder, record.epoch, namespace, shelf)
                holder.shelves[slot] = held
            for key, entry in pages.items():
                page = space.pages.get(key)
                if page is None:  # its last context was forgotten since it was staged
                    self._count(namespace, shelf.tier, entry, None)
                    continue
                before = held.pages.get(key)
                if before is None:
                    page.at = (*page.at, held)
                else:
                    self._count(namespace, shelf.tier, before, None)
                held.pages[key] = entry
            if not held.pages:
                del holder.shelves[slot]
            self._tidy(namespace)
        if record.write:
            holder.published.add(record.write)

    def _abort(self, record: Aborted) -> None:
        holder = self.holders[record.holder]
        self._unstage(holder, record.write)
        holder.aborted.add(record.write)

    def _unstage(self, holder: Holder, write: str) -> None:
        for (namespace, shelf), pages in holder.staged.pop(write, {}).items():
            for entry in pages.values():
                self._count(namespace, shelf.tier, entry, None)
            self._tidy(namespace)

    def _withdraw(self, record: Withdrawn) -> list[Gone]:
        holder = self.holders[record.holder]
        held = holder.shelves.get((record.namespace, record.shelf))
        if held is None:
            return []
        wanted = record.keys or tuple(held.pages)
        keys = tuple(key for key in wanted if key in held.pages)
        self._take_off(holder, held, keys)
        return [Gone(held, keys)] if keys else []

    def _take_off(self, holder: Holder, held: HeldShelf, keys: Iterable[str]) -> None:
        space = self.spaces[held.namespace]
        for key in keys:
            self._count(held.namespace, held.shelf.tier, held.pages.pop(key), None)
            page = space.pages.get(key)
            if page is not None:
                page.at = tuple(other for other in page.at if other is not held)
        if not held.pages:
            holder.shelves.pop((held.namespace, held.shelf), None)
        self._tidy(held.namespace)

    def _count(
        self, namespace: str, tier: Tier, before: PageEntry | None, after: PageEntry | None
    ) -> None:
        used = self.spaces.setdefault(namespace, Space()).used_bytes
        change = (after.size_bytes if after else 0) - (before.size_bytes if before else 0)
        used[tier] = used.get(tier, 0) + change
        if not used[tier]:
            del used[tier]

    def _tidy(self, namespace: str) -> None:
        """A namespace that has nothing is as one that never was."""
        space = self.spaces.get(namespace)
        if space is not None and not (space.contexts or space.pages or space.used_bytes):
            del self.spaces[namespace]

    # references

    def _refer(self, record: Referred) -> None:
        known = self.spaces[record.namespace].contexts[record.context_id]
        known.refs[record.owner, record.ref] = record
        self.holders[record.owner].refs[record.ref] = (record.namespace, record.context_id)

    def _release(self, record: Released) -> None:
        holder = self.holders[record.owner]
        self._unrefer(record.owner, holder, record.ref)
        holder.released.add(record.ref)

    def _unrefer(self, owner: str, holder: Holder, ref: str) -> None:
        place = holder.refs.pop(ref, None)
        if place is not None:
            namespace, context_id = place
            known = self.space(namespace).contexts.get(context_id)
            if known is not None:
                known.refs.pop((owner, ref), None)

    # the other way round

    def records(self) -> Iterator[AnyRecord]:
        """Records that make an empty catalog equal to this one: the same state, the same list."""
        yield Left("", self.last_epoch)
        for name, holder in sorted(self.holders.items()):
            yield Joined(name, holder.epoch, holder.silence_s)
        for namespace, space in sorted(self.spaces.items()):
            yield from _declarations(namespace, space)
        for name, holder in sorted(self.holders.items()):
            yield from _copies(name, holder)
            for ref in sorted(holder.refs):
                namespace, context_id = holder.refs[ref]
                yield self.spaces[namespace].contexts[context_id].refs[name, ref]


def _declarations(namespace: str, space: Space) -> Iterator[Declared]:
    seen: set[str] = set()
    for context_id, known in sorted(space.contexts.items()):
        new = next((i for i, key in enumerate(known.keys) if key not in seen), len(known.keys))
        parent = known.keys[new - 1] if new else ""
        yield Declared(namespace, context_id, known.num_tokens, parent, known.keys[new:])
        seen.update(known.keys)


def _copies(name: str, holder: Holder) -> Iterator[AnyRecord]:
    """Published copies as one write without a name, then what stands open or is remembered."""
    for (namespace, shelf), held in sorted(holder.shelves.items(), key=_slot_order):
        pages = tuple(held.pages[key] for key in sorted(held.pages))
        yield Staged(name, holder.epoch, "", namespace, shelf, pages)
    if holder.shelves:
        yield Published(name, holder.epoch, "")
    for write in holder.published:
        yield Published(name, holder.epoch, write)
    for write in holder.aborted:
        yield Aborted(name, holder.epoch, write)
    for ref in holder.released:
        yield Released(name, holder.epoch, ref)
    for write, slots in sorted(holder.staged.items()):
        for (namespace, shelf), entries in sorted(slots.items(), key=_slot_order):
            pages = tuple(entries[key] for key in sorted(entries))
            yield Staged(name, holder.epoch, write, namespace, shelf, pages)


def _slot_order(slot: tuple[tuple[str, Shelf], object]) -> tuple[str, str, str, str, int]:
    (namespace, shelf), _ = slot
    return namespace, shelf.tier, shelf.place, shelf.form, shelf.fidelity
