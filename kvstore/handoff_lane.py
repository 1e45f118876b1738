"""What one rank sends to one receiver of a hand-off: gathers (or recodes) a few pages, sends them,
hears of the ones before, and with nothing to send says that it lives. A thread of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch

from ringspan.attention.kv import cut_units
from ringspan.errors import CorruptPage
from ringspan.kvstore import planes
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.handoff import (
    BEATS,
    RESENDS,
    WINDOW,
    AliveNote,
    EndNote,
    FailedNote,
    PageNote,
    PagesNote,
    TakenNote,
    Told,
    decode_note,
    encode_note,
)
from ringspan.kvstore.pair import Road, Sent, Spare, lost_peer, side_stream
from ringspan.kvstore.shard import ContextShard
from ringspan.types import Span

if TYPE_CHECKING:
    from ringspan.kvstore.handoff_send import Sending

Join = Callable[[int], Road]
"""The road to a peer, by its rank in its gang; blocks until it has come."""


class Batch(NamedTuple):
    """Pages that go as one parcel: neighbours in the context, in the shard and at the receiver."""

    first: int
    """Index of the first among the context's pages."""
    pages: int
    tokens: int
    """Of each."""
    row: int
    """In the sender's shard."""
    layers: planes.Layers
    sums: tuple[tuple[int, ...], ...]
    """Of each page and layer; empty where the pages are recoded."""
    ready: torch.cuda.Event | None
    """The compute stream has written them."""


