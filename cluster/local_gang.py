"""A gang without Ray: loopback ranks as threads of this process, on one device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from ringspan.cluster.faults import Fault, FaultKind, RanksFailed, blame, is_benign, to_replace
from ringspan.cluster.gang import Mended, RankFactory, stream_in_step
from ringspan.cluster.host import LoopbackHost
from ringspan.cluster.messages import GangSpec, RankReady, TokenChunk
from ringspan.errors import RankLost

START_TIMEOUT_S = 600.0


class LocalGang:
    """Starts its ranks when it is entered, ends them when it is left."""

    def __init__(
        self,
        spec: GangSpec,
        *,
        rank_class: RankFactory | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.spec = spec
        self.world_size = spec.world_size
        self.ready: tuple[RankReady, ...] = ()
        self.lost = False
        self._faults: tuple[Fault, ...] = ()
        self._start_timeout_s = start_timeout_s
        self._host = LoopbackHost(spec, rank_class or _rank_class())
        self._members = [self._host.where()] * spec.world_size
        # one thread, so that calls run in order; loopback ranks are threads beneath it
        self._caller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-gang")

    def start(self) -> Self:
        try:
            started = self._caller.submit(self._host.start)
            pending = LocalPending(self, started, "starting the ranks")
            self.ready = tuple(pending.result(self._start_timeout_s))
        except BaseException:
            self.close()
            raise
        return self

    def submit(self, method: str, *args: Any, what: str) -> LocalPending:
        if self.lost:
            raise RankLost(f"{what}: the gang has lost a rank; start a new one")
        return LocalPending(self, self._caller.submit(self._host.invoke, method, *args), what)

    def call(self, method: str, *args: Any, timeout_s: float, what: str) -> list[Any]:
        return self.submit(method, *args, what=what).result(timeout_s)

    def stream(self, method: str, *args: Any, timeout_s: float, what: str) -> Iterator[TokenChunk]:
        return stream_in_step(self, method, args, timeout_s, what)

    def mend(self, timeout_s: float) -> Mended:
        """New ranks for those that failed. One that hangs is a thread, which nobody can end."""
        began = time.perf_counter()
        replaced = tuple(sorted(to_replace(self._faults)))
        if not self.lost or not replaced:
            hung = ", ".join(str(fault.rank) for fault in self._faults) or "none"
            raise RankLost(f"no rank failed by itself (silent: {hung}): start a new gang")
        self.lost, self._faults = False, ()
        pending = LocalPending(
            self, self._caller.submit(self._host.replace, replaced), "replacing ranks"
        )
        made = pending.result(timeout_s)
        new = dict(zip(replaced, made, strict=True))
        self.ready = tuple(new.get(rank, ready) for rank, ready in enumerate(self.ready))
        elapsed_s = time.perf_counter() - began
        return Mended(replaced, elapsed_s, elapsed_s)

    def close(self) -> None:
        if self.ready and not self.lost:
            self._caller.submit(self._host.invoke, "stop")
        self.ready = ()
        self.lost = True
        # a rank that hangs ends by its transport's own timeout: threads cannot be killed
        self._caller.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self if self.ready else self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class LocalPending:
    def __init__(self, gang: LocalGang, future: Future[list[Any]], what: str) -> None:
        self._gang, self._future, self._what = gang, future, what

    def result(self, timeout_s: float) -> list[Any]:
        gang = self._gang
        try:
            return self._future.result(timeout_s)
        except RanksFailed as error:
            gang.lost = gang.lost or not is_benign(error.faults)
            gang._faults = error.faults
            raise blame(error.faults, gang._members, self._what) from error
        except TimeoutError:
            gang.lost = True
            gang._faults = ()
            silent = [
                Fault(rank, FaultKind.SILENT, f"waited {timeout_s:.1f} s")
                for rank in range(gang.world_size)
            ]
            raise blame(silent, gang._members, self._what) from None


def _rank_class() -> RankFactory:
    from ringspan.cluster.rank import Rank  # imports torch and transformers: seconds

    return Rank
