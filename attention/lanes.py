"""Two counters between each pair of ranks, and nothing else said: the protocol of copy-engine
exchanges (attention/symmetric.py), without a device.

Every rank has a window of slots for each peer. The messages from one rank to another are a stream
of bytes, cut into slots; both ends know all sizes, so both cut alike. The n-th slot of a stream:

    put   wait freed[peer] >= n - slots + 1    copy into slot n mod slots    arrived[me] = n + 1
    take  wait arrived[peer] >= n + 1          copy out of slot n mod slots  freed[me] = n + 1

Each waits for a counter of its own, which the peer writes, and then writes the peer's. An exchange
enqueues slot after slot: all puts, then all takes, then the next slot of each. So whatever a step
waits for was enqueued by the peer for an earlier slot, or is one of its puts of the same slot: no
rank waits for ever, even if hardware ran all of a rank's steps one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NUM_SLOTS = 4
SLOT_BYTES = 16 << 20
"""45 us at 374 GB/s (NVLink of an H100), more than the host needs to enqueue it; 64 MiB a peer."""
_ALIGN = 256
"""Bytes; every copy starts where copy engines like it."""
CYCLE = 1 << 32
"""Counters are 32 bits wide and go round."""


class Piece(NamedTuple):
    """Bytes [start, stop) of a message, at byte `at` of a slot."""

    message: int
    start: int
    stop: int
    at: int


class Step(NamedTuple):
    """One slot put to, or taken from, `peer`."""

    put: bool
    peer: int
    pieces: tuple[Piece, ...]
    """What the slot holds; messages are numbered as they were given, sends and receives apart."""
    slot: int
    wait: int | None
    """What our counter for the peer must have reached: `freed` for a put, `arrived` for a take."""
    say: int
    """What the peer's counter for us becomes: `arrived` after a put, `freed` after a take."""


class Lanes:
    """Counts what went to and came from each peer, and cuts exchanges into steps."""

    def __init__(self, num_slots: int = NUM_SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        self._num_slots, self._slot_bytes = num_slots, slot_bytes
        self._next: dict[tuple[bool, int], int] = {}

    def steps(
        self, sends: Sequence[tuple[int, int]], recvs: Sequence[tuple[int, int]]
    ) -> list[Step]:
        """(peer, bytes) of each message -> what to enqueue, in this order."""
        rounds: dict[tuple[bool, int], list[tuple[Piece, ...]]] = {}
        for put, messages in ((True, sends), (False, recvs)):
            for peer in dict.fromkeys(peer for peer, _ in messages):
                sizes = [(at, size) for at, (to, size) in enumerate(messages) if to == peer]
                rounds[put, peer] = cut(sizes, self._slot_bytes)
        steps = []
        for number in range(max(map(len, rounds.values()), default=0)):
            for (put, peer), slots in rounds.items():  # puts came first
                if number < len(slots):
                    steps.append(self._step(put, peer, slots[number]))
        return steps

    def far_ahead(self, put: bool, peer: int) -> int:
        """A counter that every wait enqueued so far, and many to come, has reached."""
        return (self._next.get((put, peer), 0) + CYCLE // 4) % CYCLE

    def _step(self, put: bool, peer: int, pieces: tuple[Piece, ...]) -> Step:
        count = self._next.get((put, peer), 0)
        self._next[put, peer] = count + 1
        wait: int | None = count + 1
        if put:
            wait = None if count < self._num_slots else count - self._num_slots + 1
        return Step(
            put,
            peer,
            pieces,
            count % self._num_slots,
            None if wait is None else wait % CYCLE,
            (count + 1) % CYCLE,
        )


def cut(sizes: Sequence[tuple[int, int]], slot_bytes: int) -> list[tuple[Piece, ...]]:
    """(message, bytes) in order -> what each slot holds. Slots are a multiple of 256 bytes, and so
    is where a piece begins, in its slot and in its message."""
    slots: list[tuple[Piece, ...]] = []
    pieces: list[Piece] = []
    at = 0
    for message, size in sizes:
        start = 0
        while start < size:
            if at >= slot_bytes:
                slots.append(tuple(pieces))
                pieces, at = [], 0
            stop = min(size, start + slot_bytes - at)
            pieces.append(Piece(message, start, stop, at))
            at += -(-(stop - start) // _ALIGN) * _ALIGN
            start = stop
    if pieces:
        slots.append(tuple(pieces))
    return slots


def reached(counter: int, value: int) -> bool:
    """As the device compares: cyclic, within half a cycle."""
    return (counter - value) % CYCLE < CYCLE // 2
