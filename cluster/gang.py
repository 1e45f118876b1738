"""A gang: the ranks that run one model together, as the controller sees them.

Every method of a rank is called on all ranks at once (SPMD) with the same arguments. Two forms:
`LocalGang` (loopback ranks in this process) and `RayGang` (actors).
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ringspan.cluster.messages import GangSpec, RankReady, TokenChunk

STREAM_AHEAD = 2
"""Items asked of the ranks before the last one was taken, so that no rank idles between them."""

FAULT_GRACE_S = 2.0
"""After a first fault: how long the other ranks may take to say, or to show, that it was theirs."""

BENIGN_GRACE_S = 10.0
"""The same after an error that leaves the ranks in step (a full disk): let them finish."""

RankFactory = Callable[..., Any]
"""Builds a rank from (rank, GangSpec): class Rank, or a test's own."""


@dataclass(frozen=True)
class Mended:
    """What `Gang.mend` did."""

    replaced: tuple[int, ...]
    """Ranks whose processes are new: they hold nothing. The others hold what they held."""
    load_s: float
    """Of it, for the new ones to start and to load the weights."""
    elapsed_s: float


class Pending(Protocol):
    """A call on its way."""

    def result(self, timeout_s: float) -> list[Any]:
        """What each rank returned, in rank order. RankLost (or the ranks' own BadInput,
        StoreError, CorruptPage) when one failed, died or did not answer within `timeout_s`."""


class Gang(Protocol):
    @property
    def spec(self) -> GangSpec: ...

    @property
    def world_size(self) -> int: ...

    @property
    def ready(self) -> tuple[RankReady, ...]:
        """What each rank said when it was started."""

    @property
    def lost(self) -> bool:
        """A rank is gone or out of step: nothing but `mend` or `close` is left to do."""

    def mend(self, timeout_s: float) -> Mended:
        """Once the gang is lost: replaces the ranks that died, failed or do not answer, and forms
        the group anew with those that live on, which keep their processes and what they hold.
        RankLost, naming why, where that cannot be done in this time; it may be tried again."""

    def submit(self, method: str, *args: Any, what: str) -> Pending:
        """Calls the method on every rank; calls run in the order in which they were submitted.
        `what` says in errors what was being done: `prefill chunk 3 [12288, 16384)`."""

    def call(self, method: str, *args: Any, timeout_s: float, what: str) -> list[Any]:
        """`submit` and `result`."""

    def stream(self, method: str, *args: Any, timeout_s: float, what: str) -> Iterator[TokenChunk]:
        """Every rank runs the generator in step; rank 0's items, as they appear. `timeout_s` is
        for one item. Closing the iterator closes every rank's generator after the same item."""

    def close(self) -> None:
        """Ends the ranks, whatever state they are in. May be repeated."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


_stream_ids = itertools.count()
_stream_ids_lock = threading.Lock()


def stream_in_step(
    gang: Gang, method: str, args: tuple[Any, ...], timeout_s: float, what: str
) -> Iterator[TokenChunk]:
    """`Gang.stream` on top of `Gang.submit`, for gangs whose hosts know `open_stream`,
    `advance_stream` and `close_stream`.

    The items are asked for one by one instead of being left to flow: so all ranks always stand
    at the same item, and a client that goes away stops them there.
    """
    with _stream_ids_lock:
        stream_id = next(_stream_ids)
    gang.call("open_stream", stream_id, method, *args, timeout_s=timeout_s, what=what)
    asked: deque[Pending] = deque()
    try:
        for index in itertools.count():
            while len(asked) < STREAM_AHEAD:
                item = f"{what}, item {index + len(asked)}"
                asked.append(gang.submit("advance_stream", stream_id, what=item))
            items = asked.popleft().result(timeout_s)
            if not items[0]:
                return
            yield items[0][0]
    finally:
        if not gang.lost:
            gang.call("close_stream", stream_id, timeout_s=timeout_s, what=f"closing {what}")
