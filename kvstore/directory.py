"""The directory: which page is where, in which encoding, who reads it, who needs it.

A plain class. Holders (gangs, host stores, folders) join it and get an epoch; what they stage is
seen once they publish it, and is gone when they leave, die or join again. Readers get leases on
what they are told of; sessions and prefills refer to contexts. A copy goes when no lease is on it
and no reference needs it.

Messages may come twice or in another order: writes, references and leases have names, given by
their owners, so that what was done already is done once, and what is over does not come back. A
message of an earlier incarnation is refused (`StaleHandle`), so is one about what is in use
(`InUse`).

Everything is said within a namespace (`keys.namespace_digest`): no call can find, count or wait for
what lies under another one.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from ringspan.errors import BadInput, UnknownName
from ringspan.kvstore.catalog import Catalog, Holder, KnownContext
from ringspan.kvstore.guard import Guard, has_page
from ringspan.kvstore.journal import Journal
from ringspan.kvstore.leases import LONGEST_S, Clock, InUse, Lease, Leases, StaleHandle
from ringspan.kvstore.prefixes import Copy, Leading, best_copies, known_pages, leading
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

COMPACT_BYTES = 64 << 20
"""A journal that is larger, and has doubled since it was compacted last, is compacted."""

P = ParamSpec("P")
R = TypeVar("R")


class ContextInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """directory -> anyone of the namespace: a context by name."""

    context_id: str
    num_tokens: int
    num_pages: int
    references: int


def _alone(
    method: Callable[Concatenate[Directory, P], R],
) -> Callable[Concatenate[Directory, P], R]:
    """One call at a time: controllers in several threads share a directory in their process."""

    def call(self: Directory, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._mutex:
            self._bury()
            return method(self, *args, **kwargs)

    functools.update_wrapper(call, method)
    return call


class Directory:
    """journal: replayed, then written to; None keeps nothing. clock: monotonic, in seconds."""

    shared = False
    """Beyond this process, whose end ends the directory and all that joined it."""

    def __init__(self, journal: Journal | None = None, clock: Clock = time.monotonic) -> None:
        self._mutex = threading.RLock()
        self._catalog = Catalog()
        self._leases = Leases(clock)
        self._journal = journal
        quiet_until_s = float("-inf")
        self._compacted_bytes = 0
        self._heard_s: dict[str, float] = {}
        if journal is not None:
            records = journal.replay()
            for record in records:
                self._catalog.apply(record)
            if records:  # leases of the process before may stand
                quiet_until_s = self._leases.now() + LONGEST_S
            self._compacted_bytes = journal.size_bytes
        self._guard = Guard(self._catalog, self._leases, quiet_until_s)

    # holders

    @_alone
    def join(self, holder: str, silence_s: float = 0.0) -> int:
        """A holder begins anew; its epoch, larger than any before. Whatever an earlier incarnation
        of it held, staged or referred to is gone, and so are the leases on it.

        silence_s: without a word of it (`beat`, or any call of its own) for so long it counts as
        dead; 0: it lives until it leaves."""
        if not holder:
            raise BadInput("a holder without a name cannot join: give it one")
        epoch = self._catalog.last_epoch + 1
        self._do(Joined(holder, epoch, silence_s), f"{holder} has begun epoch {epoch}")
        self._heard_s[holder] = self._leases.now()
        return epoch

    @_alone
    def beat(self, holder: str, epoch: int) -> None:
        """The holder lives."""
        self._alive(holder, epoch)

    @_alone
    def leave(self, holder: str, epoch: int) -> bool:
        """The incarnation is over; False if that was known. May be repeated."""
        found = self._catalog.holders.get(holder)
        if found is None or found.epoch != epoch:
            return False
        self._do(Left(holder, epoch), f"{holder} has left")
        return True

    # contexts and copies

    @_alone
    def declare(
        self,
        namespace: str,
        context_id: str,
        keys: Sequence[str],
        num_tokens: int,
        *,
        owner: str,
        epoch: int,
        ref: str,
    ) -> None:
        """A context exists by name; it is the reference `ref` of `owner` that keeps it until
        copies of it are published. May be repeated, with the same keys."""
        holder = self._alive(owner, epoch)
        if not keys or len(set(keys)) != len(keys):
            raise BadInput(f"context {context_id}: {len(keys)} page keys, of which some are equal")
        if not namespace or not context_id:
            raise BadInput("a context is declared by a namespace and an id: neither may be empty")
        space = self._catalog.space(namespace)
        known = space.contexts.get(context_id)
        if known is not None and known.keys != tuple(keys):
            raise BadInput(
                f"context {context_id} is known with {len(known.keys)} pages that are not these "
                f"{len(keys)}: two contexts cannot have one id"
            )
        if known is None:
            head = known_pages(space, keys)
            if head and space.pages[keys[head - 1]].index != head - 1:
                raise BadInput(f"context {context_id}: page keys out of order")
            parent = keys[head - 1] if head else ""
            self._do(Declared(namespace, context_id, num_tokens, parent, tuple(keys[head:])))
        self._refer(holder, owner, epoch, ref, namespace, context_id, "", "")

    @_alone
    def stage(
        self,
        holder: str,
        epoch: int,
        write: str,
        namespace: str,
        shelf: Shelf,
        pages: Sequence[PageEntry],
    ) -> None:
        """Pages of declared contexts that the holder's write `write` has put on the shelf; unseen
        until `publish`. May be repeated, and called for one write as often as it takes."""
        found = self._alive(holder, epoch)
        if not write:
            raise BadInput(f"{holder} stages pages of a write without a name: give it one")
        if write in found.published or write in found.aborted:
            return  # said again, or late
        space = self._catalog.space(namespace)
        for entry in pages:
            if entry.key not in space.pages:
                raise BadInput(f"page {entry.key[:16]} is of no context: declare its context first")
            if entry.size_bytes < 0:
                raise BadInput(f"page {entry.key[:16]} of {entry.size_bytes} bytes")
        self._do(Staged(holder, epoch, write, namespace, shelf, tuple(pages)))

    @_alone
    def publish(self, holder: str, epoch: int, write: str, num_pages: int) -> None:
        """All that the write staged is visible: `num_pages` pages, or it is refused, for then a
        message is still on its way. May be repeated."""
        found = self._alive(holder, epoch)
        if write in found.published:
            return
        if write in found.aborted:
            raise StaleHandle(
                f"write {write} of {holder} was aborted: write it again, by a new name"
            )
        staged = sum(map(len, found.staged.get(write, {}).values()))
        if staged != num_pages or not staged:
            raise StaleHandle(
                f"write {write} of {holder} has staged {staged} pages, {num_pages} were to be "
                "published: stage the others first"
            )
        self._do(Published(holder, epoch, write))

    @_alone
    def abort(self, holder: str, epoch: int, write: str) -> None:
        """The write is given up; staging for it that comes late is ignored. May be repeated."""
        found = self._alive(holder, epoch)
        if write in found.published:
            raise StaleHandle(f"write {write} of {holder} was published: withdraw it instead")
        if write not in found.aborted:
            self._do(Aborted(holder, epoch, write))

    @_alone
    def withdraw(
        self,
        holder: str,
        epoch: int,
        namespace: str,
        shelf: Shelf,
        keys: Sequence[str] | None = None,
    ) -> int:
        """The holder wants its copies back: pages `keys` of the shelf, None for all. Gives back how
        many there were; they are not told of any more. InUse while a lease is on one of them or a
        reference needs one. May be repeated."""
        found = self._alive(holder, epoch)
        held = found.shelves.get((namespace, shelf))
        if held is None:
            return 0
        going = [key for key in (held.pages if keys is None else keys) if key in held.pages]
        if not going:
            return 0
        self._guard.check_copies(holder, namespace, shelf, going)
        whole = len(going) == len(held.pages)
        self._do(Withdrawn(holder, epoch, namespace, shelf, () if whole else tuple(going)))
        return len(going)

    @_alone
    def check_unread(self, holder: str, epoch: int, namespace: str, shelf: Shelf) -> None:
        """InUse while a lease is on a page of the shelf."""
        self._alive(holder, epoch)
        self._guard.check_leases(
            lambda lease: (
                (lease.holder, lease.namespace, lease.shelf) == (holder, namespace, shelf)
            ),
            f"what {holder} has at {shelf.place or shelf.tier}",
        )

    @_alone
    def discard(
        self,
        holder: str,
        epoch: int,
        namespace: str,
        shelf: Shelf,
        keys: Sequence[str] | None,
        why: str,
    ) -> int:
        """Copies (None: all of the shelf) were found damaged or lost: they are gone whoever reads
        or needs them, and the leases on them are void. Gives back how many there were. May be
        repeated."""
        held = self._alive(holder, epoch).shelves.get((namespace, shelf))
        if held is None:
            return 0
        going = tuple(key for key in (held.pages if keys is None else keys) if key in held.pages)
        if going:
            self._do(Withdrawn(holder, epoch, namespace, shelf, going), why)
        return len(going)

    @_alone
    def forget(self, namespace: str, context_id: str) -> bool:
        """The context is not known any more, nor copies of pages that only it has: their holders
        may free them. InUse while a lease or a reference is on it. False if it was not known."""
        known = self._catalog.space(namespace).contexts.get(context_id)
        if known is None:
            return False
        what = f"context {context_id}"
        self._guard.check_quiet(what)
        for ref in known.refs.values():
            raise InUse(f"{what} is needed by {ref.ref} of {ref.owner}: end that first")
        self._guard.check_leases(
            lambda lease: (lease.namespace, lease.context_id) == (namespace, context_id), what
        )
        self._do(Forgotten(namespace, context_id))
        return True

    @_alone
    def forget_lost(self, namespace: str) -> tuple[str, ...]:
        """Forget the contexts that no page is left of and that nobody needs; their ids."""
        space = self._catalog.space(namespace)
        lost = [
            context_id
            for context_id, known in space.contexts.items()
            if not known.refs and not any(space.pages[key].at for key in known.keys)
        ]
        for context_id in lost:
            self._do(Forgotten(namespace, context_id))
        return tuple(sorted(lost))

    # references

    @_alone
    def refer(
        self,
        owner: str,
        epoch: int,
        ref: str,
        namespace: str,
        context_id: str,
        *,
        holder: str = "",
        place: str = "",
    ) -> None:
        """`owner` needs the context, by a name of its own: the copies of `holder` at `place`, or
        (empty) at least one copy anywhere. Ends with `release` or with the owner. May be repeated;
        one that was released is not taken up again."""
        found = self._alive(owner, epoch)
        self._known(namespace, context_id)
        self._refer(found, owner, epoch, ref, namespace, context_id, holder, place)

    @_alone
    def release(self, owner: str, epoch: int, ref: str) -> bool:
        """The reference is over; False if it was. May be repeated."""
        found = self._alive(owner, epoch)
        open_ = ref in found.refs
        if open_ or ref not in found.released:
            self._do(Released(owner, epoch, ref))
        return open_

    # leases

    @_alone
    def lease(
        self,
        namespace: str,
        context_id: str,
        holder: str,
        epoch: int,
        shelf: Shelf,
        *,
        key: str = "",
        ttl_s: float = LONGEST_S,
    ) -> Lease:
        """The copies of the context (or of its page `key`) on this shelf stay for `ttl_s` seconds,
        at most `LONGEST_S`. StaleHandle if the holder has begun anew or has them no more."""
        if ttl_s <= 0:
            raise BadInput(f"a lease of {ttl_s} s: wanted more than 0")
        held = self._alive(holder, epoch).shelves.get((namespace, shelf))
        known = self._known(namespace, context_id)
        if key and key not in known.keys:
            raise BadInput(f"page {key[:16]} is none of context {context_id}")
        wanted = (key,) if key else known.keys
        if held is None or not any(entry in held.pages for entry in wanted):
            raise StaleHandle(
                f"{holder} has no page of context {context_id} at {shelf.place or shelf.tier} any "
                "more; look the pages up again"
            )
        return self._leases.grant(namespace, context_id, holder, epoch, shelf, key, ttl_s)

    @_alone
    def check(self, lease: Lease) -> Lease:
        """The lease as it stands, or StaleHandle: it has ended, or what it was on is gone."""
        return self._leases.check(lease)

    @_alone
    def renew(self, lease: Lease, ttl_s: float = LONGEST_S) -> Lease:
        """The lease, `ttl_s` seconds long from now. StaleHandle as `check`."""
        return self._leases.renew(lease, ttl_s)

    @_alone
    def end_lease(self, lease: Lease) -> bool:
        """The reader is done; False if the lease was over. May be repeated."""
        return self._leases.release(lease)

    # look-ups

    @_alone
    def known(self, namespace: str, keys: Sequence[str]) -> int:
        """How many of the first pages belong to a context of the namespace, copies or not."""
        return known_pages(self._catalog.space(namespace), keys)

    @_alone
    def leading(
        self, namespace: str, keys: Sequence[str], *, form: str = "", lowest: int = 0
    ) -> list[Leading]:
        """Shelves that have the first pages of a sequence, the longest row first; see
        `prefixes.leading`. Only what is published."""
        return leading(self._catalog.space(namespace), keys, form, lowest)

    @_alone
    def locate(
        self,
        namespace: str,
        keys: Sequence[str],
        *,
        here: Sequence[str] = (),
        lowest: int = 0,
    ) -> list[Copy | None]:
        """The best copy of each page: of at least fidelity `lowest`, nearest to the holders that
        are `here`; see `prefixes.best_copies`."""
        return best_copies(self._catalog.space(namespace), keys, frozenset(here), lowest)

    @_alone
    def contexts(self, namespace: str) -> tuple[ContextInfo, ...]:
        """Of this namespace, by id."""
        return tuple(
            ContextInfo(
                context_id=context_id,
                num_tokens=known.num_tokens,
                num_pages=len(known.keys),
                references=len(known.refs),
            )
            for context_id, known in sorted(self._catalog.space(namespace).contexts.items())
        )

    @_alone
    def used_bytes(self, namespace: str) -> dict[Tier, int]:
        """What the namespace's copies take by tier, staged ones included: what quotas bound."""
        return dict(self._catalog.space(namespace).used_bytes)

    @_alone
    def in_use(self, namespace: str, key: str) -> int:
        """References and leases on contexts that have this page: what eviction leaves alone."""
        space = self._catalog.space(namespace)
        having = {
            context_id: known
            for context_id, known in space.contexts.items()
            if has_page(space, known, key)
        }
        leases = self._leases.standing(
            lambda lease: (
                lease.namespace == namespace
                and lease.context_id in having
                and lease.key in ("", key)
            )
        )
        return sum(len(known.refs) for known in having.values()) + sum(1 for _ in leases)

    @_alone
    def records(self) -> tuple[AnyRecord, ...]:
        """The whole state, as the journal would say it anew: equal states, equal records."""
        return tuple(self._catalog.records())

    @_alone
    def compact(self) -> None:
        """Write the journal anew, as short as it can be."""
        if self._journal is not None:
            self._journal.compact(self._catalog.records())
            self._compacted_bytes = self._journal.size_bytes

    @_alone
    def close(self) -> None:
        """Ends the journal. May be repeated."""
        if self._journal is not None:
            self._journal.close()

    # helpers

    def _do(self, record: AnyRecord, why: str = "its context was forgotten") -> None:
        """Written down first, then done: what a crash takes was never answered."""
        journal = self._journal
        if journal is not None:
            journal.append(record)
        for gone in self._catalog.apply(record):
            self._guard.void(gone, why)
        if isinstance(record, Left):
            self._heard_s.pop(record.holder, None)
        if journal is not None and journal.size_bytes > max(
            COMPACT_BYTES, 2 * self._compacted_bytes
        ):
            self.compact()

    def _bury(self) -> None:
        """Holders that have been silent for too long are dead."""
        now = self._leases.now()
        for name, found in list(self._catalog.holders.items()):
            heard_s = self._heard_s.setdefault(name, now)  # after a restart all have their time
            if found.silence_s and now - heard_s > found.silence_s:
                why = f"{name} was not heard for {now - heard_s:.1f} s"
                self._do(Left(name, found.epoch), why)

    def _alive(self, name: str, epoch: int) -> Holder:
        found = self._catalog.holders.get(name)
        if found is None:
            raise StaleHandle(f"epoch {epoch} of {name} is over, it has left or died: join again")
        if found.epoch != epoch:
            raise StaleHandle(
                f"epoch {epoch} of {name} is over, it is in epoch {found.epoch}: join again"
            )
        self._heard_s[name] = self._leases.now()
        return found

    def _known(self, namespace: str, context_id: str) -> KnownContext:
        contexts = self._catalog.space(namespace).contexts
        if context_id not in contexts:
            raise UnknownName("context", context_id, tuple(contexts))
        return contexts[context_id]

    def _refer(
        self,
        found: Holder,
        owner: str,
        epoch: int,
        ref: str,
        namespace: str,
        context_id: str,
        holder: str,
        place: str,
    ) -> None:
        if ref in found.released:
            return  # late: it is over
        if found.refs.get(ref, (namespace, context_id)) != (namespace, context_id):
            raise BadInput(f"reference {ref} of {owner} is on another context: release it first")
        if ref not in found.refs:
            self._do(Referred(owner, epoch, ref, namespace, context_id, holder, place))


def open_directory(path: str, clock: Clock = time.monotonic) -> Directory:
    """The directory whose journal is at `path`, which need not exist yet."""
    return Directory(Journal(path), clock)
