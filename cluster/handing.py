"""Hands a context over from one gang to another, as the controller sees it.

    handing = HandingOver.begin(prefill_gang, decode_gang, name, token_ids, epoch=...)
    ... chunks of the prefill, each of which goes on its way as it is sealed ...
    handed = handing.finish()         or  handing.abandon(why)

Until `finish` has come back nothing of the context can be read on the receiving gang; what fails
leaves both gangs as they were, but for ranks that died. A prefill that is mended or begun anew is
another one: abandon its hand-off, and begin it again under a newer epoch.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import numpy as np

from ringspan.cluster.gang import Gang, Pending
from ringspan.cluster.handoff import STRETCH_PAGES, Offer
from ringspan.cluster.messages import ShardOpened
from ringspan.errors import PeerTimeout, RankLost, RingspanError, StoreError
from ringspan.kvstore.handoff import JOIN_TIMEOUT_S, TIMEOUT_S, HandoffPlan, Moved, error_of
from ringspan.types import Span

BEGIN_TIMEOUT_S = 120.0
"""For ranks to hash the tokens and take memory for their shares."""
END_TIMEOUT_S = 600.0
"""From the last chunk until every page is verified."""
MARGIN_S = 30.0
"""For a gang's answer beyond the time that its ranks were given."""


@dataclass(frozen=True)
class HandedOver:
    """What it took."""

    context_id: str
    epoch: int
    senders: tuple[Moved, ...]
    receivers: tuple[Moved, ...]
    opened: tuple[ShardOpened, ...]
    """One a receiver, as if it had been opened from a store."""

    @property
    def payload_bytes(self) -> int:
        return sum(moved.payload_bytes for moved in self.receivers)

    @property
    def bad_pages(self) -> int:
        """That came wrong and were sent again."""
        return sum(moved.bad_pages for moved in self.receivers)


class HandingOver:
    """A context on its way. `begin` it; ends with `finish` or `abandon`."""

    def __init__(self, senders: Gang, receivers: Gang, plan: HandoffPlan) -> None:
        self.plan = plan
        self._senders, self._receivers = senders, receivers

    @classmethod
    def begin(
        cls,
        senders: Gang,
        receivers: Gang,
        name: str,
        token_ids: np.ndarray,
        *,
        epoch: int,
        codec_name: str = "",
        namespace: str = "",
        layout: str = "contiguous",
        timeout_s: float = TIMEOUT_S,
        join_timeout_s: float = JOIN_TIMEOUT_S,
    ) -> Self:
        """After `begin_prefill` on the sending gang, or with a context that it holds complete.

        epoch: larger than of any offer of this context before. codec_name: to send the pages in;
        empty: as they are held. token_ids int32 [n] and namespace (hex; empty: the public one) are
        what the receivers make their own page keys of. Raises what the ranks refuse: `StaleHandle`,
        TooLarge, BadInput; RankLost. Neither gang holds anything of it then.
        """
        token_ids = np.ascontiguousarray(token_ids, dtype=np.int32)
        what = f"offering context {name}"
        offers: list[Offer] = senders.call(
            "offer_handoff", name, epoch, codec_name, token_ids, namespace,
            timeout_s=BEGIN_TIMEOUT_S, what=what,
        )  # fmt: skip
        if any(offer != offers[0] for offer in offers):
            raise StoreError(f"{what}: its ranks hold different contexts: prefill it again")
        handoff_id = f"{name}-{epoch}-{secrets.token_hex(4)}"
        what = f"taking context {name} over"
        stores = receivers.call("host_handoff", handoff_id, timeout_s=BEGIN_TIMEOUT_S, what=what)
        address, port = stores[0]
        plan = HandoffPlan(
            handoff_id=handoff_id,
            fence=offers[0].fence,
            form=offers[0].form,
            origin=offers[0].origin,
            num_tokens=offers[0].num_tokens,
            stretches=stretches_of(offers[0], receivers.world_size),
            layout=layout,
            senders=senders.world_size,
            receivers=receivers.world_size,
            address=address,
            port=port,
            timeout_s=timeout_s,
            join_timeout_s=join_timeout_s,
        )
        handing = cls(senders, receivers, plan)
        try:
            receivers.call(
                "begin_receiving", plan, token_ids, namespace,
                timeout_s=BEGIN_TIMEOUT_S, what=what,
            )  # fmt: skip
            senders.call(
                "begin_sending", plan, timeout_s=BEGIN_TIMEOUT_S, what=f"handing {name} over"
            )
        except BaseException as error:
            handing.abandon(str(error) or type(error).__name__)
            raise
        return handing

    def finish(self, timeout_s: float = END_TIMEOUT_S) -> HandedOver:
        """After the last chunk: the receiving gang holds the context, verified. Raises what the
        hand-off was given up by: PeerTimeout or RankLost naming a rank, CorruptPage, `StaleHandle`;
        the receivers hold nothing of it then, and the senders what they held."""
        name = self.plan.fence.context_id
        try:
            ends: list[Pending] = []
            for gang, method in (
                (self._senders, "end_sending"),
                (self._receivers, "end_receiving"),
            ):
                what = f"handing context {name} over ({method.split('_')[1]})"
                ends.append(gang.submit(method, self.plan.handoff_id, timeout_s, what=what))
            results: list[list[Moved]] = []
            lost: RankLost | None = None
            for end in ends:
                try:
                    results.append(end.result(timeout_s + MARGIN_S))
                except RankLost as error:
                    lost = lost or error
            if lost is not None:
                raise lost
            sent, taken = results
            failed = blamed([*sent, *taken])
            if failed is not None:
                raise failed
            opened: list[ShardOpened] = self._receivers.call(
                "install_handoff", self.plan.handoff_id,
                timeout_s=BEGIN_TIMEOUT_S, what=f"taking context {name} over",
            )  # fmt: skip
        except BaseException as error:
            self.abandon(str(error) or type(error).__name__)
            raise
        return HandedOver(name, self.plan.fence.epoch, tuple(sent), tuple(taken), tuple(opened))

    def abandon(self, why: str) -> None:
        """Give it up on both gangs, as far as they live. May be repeated."""
        for gang in (self._senders, self._receivers):
            if not gang.lost:
                with suppress(RingspanError):
                    gang.call(
                        "abandon_handoff", self.plan.handoff_id, why,
                        timeout_s=2 * self.plan.timeout_s + MARGIN_S, what="giving a hand-off up",
                    )  # fmt: skip


def stretches_of(offer: Offer, receivers: int) -> tuple[Span, ...]:
    """What is dealt to the receivers at a time: each chunk of a prefill, so that all of them take
    their share while the next one is computed."""
    if offer.chunks:
        return offer.chunks
    step = STRETCH_PAGES * receivers * offer.form.page_tokens
    starts = range(0, offer.num_tokens, step)
    return tuple(Span(start, min(start + step, offer.num_tokens)) for start in starts)


def blamed(moved: Sequence[Moved]) -> RingspanError | None:
    """What ended the hand-off: what ranks saw themselves before what they were told, what a rank
    did wrong before the silence of one. None where nothing did."""
    failed = [one for one in moved if one.failed is not None]
    if not failed:
        return None
    failed.sort(key=lambda one: (one.hearsay, _error(one)[1]))
    return _error(failed[0])[0]


def _error(moved: Moved) -> tuple[RingspanError, bool]:
    assert moved.failed is not None
    error = error_of(moved.failed)
    return error, isinstance(error, PeerTimeout)
