"""The receiving side of a hand-off, on one rank: see kvstore/handoff.py.

    reader    a thread a sender: the next parcel into one of a few buffers
    settler   a thread a sender: the parcel's pages into rows that nobody can read yet, the sums of
              these rows against those of the sender's, and an answer

Pages may come in any order, from any sender, more than once. When all are there and right,
`finish` says so; the rows become readable by `install`, which is for the controller to call once
every receiver has finished.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch

from ringspan.errors import BadInput, CorruptPage, PeerTimeout, RankLost
from ringspan.kvstore import planes
from ringspan.kvstore.handoff import (
    WINDOW,
    AliveNote,
    AnyNote,
    EndNote,
    FailedNote,
    HandoffPlan,
    Moved,
    PagesNote,
    TakenNote,
    Told,
    check_form,
    check_plan,
    decode_note,
    encode_note,
    failed_note,
)
from ringspan.kvstore.handoff_lane import Join
from ringspan.kvstore.pair import Road, Spare, lost_peer, side_stream
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.tiers.counters import COUNTERS, QUARANTINED, VERIFIED, StoreCounters
from ringspan.kvstore.transfer import reserved_layers
from ringspan.types import coalesce

ROAD = "handoff"
"""As counters name it."""


class Receiving:
    """One rank's share of a context, from all senders.

    shard: empty, of the plan's form, with room for `plan.spans_of(rank)`; its rows are reserved
    here. keys: of all pages, made from the tokens that this side was told of. Ends with `install`
    after a `finish` without failure, or with `abandon`. Raises `StaleHandle` or BadInput where the
    offer is not of these keys.
    """

    def __init__(
        self,
        plan: HandoffPlan,
        rank: int,
        shard: ContextShard,
        keys: Sequence[str],
        join: Join,
        counters: StoreCounters = COUNTERS,
    ) -> None:
        check_plan(plan, keys)
        check_form(plan, shard.form, "the receivers' shards")
        self.plan, self.rank, self.shard, self.keys = plan, rank, shard, keys
        self._counters = counters
        self._rows = {
            index: place.row for index, place in enumerate(plan.places()) if place.receiver == rank
        }
        self._claimed: set[int] = set()
        """Pages that are being filled, or are there and right."""
        self._right: set[int] = set()
        self._moved = Moved(rank=rank)
        self._ends = 0
        self._changed = threading.Condition()
        self._began: float | None = None
        """When the first parcel of pages was announced."""
        self.ready: torch.cuda.Event | None = None
        shard.reserve(coalesce(plan.spans_of(rank)))
        if shard.device.type == "cuda":  # the rows' memory may still be in use by what had it
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(shard.device))
        self._gates = [_Gate(self, sender, join) for sender in range(plan.senders)]
        for gate in self._gates:
            gate.start()

    def finish(self, timeout_s: float) -> Moved:
        """Until all pages of this rank are there and right, or the hand-off was given up
        (`Moved.failed`). Blocks at most `timeout_s`."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._moved.failed is not None or self._ends == self.plan.senders, timeout_s
            )
            missing = len(self._rows) - len(self._right)
        if not done:
            self.fail(
                PeerTimeout(
                    f"decode rank {self.rank} waited {timeout_s:.1f} s for the end of the hand-off "
                    f"of {self.plan.fence}: {missing} of {len(self._rows)} pages are missing"
                )
            )
        elif missing:
            first = min(index for index in self._rows if index not in self._right)
            self.fail(
                CorruptPage(
                    f"{missing} of {len(self._rows)} pages of {self.plan.fence} did not come to "
                    f"decode rank {self.rank}, the first of them page {self.keys[first][:16]}: no "
                    "sender has them; hand the context over again"
                )
            )
        until = time.monotonic() + self.plan.timeout_s
        for gate in self._gates:  # the senders read our last word, then close their roads
            gate.join(max(0.0, until - time.monotonic()))
        with self._changed:
            return self._moved

    def install(self) -> None:
        """The rows may be read. Only after every receiver's `finish` was without failure."""
        with self._changed:
            whole = len(self._right) == len(self._rows) and self._moved.failed is None
        if not whole:
            raise BadInput(f"{self.plan.fence} is not whole on decode rank {self.rank}: finish it")
        self.shard.mark_filled()

    def abandon(self, why: str) -> None:
        """Give it up and tell the senders so; the shard is then as before. Waits for threads that
        may still write to it, at most as long as one of its waits. May be repeated."""
        self.fail(RankLost(f"decode rank {self.rank} gave the hand-off up: {why}"))
        for gate in self._gates:
            gate.join(2 * self.plan.timeout_s)
        if not self.shard.is_complete:
            self.shard.cancel()

    # for the gates

    def fail(self, error: BaseException) -> None:
        """The first failure is the one to tell."""
        with self._changed:
            if self._moved.failed is None:
                told = isinstance(error, Told)
                note = (
                    error.note if isinstance(error, Told) else failed_note(self.plan.fence, error)
                )
                self._moved = msgspec.structs.replace(self._moved, failed=note, hearsay=told)
            self._changed.notify_all()

    def failure(self) -> FailedNote | None:
        with self._changed:
            return self._moved.failed

    def end(self) -> None:
        """One sender has nothing more."""
        with self._changed:
            self._ends += 1
            self._changed.notify_all()

    def begun(self) -> None:
        """The first pages are on their way."""
        if self._began is None:
            self._began = time.monotonic()

    def tokens_of(self, note: PagesNote, peer: str) -> int:
        """Of each page of a parcel, which are this rank's and neighbours. Raises CorruptPage."""
        step, num_tokens = self.plan.form.page_tokens, self.plan.num_tokens
        tokens = 0
        for at, page in enumerate(note.pages):
            index = note.pages[0].index + at
            if page.index != index or index not in self._rows or page.key != self.keys[index]:
                raise CorruptPage(
                    f"{peer} sent page {page.index} with key {page.key[:16]} to decode rank "
                    f"{self.rank}, which {self.plan.fence} has not there: hand it over again"
                )
            here = min(step, num_tokens - index * step)
            if (at and here != tokens) or len(page.sums) != self.plan.form.num_layers:
                raise CorruptPage(
                    f"{peer} sent pages of {tokens} and {here} tokens with {len(page.sums)} sums "
                    "in one parcel: hand the context over again"
                )
            tokens = here
        return tokens

    def take(self, note: PagesNote, payload: torch.Tensor, tokens: int) -> tuple[int, ...]:
        """The parcel's pages into their rows; those that came wrong. Any thread."""
        indices = [page.index for page in note.pages]
        with self._changed:
            new = [index for index in indices if index not in self._claimed]
            self._claimed.update(new)
        rows = payload.view(len(indices), -1)
        bad: list[int] = []
        if len(new) == len(indices):
            bad = self._fill(note, 0, rows, tokens)
        else:
            for at, index in enumerate(indices):
                if index in new:
                    bad += self._fill(note, at, rows[at : at + 1], tokens)
        right = [index for index in new if index not in bad]
        with self._changed:
            self._claimed.difference_update(bad)
            self._right.update(right)
            moved = self._moved
            self._moved = msgspec.structs.replace(
                moved,
                pages=moved.pages + len(right),
                payload_bytes=moved.payload_bytes + len(right) * rows.shape[1],
                bad_pages=moved.bad_pages + len(bad),
                duplicate_pages=moved.duplicate_pages + len(indices) - len(new),
                elapsed_s=time.monotonic() - (self._began or time.monotonic()),
            )
        self._counters.add(VERIFIED, ROAD, len(right))
        self._counters.add(QUARANTINED, ROAD, len(bad))
        return tuple(bad)

    def _fill(self, note: PagesNote, at: int, rows: torch.Tensor, tokens: int) -> list[int]:
        """Neighbouring pages to their rows, which then are summed; those whose sums differ."""
        shard, row = self.shard, self._rows[note.pages[at].index]
        shard.fill(row, tokens, rows)
        held = reserved_layers(shard)
        sums = planes.page_sums(held, shard.specs, row, tokens, len(rows)).tolist()
        pages = note.pages[at : at + len(rows)]
        return [
            page.index for page, found in zip(pages, sums, strict=True) if list(page.sums) != found
        ]


