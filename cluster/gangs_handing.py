"""Hand-offs between the gangs of `gangs_placed.py`: begun between two chunks, ended or given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from ringspan.cluster.events import PauseEvent, PrefillPaused, PrefillResumed
from ringspan.cluster.gangs_ledger import Ledger
from ringspan.cluster.gangs_types import LoggedHandoff, Member, Work
from ringspan.cluster.handing import HandedOver, HandingOver
from ringspan.cluster.metrics import Metrics
from ringspan.errors import RingspanError
from ringspan.kvstore.fidelity import Fidelity
from ringspan.kvstore.keys import PUBLIC_NAMESPACE

Write = Callable[[str, str, msgspec.Struct], None]


class HandsOver:
    """All hand-offs of some gangs. A caller has the turns of the gangs that it names."""

    def __init__(
        self,
        ledger: Ledger,
        namespace: bytes,
        epochs: Iterator[int],
        write: Write,
        metrics: Metrics | None,
        silence_s: float,
    ) -> None:
        """silence_s: of a rank of the other gang, after which a hand-off is given up."""
        self._silence_s = silence_s
        self.ledger, self._epochs, self._write = ledger, epochs, write
        self._namespace = "" if namespace == PUBLIC_NAMESPACE else namespace.hex()
        self._metrics = metrics

    def held(self, member: Member, name: str) -> bool:
        return any(handle.context_id == name for handle in member.controller.contexts)

    def usable(self, member: Member, work: Work) -> bool:
        """Whether the gang has the context, in a form that the request takes."""
        lowest = Fidelity.SIXTEEN_BIT if work.ask.lowest_bits > 8 else Fidelity.EIGHT_BIT
        found = [one for one in member.controller.contexts if one.context_id == work.name]
        return any(one.fidelity >= lowest for one in found)

    def between_chunks(self, work: Work) -> BetweenChunks:
        return BetweenChunks(self, work)

    def begin(self, work: Work) -> None:
        """From the gang that prefills, where the context is begun or whole, to the one that will
        decode. Raises what `HandingOver.begin` does."""
        wire = work.placed.decode.wire
        codec_name = "" if wire == "raw" else wire
        work.handing = self._begin(
            work.prefill, work.decode, work.name, work.ask.context, codec_name
        )

    def finish(self, work: Work) -> None:
        """Once the prefill is done: the decoding gang has the context, or, whatever went wrong, the
        work is one that stays in place."""
        a, b, name = work.prefill, work.decode, work.name
        try:
            if work.handing is None:
                if self.usable(b, work):
                    return
                if self.held(b, name):  # in a form that this request does not take
                    b.controller.drop(name)
                self.begin(work)
            assert work.handing is not None
            work.handed = self._finish(work.handing, a, b, work.ask.context)
        except RingspanError as error:
            self.gave_up(work, error)
            self.ledger.stays(work)
        work.handing = None

    def gave_up(self, work: Work, error: RingspanError) -> None:
        epoch = work.handing.plan.fence.epoch if work.handing is not None else 0
        self._failed(work.prefill, work.decode, work.name, epoch, error)

    def fetch(self, work: Work, owner: Member, prefix_id: str) -> None:
        """A whole context that another gang holds, for this work's to begin with. What fails is
        logged; then the pages are to be had otherwise."""
        to, tokens = work.prefill, self.ledger.tokens_of(prefix_id)
        if tokens is None or self.held(to, prefix_id) or not self.held(owner, prefix_id):
            return
        wire, handing = work.placed.chosen.wire, None
        if owner.gang.lost or wire != "raw":  # what is built on must be as exact as it is
            return
        holding = self.ledger.fetching(work, prefix_id, len(tokens))
        if holding is None:
            return
        try:
            handing = self._begin(owner, to, prefix_id, tokens, "")
            self._finish(handing, owner, to, tokens)
        except RingspanError as error:
            self.ledger.not_fetched(work, holding)
            epoch = handing.plan.fence.epoch if handing is not None else 0
            self._failed(owner, to, prefix_id, epoch, error)

    def clear_away(self, member: Member) -> None:
        """Hand-offs to the gang that others gave up while it was not their turn."""
        while member.overdue:
            handing, why = member.overdue.pop()
            handing.abandon(why)

    def _begin(
        self, sender: Member, to: Member, name: str, tokens: np.ndarray, codec_name: str
    ) -> HandingOver:
        epoch = next(self._epochs)
        handing = HandingOver.begin(
            sender.gang,
            to.gang,
            name,
            tokens,
            epoch=epoch,
            codec_name=codec_name,
            namespace=self._namespace,
            timeout_s=self._silence_s,
            join_timeout_s=self._silence_s,
        )
        self._log(sender, to, name, epoch, "begun")
        return handing

    def _finish(
        self, handing: HandingOver, sender: Member, to: Member, tokens: np.ndarray
    ) -> HandedOver:
        handed = handing.finish()
        to.controller.take_over(handing.plan, tokens, handed.opened)
        self._log(sender, to, handed.context_id, handed.epoch, "done", handed.payload_bytes)
        if self._metrics is not None:
            self._metrics.handed_over(handed)
        return handed

    def _failed(
        self, sender: Member, to: Member, name: str, epoch: int, error: RingspanError
    ) -> None:
        self._log(sender, to, name, epoch, str(error))
        if self._metrics is not None:
            self._metrics.handoff_failed(error)

    def _log(
        self, sender: Member, to: Member, name: str, epoch: int, outcome: str, size: int = 0
    ) -> None:
        line = LoggedHandoff(
            sender=sender.number,
            receiver=to.number,
            epoch=epoch,
            outcome=outcome,
            payload_bytes=size,
        )
        self._write("handoff", name, line)


class BetweenChunks:
    """The interlude of one prefill: its hand-off begins in the first gap in which the gang that
    will decode is free, and anew, under a newer epoch, once the prefill was mended."""

    def __init__(self, handing: HandsOver, work: Work) -> None:
        self._handing, self._work = handing, work
        self._given_up = work.in_place

    def wanted(self) -> bool:
        """Takes the other gang's turn, for `play`, if it is free."""
        work = self._work
        if self._given_up or work.handing is not None:
            return False
        return work.decode.turn.acquire(blocking=False)

    def play(self) -> None:
        work = self._work
        to = work.decode
        try:
            if to.gang.lost or to.gone or self._handing.held(to, work.name):
                self._given_up = True  # left for the time behind the prefill
                return
            self._handing.clear_away(to)
            self._handing.begin(work)
        except RingspanError as error:
            self._handing.gave_up(work, error)
            self._given_up = True
            if work.prefill.gang.lost:
                raise
        finally:
            to.turn.release()

    def on_pause(self, event: PauseEvent) -> None:
        work = self._work
        if isinstance(event, PrefillPaused):
            if work.handing is not None:
                work.decode.overdue.append((work.handing, event.reason))
                work.handing = None
        elif isinstance(event, PrefillResumed) and event.replaced:
            self._handing.ledger.lost(work.prefill, event.replaced)
            self._handing.ledger.held_again(work, work.prefill)
