"""What may not go: copies that are read, contexts that are needed, all just after a restart."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ringspan.kvstore.catalog import Catalog, Gone, KnownContext, Space
from ringspan.kvstore.leases import InUse, Lease, Leases
from ringspan.kvstore.records import Shelf


class Guard:
    """Between a directory's state and its leases. quiet_until_s: on the leases' clock; nothing goes
    before, for leases of a process before this one may stand."""

    def __init__(self, catalog: Catalog, leases: Leases, quiet_until_s: float) -> None:
        self._catalog, self._leases = catalog, leases
        self._quiet_until_s = quiet_until_s

    def check_quiet(self, what: str) -> None:
        """InUse while leases may stand that this process does not know."""
        left_s = self._quiet_until_s - self._leases.now()
        if left_s > 0:
            raise InUse(
                f"{what} cannot go yet: leases from before the directory was started anew may "
                f"stand for {left_s:.1f} s more"
            )

    def check_leases(self, on: Callable[[Lease], bool], what: str) -> None:
        """InUse while a lease stands of which `on` is true."""
        standing = list(self._leases.standing(on))
        if standing:
            left_s = max(lease.until_s for lease in standing) - self._leases.now()
            raise InUse(
                f"{what} cannot go yet: {len(standing)} leases stand, the last for {left_s:.1f} s "
                "more"
            )

    def check_copies(
        self, holder: str, namespace: str, shelf: Shelf, going: Collection[str]
    ) -> None:
        """InUse if pages `going` may not leave the shelf: read, or needed by a reference."""
        what = f"{len(going)} pages of {holder}"
        self.check_quiet(what)
        gone = frozenset(going)
        space = self._catalog.space(namespace)
        self.check_leases(on_copies(space, holder, namespace, shelf, gone), what)
        for known in space.contexts.values():
            for ref in known.refs.values():
                if ref.holder and (ref.holder, ref.place) != (holder, shelf.place):
                    continue
                needed = [
                    key
                    for key in known.keys
                    if key in gone and (ref.holder or len(space.pages[key].at) == 1)
                ]
                if needed:
                    raise InUse(
                        f"{len(needed)} pages of context {known.context_id} at {holder} are needed "
                        f"by {ref.ref} of {ref.owner}: end that first"
                    )

    def void(self, gone: Gone, why: str) -> None:
        """End the leases on copies that have gone."""
        held = gone.shelf
        space = self._catalog.space(held.namespace)
        keys = frozenset(gone.keys)
        self._leases.void(why, on_copies(space, held.holder, held.namespace, held.shelf, keys))


def on_copies(
    space: Space, holder: str, namespace: str, shelf: Shelf, keys: Collection[str]
) -> Callable[[Lease], bool]:
    """Whether a lease is on one of these pages on this shelf."""

    def on(lease: Lease) -> bool:
        if (lease.holder, lease.namespace, lease.shelf) != (holder, namespace, shelf):
            return False
        if lease.key:
            return lease.key in keys
        known = space.contexts.get(lease.context_id)
        return known is None or any(has_page(space, known, key) for key in keys)

    return on


def has_page(space: Space, known: KnownContext, key: str) -> bool:
    """Whether the page is one of the context."""
    page = space.pages.get(key)
    return page is not None and page.index < len(known.keys) and known.keys[page.index] == key
