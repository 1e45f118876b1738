"""Leases: for how long somebody may read copies that a directory told him of.

Time is a monotonic clock's, given in: nothing here asks for the time of day, so that a clock that
is set makes no lease longer or shorter. A reader counts `ttl_s` from before it asked, on a clock of
its own of that kind; the directory counts from when it answered, which is later. So the reader
always stops first, and the two clocks need to agree on nothing but the length of a second.
(Gray and Cheriton, Leases, SOSP 1989, https://doi.org/10.1145/74851.74870)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import msgspec

from ringspan.errors import StoreError
from ringspan.kvstore.records import Shelf

LONGEST_S = 60.0
"""Of a lease. Whoever reads longer renews it."""

REMEMBERED = 1024
"""Ended leases of which it is still known why they ended."""

Clock = Callable[[], float]
"""Seconds, never running backwards: `time.monotonic`."""


class StaleHandle(StoreError):
    """A lease, or the epoch of a holder, that does not count any more."""


class StartedAnew(StaleHandle):
    """The directory that gave the lease was started anew since; what it was on may well be there,
    for nothing goes for `LONGEST_S` after a start."""


class InUse(StoreError):
    """Copies that somebody reads or refers to; they may go later."""


class Lease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """directory -> reader: these copies stay where they are until then."""

    lease_id: str
    namespace: str
    context_id: str
    holder: str
    epoch: int
    shelf: Shelf
    key: str = ""
    """Of one page; empty: all pages of the context on the shelf."""
    ttl_s: float
    until_s: float
    """On the directory's clock."""

    def __str__(self) -> str:
        what = f"page {self.key[:16]} of context" if self.key else "context"
        return f"lease {self.lease_id} on {what} {self.context_id} at {self.holder}"


class Leases:
    """Those of one process: they are not written down. Whoever starts again after a crash waits
    `LONGEST_S` before it lets anything go (`Directory`)."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._now = clock, clock()
        self._run = secrets.token_hex(4)
        self._count = 0
        self._open: dict[str, Lease] = {}
        self._ended: dict[str, str] = {}

    def now(self) -> float:
        """The clock, held where it was should it run backwards."""
        self._now = max(self._now, self._clock())
        return self._now

    def grant(
        self,
        namespace: str,
        context_id: str,
        holder: str,
        epoch: int,
        shelf: Shelf,
        key: str,
        ttl_s: float,
    ) -> Lease:
        self._count += 1
        ttl_s = min(ttl_s, LONGEST_S)
        lease = Lease(
            lease_id=f"{self._run}-{self._count}",
            namespace=namespace,
            context_id=context_id,
            holder=holder,
            epoch=epoch,
            shelf=shelf,
            key=key,
            ttl_s=ttl_s,
            until_s=self.now() + ttl_s,
        )
        self._open[lease.lease_id] = lease
        return lease

    def check(self, lease: Lease) -> Lease:
        """The lease as it stands now (renewed ones last longer than their first copy says)."""
        self._expire()
        found = self._open.get(lease.lease_id)
        if found is None:
            if not lease.lease_id.startswith(f"{self._run}-"):
                raise StartedAnew(
                    f"{lease}: the directory was started anew; look the pages up again"
                )
            why = self._ended.get(lease.lease_id, "it is not known")
            raise StaleHandle(f"{lease}: {why}; look the pages up again")
        return found

    def renew(self, lease: Lease, ttl_s: float) -> Lease:
        found = self.check(lease)
        ttl_s = min(ttl_s, LONGEST_S)
        until_s = max(found.until_s, self.now() + ttl_s)
        renewed = msgspec.structs.replace(found, ttl_s=ttl_s, until_s=until_s)
        self._open[lease.lease_id] = renewed
        return renewed

    def release(self, lease: Lease) -> bool:
        """False if it was over already. May be repeated."""
        self._expire()
        return self._end(lease.lease_id, "it was released")

    def void(self, why: str, ends: Callable[[Lease], bool]) -> None:
        """End the leases of which `ends` is true: what they were on is gone."""
        for lease in [lease for lease in self._open.values() if ends(lease)]:
            self._end(lease.lease_id, why)

    def standing(self, on: Callable[[Lease], bool]) -> Iterator[Lease]:
        self._expire()
        return (lease for lease in list(self._open.values()) if on(lease))

    def _expire(self) -> None:
        now = self.now()
        for lease in [lease for lease in self._open.values() if lease.until_s <= now]:
            self._end(lease.lease_id, f"it ended {now - lease.until_s:.1f} s ago")

    def _end(self, lease_id: str, why: str) -> bool:
        if self._open.pop(lease_id, None) is None:
            return False
        self._ended[lease_id] = why
        if len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]
        return True
