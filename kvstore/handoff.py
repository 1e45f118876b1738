"""Handing a context over from the ranks that prefill it to others that answer from it.

    sender s ──── PagesNote + payload ───► receiver r      as soon as a chunk is sealed
             ◄─── TakenNote (bad pages) ──                 every parcel is answered

Which pages a receiver gets follows from the plan alone, whoever sends them: every stretch of the
context is dealt to the receivers by a layout, so that all of them take their share of each chunk,
and the senders may deal it to themselves as they like. Pages travel in the form that they are held
in, or recoded before they are sent (kvstore/handoff_send.py, kvstore/handoff_take.py).

**Fence.** Every note carries (context, epoch, checksum). The epoch is that of the offer: it counts
up whenever senders begin the context anew, so what was meant for an earlier prefill is refused. The
checksum covers form, origin and all page keys, which either side makes from its own tokens and its
own model: a receiver cannot be given another prompt's pages, nor those of another model.

**Verification.** A sender sums the planes of the rows that it holds, a receiver those of the rows
that it filled; between them lie every copy and the wire. A page whose sums differ is sent again;
nothing can be read before all pages of all receivers are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
from blake3 import blake3

from ringspan.attention.layout import deal
from ringspan.errors import BadInput, CorruptPage, PeerTimeout, RankLost, RingspanError, StoreError
from ringspan.kvstore.leases import StaleHandle
from ringspan.kvstore.page import Origin, PageForm, differences
from ringspan.types import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 30.0
"""How long a rank waits for a word of its peer before it names it and gives up."""
JOIN_TIMEOUT_S = 60.0
"""For both ends of a pair to come: their processes are busy with other things until then."""
BEATS = 4
"""Words within that time from a sender that has nothing to send."""
WINDOW = 2
"""Parcels of one pair on their way: one is checked while the next one comes."""
RESENDS = 2
"""Of a page that arrives wrong, before the hand-off is given up."""
PARCEL_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Of payload in one parcel; a page that is larger goes alone."""


class Fence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which prefill of which context: a reference that differs in anything is refused."""

    context_id: str
    epoch: int
    checksum: str
    """Of form, origin and page keys, see `checksum_of`."""

    def __str__(self) -> str:
        return f"context {self.context_id} (epoch {self.epoch}, checksum {self.checksum[:12]})"


class HandoffPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """controller -> every rank of both gangs: what is handed over, and how it is dealt."""

    handoff_id: str
    fence: Fence
    form: PageForm
    """Of the pages on the wire and at the receivers."""
    origin: Origin
    num_tokens: int
    stretches: tuple[Span, ...]
    """Tile [0, num_tokens) at pages; each is dealt to all receivers."""
    layout: str = "contiguous"
    """Of a stretch over the receivers."""
    senders: int
    receivers: int
    address: str = ""
    """Host and port of the store that the pairs meet by."""
    port: int = 0
    timeout_s: float = TIMEOUT_S
    join_timeout_s: float = JOIN_TIMEOUT_S

    def spans_of(self, receiver: int) -> tuple[Span, ...]:
        """What a receiver will hold, in memory order; touching spans are not joined."""
        return tuple(
            span
            for stretch in self.stretches
            for span in deal(self.layout, stretch, self.receivers, self.form.page_tokens)[receiver]
        )

    def places(self) -> list[Place]:
        """Of each page of the context, in position order: who takes it, and into which row."""
        step = self.form.page_tokens
        found: list[Place | None] = [None] * -(-self.num_tokens // step)
        for receiver in range(self.receivers):
            row = 0
            for span in self.spans_of(receiver):
                for start in range(span.start, span.stop, step):
                    found[start // step] = Place(receiver, row)
                    row += min(step, span.stop - start)
        return [place for place in found if place is not None]


class Place(NamedTuple):
    """Where a page goes."""

    receiver: int
    row: int
    """The first of its rows in the receiver's shard."""