class Lane:
    """What one rank sends to one receiver; a thread of its own."""

    def __init__(self, whole: Sending, receiver: int, join: Join) -> None:
        self._whole, self.receiver, self._join = whole, receiver, join
        self.waiting: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        """None: there is no more."""
        self._number = 0
        self._open: dict[int, tuple[Batch | None, Sent, torch.Tensor | None]] = {}
        """Parcels that were not answered yet, with the buffer that each lies in."""
        self._tries: dict[int, int] = {}
        """How often a page came wrong."""
        self._spare = Spare(whole.shard.device, WINDOW)
        self._pages = 0
        self.thread = threading.Thread(target=self._run, name=f"handoff-to-{receiver}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def _run(self) -> None:
        try:
            road = self._join(self.receiver)
        except Exception as error:
            self._whole.fail(error)
            return
        try:
            with side_stream(self._whole.shard.device, None):
                self._serve(road)
        except Exception as error:
            if not isinstance(error, _GivenUp):
                self._whole.fail(error)
            self._tell(road, error)
        finally:
            self._open.clear()
            road.close()

    def _serve(self, road: Road) -> None:
        while True:
            while len(self._open) >= WINDOW:
                self._hear(road)
            try:
                batch = self.waiting.get(timeout=self._whole.plan.timeout_s / BEATS)
            except queue.Empty:
                self._send(road, AliveNote(fence=self._whole.plan.fence, number=self._number))
                self._hear_all(road)
                continue
            if batch is not None:
                self._send_pages(road, batch)
                continue
            self._hear_all(road)
            if self.waiting.empty():  # nothing came back to be sent again
                break
            self.waiting.put(None)
        end = EndNote(fence=self._whole.plan.fence, number=self._number, num_pages=self._pages)
        self._send(road, end)
        self._hear_all(road)

    def _send_pages(self, road: Road, batch: Batch) -> None:
        self._whole.begun()
        payload, sums = self._payload(batch)
        notes = tuple(
            PageNote(batch.first + i, self._whole.keys[batch.first + i], tuple(sums[i]))
            for i in range(batch.pages)
        )
        note = PagesNote(fence=self._whole.plan.fence, number=self._number, pages=notes)
        self._send(road, note, batch, payload)

    def _send(
        self,
        road: Road,
        note: PagesNote | AliveNote | EndNote,
        batch: Batch | None = None,
        payload: torch.Tensor | None = None,
    ) -> None:
        self._check()
        sent = road.send(encode_note(note), payload)
        self._open[self._number] = (batch, sent, payload)
        self._number += 1

    def _hear_all(self, road: Road) -> None:
        while self._open:
            self._hear(road)

    def _hear(self, road: Road) -> None:
        """One answer; one to a parcel that came twice says nothing new."""
        self._check()
        note = decode_note(road.recv(_no_payload), self._whole.plan.fence, road.peer)
        if isinstance(note, FailedNote):
            raise Told(note)
        if not isinstance(note, TakenNote):
            raise CorruptPage(f"{road.peer} sent a {type(note).__name__} where an answer should be")
        batch, sent, payload = self._open.pop(note.number, (None, None, None))
        if sent is not None:
            sent.wait()
        if payload is not None:
            self._spare.give_back(payload)
        if batch is not None:
            self._settle(road, batch, note.bad)

    def _settle(self, road: Road, batch: Batch, bad: Sequence[int]) -> None:
        indices = range(batch.first, batch.first + batch.pages)
        if any(index not in indices for index in bad):
            raise CorruptPage(f"{road.peer} complains of pages {bad}, which were not in the parcel")
        good = batch.pages - len(bad)
        self._pages += good
        size = self._whole.plan.form.bytes_of(batch.tokens)
        self._whole.count(good, good * size, len(bad))
        for index in bad:
            self._tries[index] = self._tries.get(index, 0) + 1
            if self._tries[index] > RESENDS:
                raise CorruptPage(
                    f"page {self._whole.keys[index][:16]} of {self._whole.plan.fence} came to "
                    f"{road.peer} wrong {self._tries[index]} times: what lies between it and "
                    f"prefill rank {self._whole.rank} changes bytes"
                )
            at = index - batch.first
            self.waiting.put(
                batch._replace(
                    first=index,
                    pages=1,
                    row=batch.row + at * batch.tokens,
                    sums=batch.sums[at : at + 1],
                )
            )

    def _payload(self, batch: Batch) -> tuple[torch.Tensor, Sequence[Sequence[int]]]:
        """The batch's bytes, one page behind the other, and the plane sums of each."""
        whole = self._whole
        shard, page_bytes = whole.shard, whole.plan.form.bytes_of(batch.tokens)
        if batch.ready is not None:
            torch.cuda.current_stream(shard.device).wait_event(batch.ready)
        room = self._spare.take(batch.pages * page_bytes)
        rows = room.view(batch.pages, page_bytes)
        if not whole.recodes:
            planes.gather(batch.layers, shard.specs, batch.row, batch.tokens, rows)
            return room, batch.sums
        recoded = self._recoded(batch)
        recoded.gather(0, batch.tokens, rows)
        return room, recoded.all_plane_sums()

    def _recoded(self, batch: Batch) -> ContextShard:
        """These pages in the plan's codec."""
        shard, form = self._whole.shard, self._whole.plan.form
        tokens, start = batch.pages * batch.tokens, batch.first * form.page_tokens
        made = ContextShard(
            codec(form.codec),
            form.num_layers,
            form.num_kv_heads,
            form.head_dim,
            shard.dtype,
            shard.device,
            tokens,
            form.page_tokens,
        )
        made.reserve((Span(start, start + tokens),))
        shape = (2, tokens, form.num_kv_heads, form.head_dim)
        k, v = torch.empty(shape, dtype=shard.dtype, device=shard.device)
        for layer, held in enumerate(batch.layers):
            units = cut_units(held, shard.specs, batch.row, batch.row + tokens)
            shard.codec.decode(units, k, v)
            made.write(layer, k, v)
        return made

    def _check(self) -> None:
        if self._whole.stop.is_set():
            raise _GivenUp

    def _tell(self, road: Road, error: Exception) -> None:
        """The receiver that it is given up, unless it knows or is gone."""
        failed = self._whole.failure()
        if failed is None or isinstance(error, Told) or lost_peer(road, error):
            return
        note = msgspec.structs.replace(failed, number=self._number, fence=self._whole.plan.fence)
        try:
            road.send(encode_note(note)).wait()
            while not isinstance(
                decode_note(road.recv(_no_payload), self._whole.plan.fence, road.peer), FailedNote
            ):
                pass
        except Exception:
            return  # it has gone already, or hears of it when the road ends


def _no_payload(note: bytes) -> None:
    return None


class _GivenUp(Exception):
    """Another lane failed."""
