"""Chances of a simulated run, drawn so that the same seed gives the same run.

Faults at calls are drawn from what the call is (`keyed`: seed, step, operation, name, how often it
was made in this step), not from how many calls came before: the order in which a set is walked, or
a call more somewhere else, changes no other draw.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Hashable

import xxhash

from ringspan.errors import RingspanError

LAST_EVENTS = 20
"""That a run which found something wrong tells of."""


class Killed(BaseException):
    """The process that made this call is dead. No error of ours: nobody may catch it and go on."""


class Broken(RingspanError):
    """A promise of the store was broken; the text says which, and how to see it again."""


class Chance:
    """Draws, the clock, the counts of faults and the last events of one run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.step = 0
        self.rates: dict[str, float] = {}
        """By kind of fault: how likely it is at a call where it can be. Empty: calm."""
        self.faults: Counter[str] = Counter()
        self.events: deque[str] = deque(maxlen=LAST_EVENTS)
        self.digest = xxhash.xxh3_64()
        """Of all events: equal for equal runs."""
        self.monotonic_s = 1000.0
        self.wall_s = 1.7e9
        self._calls: Counter[tuple[Hashable, ...]] = Counter()
        self._names = random.Random(seed ^ 0x5EED)

    def next_step(self) -> None:
        self.step += 1
        self._calls.clear()

    def keyed(self, *what: str) -> random.Random:
        """A source of draws for this very call."""
        self._calls[what] += 1
        text = f"{self.seed} {self.step} {' '.join(what)} {self._calls[what]}"
        return random.Random(xxhash.xxh3_64_intdigest(text.encode()))

    def strikes(self, draw: random.Random, kind: str) -> bool:
        """Whether a fault of this kind comes here; it is then counted and told."""
        rate = self.rates.get(kind, 0.0)
        return bool(rate) and draw.random() < rate

    def count(self, kind: str, what: str) -> None:
        """A fault was injected."""
        self.faults[kind] += 1
        self.tell(f"fault {kind}: {what}")

    def tell(self, text: str) -> None:
        line = f"step {self.step} at {self.monotonic_s:.3f} s: {text}"
        self.events.append(line)
        self.digest.update(line.encode())

    def spend(self, seconds: float) -> None:
        """Simulated time goes by."""
        self.monotonic_s += seconds
        self.wall_s += seconds

    def token_hex(self, count: int = 16) -> str:
        """`secrets.token_hex`, the same in every run."""
        return self._names.randbytes(count).hex()

    def broken(self, what: str) -> Broken:
        told = "\n  ".join(self.events)
        return Broken(
            f"{what}; seed {self.seed}, step {self.step}, after {self.faults.total()} faults: run "
            f"it again with this seed. Last events:\n  {told}"
        )


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One bit of it is another; nothing of nothing."""
    if not data:
        return data
    at = draw.randrange(8 * len(data))
    changed = bytearray(data)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)