class PageNote(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A page within a parcel."""

    index: int
    """Among the context's pages."""
    key: str
    sums: tuple[int, ...]
    """One unsigned 64-bit sum per layer, of the sender's rows; see `kvstore.planes`."""


class Note(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of what stands before a payload, or alone."""

    fence: Fence
    number: int
    """Of the parcel on its pair, counted by the sender; an answer has that of what it answers."""


class PagesNote(Note, frozen=True, kw_only=True):
    """sender -> receiver: the payloads of these pages follow, one behind the other. They are
    neighbours in the context and equally long."""

    pages: tuple[PageNote, ...]


class AliveNote(Note, frozen=True, kw_only=True):
    """sender -> receiver: nothing to send yet."""


class EndNote(Note, frozen=True, kw_only=True):
    """sender -> receiver: that was all."""

    num_pages: int


class TakenNote(Note, frozen=True, kw_only=True):
    """receiver -> sender: the parcel is dealt with."""

    bad: tuple[int, ...] = ()
    """Pages whose sums differ: send them again."""


class FailedNote(Note, frozen=True, kw_only=True):
    """Either way: the hand-off is given up, and by what. The first rank that saw it says so, all
    others pass it on."""

    kind: str
    text: str


AnyNote = PagesNote | AliveNote | EndNote | TakenNote | FailedNote
encode_note = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AnyNote).decode


class Moved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """rank -> controller: what it sent or took."""

    rank: int
    pages: int = 0
    payload_bytes: int = 0
    bad_pages: int = 0
    """Whose sums differed on arrival; they came again."""
    duplicate_pages: int = 0
    """That came although they were there; dropped."""
    elapsed_s: float = 0.0
    """From the first parcel of pages until the last one was verified, waits for a prefill that is
    still running included."""
    failed: FailedNote | None = None
    """What it was given up by; nothing of it can be read then."""
    hearsay: bool = False
    """The failure was told by a peer."""


def checksum_of(form: PageForm, origin: Origin, keys: Sequence[str]) -> str:
    """Of a fence: 32 hex characters. keys: of all pages of the context, in position order."""
    digest = blake3(b"ringspan handoff v1\0")
    for part in (form, origin, tuple(keys)):
        data = msgspec.msgpack.encode(part)
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest(length=16)


def decode_note(data: bytes, fence: Fence, peer: str) -> AnyNote:
    """A note of this hand-off. Raises `StaleHandle` for one of another, `CorruptPage` for what is
    no note."""
    try:
        note = _decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptPage(
            f"what {peer} sent about {fence} cannot be read ({error}): hand the context over again"
        ) from None
    check_fence(note.fence, fence, f"what {peer} sent is of")
    return note


def check_fence(found: Fence, wanted: Fence, what: str) -> None:
    """`StaleHandle` unless both are the same. what: `what decode rank 1 sent is of`."""
    if found == wanted:
        return
    if found.context_id != wanted.context_id:
        why = "another context"
    elif found.epoch != wanted.epoch:
        why = "an earlier prefill of it" if found.epoch < wanted.epoch else "a later prefill of it"
    else:
        why = "other tokens, another model or another form of pages"
    raise StaleHandle(f"{what} {found}, wanted {wanted}: {why}; ask for the context anew")


def check_plan(plan: HandoffPlan, keys: Sequence[str]) -> None:
    """The plan against the page keys that this rank made itself. Raises `StaleHandle`, BadInput."""
    found = Fence(
        plan.fence.context_id, plan.fence.epoch, checksum_of(plan.form, plan.origin, keys)
    )
    check_fence(plan.fence, found, "the offer is of")
    if plan.senders < 1 or plan.receivers < 1:
        raise BadInput(
            f"a hand-off from {plan.senders} ranks to {plan.receivers}: each side needs one"
        )
    position = 0
    for stretch in plan.stretches:
        if stretch.start != position or position % plan.form.page_tokens or not stretch.tokens:
            raise BadInput(
                f"hand-off {plan.handoff_id}: stretch [{stretch.start}, {stretch.stop}) where one "
                f"from {position} on, cut at pages of {plan.form.page_tokens}, should be"
            )
        position = stretch.stop
    if position != plan.num_tokens or len(keys) != len(plan.places()):
        raise BadInput(
            f"hand-off {plan.handoff_id}: its stretches hold {position} tokens, the context has "
            f"{plan.num_tokens} in {len(keys)} pages"
        )


def check_form(plan: HandoffPlan, form: PageForm, whose: str) -> None:
    """BadInput unless the plan's pages are of this form."""
    if plan.form != form:
        raise BadInput(
            f"hand-off of {plan.fence}: its pages do not fit {whose}: "
            f"{differences(form, plan.form)}"
        )


_KINDS: dict[str, type[RingspanError]] = {
    kind.__name__: kind
    for kind in (BadInput, CorruptPage, PeerTimeout, RankLost, StaleHandle, StoreError)
}


def failed_note(fence: Fence, error: BaseException, number: int = 0) -> FailedNote:
    """What went wrong, in words that can be sent."""
    kind = type(error).__name__ if type(error).__name__ in _KINDS else RankLost.__name__
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, RingspanError):
        text = f"{type(error).__name__}: {text}"
    return FailedNote(fence=fence, number=number, kind=kind, text=text.splitlines()[0])


def error_of(note: FailedNote) -> RingspanError:
    return _KINDS.get(note.kind, RankLost)(note.text)


class Told(RingspanError):
    """A peer said that the hand-off is given up; `note` says by what."""

    def __init__(self, note: FailedNote) -> None:
        super().__init__(note.text)
        self.note = note

    def __reduce__(self) -> tuple[object, ...]:
        return Told, (self.note,)
