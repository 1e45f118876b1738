"""Reading under leases that are renewed meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ringspan.cluster.page_directory import PageDirectory
from ringspan.errors import RingspanError
from ringspan.kvstore.leases import LONGEST_S, Lease, StaleHandle, StartedAnew

RENEW_S = LONGEST_S / 4
"""Between two renewals: a directory may be away for most of a lease and nobody stops."""


class Reading:
    """Contexts that are being read under leases just given; `end` it."""

    def __init__(
        self, directory: PageDirectory, leases: Sequence[Lease], *, asked_s: float
    ) -> None:
        """asked_s: `time.monotonic()` before the leases were asked for."""
        self._directory, self._leases = directory, tuple(leases)
        self._renewed_s = asked_s
        self._failed: StaleHandle | None = None
        self._pulse = Pulse(self._renew, RENEW_S)

    def check(self) -> None:
        """StaleHandle once what is read may be gone; costs nothing. The reader goes by its own
        clock: that the thread which renews stood still too is no excuse."""
        if self._failed is not None:
            raise self._failed
        silent_s = time.monotonic() - self._renewed_s
        if silent_s >= LONGEST_S:
            raise StaleHandle(
                f"{self._leases[0]} was not renewed for {silent_s:.1f} s; look the pages up again"
            )

    def end(self) -> None:
        """May be repeated."""
        self._pulse.stop()
        for lease in self._leases:
            with suppress(RingspanError):  # it ends by itself
                self._directory.end_lease(lease)

    def _renew(self) -> None:
        asked_s = time.monotonic()
        try:
            self._leases = tuple(self._renewed(lease) for lease in self._leases)
        except StaleHandle as error:
            self._failed = error
            raise
        self._renewed_s = asked_s

    def _renewed(self, lease: Lease) -> Lease:
        try:
            return self._directory.renew(lease)
        except StartedAnew:
            if time.monotonic() - self._renewed_s >= LONGEST_S:
                raise  # it may have gone, and come back, in between
            return self._directory.lease(
                lease.namespace,
                lease.context_id,
                lease.holder,
                lease.epoch,
                lease.shelf,
                key=lease.key,
            )


class Pulse:
    """Calls `act` every so many seconds on a thread of its own, until that finds a handle stale or
    it is stopped. Other errors pass: the next beat may do."""

    def __init__(self, act: Callable[[], None], every_s: float) -> None:
        self._act, self._every_s = act, every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """May be repeated; not from `act`."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                self._act()
            except StaleHandle:
                return
            except RingspanError:
                continue
