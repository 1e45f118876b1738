"""The sending side of a hand-off, on one rank: see kvstore/handoff.py.

    add()      after a chunk: its pages are handed over, the caller goes on at once
    feeder     one thread: plane sums of these pages, from the rows that they lie in
    lanes      one thread a receiver, which sends them (kvstore/handoff_lane.py)

Nothing here disturbs the prefill: `add` never raises, and what went wrong is said by `finish`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from ringspan.errors import PeerTimeout, RankLost
from ringspan.kvstore import planes
from ringspan.kvstore.handoff import (
    PARCEL_BYTES,
    FailedNote,
    HandoffPlan,
    Moved,
    Told,
    check_form,
    failed_note,
)
from ringspan.kvstore.handoff_lane import Batch, Join, Lane
from ringspan.kvstore.pair import side_stream
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.transcode import recoded_form
from ringspan.types import Span

Pages = tuple[tuple[Span, int], ...]
"""(span, row in the shard) of each."""


class Sending:
    """One rank's pages of a context, to all receivers. keys: of all pages, in position order.

    shard: of the plan's form, or of one that can be recoded to it (BadInput). Ends with `finish` or
    `abandon`.
    """

    def __init__(
        self, plan: HandoffPlan, rank: int, shard: ContextShard, keys: Sequence[str], join: Join
    ) -> None:
        self.recodes = plan.form != shard.form
        if self.recodes:
            name = f"context {plan.fence.context_id}"
            check_form(plan, recoded_form(shard.form, plan.form.codec, name), "the senders' shards")
        self.plan, self.rank, self.shard, self.keys = plan, rank, shard, keys
        self._places = plan.places()
        self._added = 0
        """Pages of the shard that were handed over so far."""
        self._moved = Moved(rank=rank)
        self._lock = threading.Lock()
        self.stop = threading.Event()
        """The hand-off is given up."""
        self._ended = False
        self._began: float | None = None
        """When the first pages were taken for a parcel."""
        self._feeder = ThreadPoolExecutor(1, "handoff-feeder")
        self._lanes = [Lane(self, receiver, join) for receiver in range(plan.receivers)]
        for lane in self._lanes:
            lane.start()

    def add(self) -> None:
        """Hand over the pages that the shard has in all layers since the last time.

        The shard must be complete (between chunks). Never raises.
        """
        if self._ended or self.stop.is_set():
            return
        held = self.shard.pages()
        if len(held) < self._added:  # what was sent of it is not of this prefill any more
            self.abandon("its prefill went back behind pages that were sent")
            return
        pages = held[self._added :]
        if not pages:
            return
        self._added += len(pages)
        shard = self.shard
        layers = tuple(shard.tensors(layer) for layer in range(shard.num_layers))
        ready = None
        if shard.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(shard.device))
        self._feeder.submit(self._feed, layers, pages, ready)

    def finish(self, timeout_s: float) -> Moved:
        """After the last `add`: until every receiver has verified all of this rank's pages, or the
        hand-off was given up (`Moved.failed`). Blocks at most `timeout_s`."""
        if not self._ended:
            self._ended = True
            self._feeder.submit(self._put_ends)
        until = time.monotonic() + timeout_s
        for lane in self._lanes:
            lane.thread.join(max(0.0, until - time.monotonic()))
            if lane.thread.is_alive():
                late = f"was not done with decode rank {lane.receiver} in {timeout_s:.1f} s"
                self.fail(PeerTimeout(f"prefill rank {self.rank} {late}"))
        self._feeder.shutdown(wait=False)
        with self._lock:
            return self._moved

    def abandon(self, why: str) -> None:
        """Give it up, and tell the receivers so. May be repeated; does not wait."""
        self._ended = True
        self.fail(RankLost(f"prefill rank {self.rank} gave the hand-off up: {why}"))
        self._feeder.shutdown(wait=False)

    def fail(self, error: BaseException) -> None:
        """The first failure is the one to tell. For the lanes too."""
        with self._lock:
            if self._moved.failed is None:
                told = isinstance(error, Told)
                note = (
                    error.note if isinstance(error, Told) else failed_note(self.plan.fence, error)
                )
                self._moved = msgspec.structs.replace(self._moved, failed=note, hearsay=told)
            self.stop.set()

    def begun(self) -> None:
        """For the lanes: the first pages go."""
        if self._began is None:
            self._began = time.monotonic()

    def failure(self) -> FailedNote | None:
        with self._lock:
            return self._moved.failed

    def count(self, pages: int, payload_bytes: int, bad_pages: int) -> None:
        """For the lanes: what a receiver has taken."""
        with self._lock:
            self._moved = msgspec.structs.replace(
                self._moved,
                pages=self._moved.pages + pages,
                payload_bytes=self._moved.payload_bytes + payload_bytes,
                bad_pages=self._moved.bad_pages + bad_pages,
                elapsed_s=time.monotonic() - (self._began or time.monotonic()),
            )

    # on the feeder's thread

    def _put_ends(self) -> None:
        for lane in self._lanes:
            lane.waiting.put(None)

    def _feed(self, layers: planes.Layers, pages: Pages, ready: torch.cuda.Event | None) -> None:
        if self.stop.is_set():
            return
        try:
            sums: list[list[int]] = []
            if not self.recodes:
                lengths = [span.tokens for span, _ in pages]
                with side_stream(self.shard.device, ready):
                    sums = planes.all_page_sums(
                        layers, self.shard.specs, lengths, self.shard.page_tokens, pages[0][1]
                    )
            self._cut(layers, pages, sums, ready)
        except Exception as error:
            self.fail(error)

    def _cut(
        self,
        layers: planes.Layers,
        pages: Pages,
        sums: Sequence[Sequence[int]],
        ready: torch.cuda.Event | None,
    ) -> None:
        """Into parcels, each in its receiver's queue."""
        form, step = self.plan.form, self.plan.form.page_tokens
        most = PARCEL_BYTES[self.shard.device.type]
        at = 0
        while at < len(pages):
            span, row = pages[at]
            first = span.start // step
            place = self._places[first]
            stop = at + 1
            while stop < len(pages) and (stop + 1 - at) * form.bytes_of(span.tokens) <= most:
                behind = pages[stop][0]
                there = self._places[first + stop - at] if behind.tokens == span.tokens else None
                if behind.start != pages[stop - 1][0].stop or there is None:
                    break
                if there.receiver != place.receiver:
                    break
                stop += 1
            of_these = tuple(tuple(one) for one in sums[at:stop])
            batch = Batch(first, stop - at, span.tokens, row, layers, of_these, ready)
            self._lanes[place.receiver].waiting.put(batch)
            at = stop