class _Came(NamedTuple):
    """A parcel that was read."""

    note: AnyNote
    payload: torch.Tensor | None
    tokens: int
    """Of each of its pages."""


class _Gate:
    """What one receiver takes from one sender; two threads of its own."""

    def __init__(self, whole: Receiving, sender: int, join: Join) -> None:
        self._whole, self._sender, self._join = whole, sender, join
        self._coming: queue.SimpleQueue[_Came | Exception] = queue.SimpleQueue()
        self._spare = Spare(whole.shard.device, WINDOW + 1)
        self._came: _Came | None = None
        self._settler = threading.Thread(
            target=self._run, name=f"handoff-from-{sender}", daemon=True
        )

    def start(self) -> None:
        self._settler.start()

    def join(self, timeout_s: float) -> None:
        self._settler.join(timeout_s)

    def _run(self) -> None:
        try:
            road = self._join(self._sender)
        except Exception as error:
            self._whole.fail(error)
            return
        reader = threading.Thread(
            target=self._read, args=(road,), name=f"handoff-read-{self._sender}", daemon=True
        )
        reader.start()
        try:
            with side_stream(self._whole.shard.device, self._whole.ready):
                self._settle(road)
        except Exception as error:
            self._whole.fail(error)
            if not lost_peer(road, error):
                self._say_failed(road, 0)
        finally:
            reader.join(2 * self._whole.plan.timeout_s)
            road.close()

    # on the reader's thread

    def _read(self, road: Road) -> None:
        try:
            with side_stream(self._whole.shard.device, self._whole.ready):
                while True:  # until the sender has closed the road: it has read our last word then
                    try:
                        road.recv(lambda data: self._make_room(data, road.peer))
                    except _Refused as error:  # the road is still in step
                        self._coming.put(error.why)
                        continue
                    assert self._came is not None
                    self._coming.put(self._came)
        except Exception as error:
            self._coming.put(error)

    def _make_room(self, data: bytes, peer: str) -> torch.Tensor | None:
        try:
            note = decode_note(data, self._whole.plan.fence, peer)
            self._came = _Came(note, None, 0)
            if not isinstance(note, PagesNote):
                return None
            tokens = self._whole.tokens_of(note, peer)
        except Exception as error:
            raise _Refused(error) from error
        self._whole.begun()
        size = len(note.pages) * self._whole.plan.form.bytes_of(tokens)
        self._came = _Came(note, self._spare.take(size), tokens)
        return self._came.payload

    # on the settler's thread

    def _settle(self, road: Road) -> None:
        whole, fence = self._whole, self._whole.plan.fence
        while True:
            came = self._coming.get()  # the reader puts something within the road's timeout
            if isinstance(came, Exception):
                raise came
            note, payload, tokens = came
            if isinstance(note, FailedNote):
                raise Told(note)
            if whole.failure() is not None:
                self._say_failed(road, note.number)
                return
            bad: tuple[int, ...] = ()
            if isinstance(note, PagesNote) and payload is not None:
                bad = whole.take(note, payload, tokens)
                self._spare.give_back(payload)
            elif not isinstance(note, AliveNote | EndNote):
                raise CorruptPage(f"{road.peer} sent a {type(note).__name__} that answers nothing")
            taken = encode_note(TakenNote(fence=fence, number=note.number, bad=bad))
            if isinstance(note, EndNote):
                whole.end()
                with contextlib.suppress(PeerTimeout):  # all is here, whether it hears so or not
                    road.send(taken).wait()
                return
            road.send(taken).wait()

    def _say_failed(self, road: Road, number: int) -> None:
        """The sender ends the road when it has heard it; until then the reader reads on."""
        failed = self._whole.failure()
        if failed is None:
            return
        note = msgspec.structs.replace(failed, number=number, fence=self._whole.plan.fence)
        with contextlib.suppress(Exception):  # it has gone already, or sees the road end
            road.send(encode_note(note)).wait()


class _Refused(Exception):
    """A parcel that was read and may not be used."""

    def __init__(self, why: Exception) -> None:
        super().__init__(str(why))
        self.why = why
