"""Faults on purpose: a seeded simulation of the store with everything that can go wrong around it.

It drives the classes that ship (store, write-behind, tiers, frames, parity, repair, directory,
journal, leases); only clock, disk and wire are replaced (`edges`). After every step the promises of
the store are checked; every few steps the faults stop and everything must become readable again.
The method is that of deterministic simulation testing: one seed, one run, to be run again
(FoundationDB, https://doi.org/10.1145/3448016.3457559, section 4).
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ringspan.kvstore.faults.chance import Chance
from ringspan.kvstore.faults.edges import installed, memory_folder
from ringspan.kvstore.faults.messages import Talk
from ringspan.kvstore.faults.world import MOST_CONTEXTS, World
from ringspan.kvstore.tiers.placement import TierName

if TYPE_CHECKING:
    from ringspan.kvstore.faults.contexts import Known

CALM_EVERY = 12
"""Steps after which faults stop for a while."""

RATES = {
    "disk error": 0.01,
    "disk full": 0.01,
    "short write": 0.05,
    "short read": 0.02,
    "flip in flight": 0.02,
    "kill": 0.008,
    "power": 0.3,
    "kill host store": 0.02,
    "remote error": 0.04,
    "remote cut": 0.05,
    "wire reset": 0.05,
    "wire drop": 0.05,
    "wire delay": 0.1,
    "wire flip": 0.08,
}
"""Of faults, for each call where they can be; `power`: that a kill is a power cut."""


class FaultReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run injected and what became of it."""

    seed: int
    steps: int
    faults: dict[str, int]
    """By kind."""
    counts: dict[str, int]
    """Reads, and what became of pages and contexts."""
    repairs: int
    repair_mean_s: float
    repair_max_s: float
    """Simulated seconds until a damaged context was whole again."""
    simulated_s: float
    elapsed_s: float
    digest: str
    """Of all events: equal for equal runs."""

    @property
    def num_faults(self) -> int:
        return sum(self.faults.values())

    @property
    def wrong(self) -> int:
        """Pages of wrong KV that were served."""
        return self.counts.get("wrong", 0)

    @property
    def lost(self) -> int:
        """Contexts lost though a copy, parity or their tokens existed."""
        return self.counts.get("lost", 0)


Step = Callable[["Run"], None]


class Run:
    """One simulation."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance = Chance(seed)
        self.world = World(folder, self.chance)
        self.talk = Talk(self.world)

    def go(self, num_faults: int, prepared: Callable[[Run], None] | None = None) -> FaultReport:
        """Until so many faults were injected. Raises `chance.Broken`. prepared: is called before
        the first step."""
        began = time.perf_counter()
        chance, world = self.chance, self.world
        with installed(chance, world.disk, world.host, world.objects):
            self.talk.start()
            if prepared is not None:
                prepared(self)
            while chance.faults.total() < num_faults:
                chance.next_step()
                chance.rates = RATES
                steps, weights = zip(*STEPS, strict=True)
                chance.random.choices(steps, weights)[0](self)
                chance.rates = {}
                self.talk.check()
                if chance.step % CALM_EVERY == 0:
                    self.talk.settle()
                    world.settle()
            self.talk.settle()
            world.settle()
            self.talk.close()
            world.host.close()
        repairs = world.repair_s
        return FaultReport(
            seed=chance.seed,
            steps=chance.step,
            faults=dict(sorted(chance.faults.items())),
            counts=dict(sorted(world.counts.items())),
            repairs=len(repairs),
            repair_mean_s=sum(repairs) / len(repairs) if repairs else 0.0,
            repair_max_s=max(repairs, default=0.0),
            simulated_s=chance.monotonic_s - 1000.0,
            elapsed_s=time.perf_counter() - began,
            digest=chance.digest.hexdigest(),
        )

    # steps

    @property
    def draw(self) -> random.Random:
        return self.chance.random

    def any_context(self) -> Known | None:
        names = sorted(self.world.contexts)
        return self.world.contexts[self.draw.choice(names)] if names else None

    def write(self) -> None:
        if len(self.world.contexts) >= MOST_CONTEXTS:
            self.remove()
        known = self.world.random_context()
        self.world.write(known, self.draw.randint(1, 3), self.draw.random() < 0.4)

    def write_again(self) -> None:
        """The same context once more, which replaces it in one step."""
        known = self.any_context()
        if known is not None:
            self.world.write(known, self.draw.randint(1, 3), False)

    def read(self) -> None:
        known = self.any_context()
        if known is not None:
            self.world.read(known.name, self.draw.randint(1, 3), self.draw.random() < 0.5)

    def move(self) -> None:
        known = self.any_context()
        if known is not None:
            tiers = (self.world.in_host(), self.world.remote(), TierName("disk"))
            to = self.draw.choice(tiers)
            self.world.move(known.name, to, self.draw.random() < 0.6)

    def remove(self) -> None:
        known = self.any_context()
        if known is not None:
            self.world.remove(known.name)

    def mend(self) -> None:
        known = self.any_context()
        if known is not None:
            self.world.mend(known.name)

    def rot(self) -> None:
        for _ in range(self.draw.randint(1, 6)):
            self.world.rot()

    def cut_power(self) -> None:
        self.world.disk.cut_power()
        self.world.revive()

    def kill_host(self) -> None:
        self.world.host.kill("between operations")

    def set_clock(self) -> None:
        """The time of day jumps; the machine sleeps; or a monotonic clock runs backwards."""
        kind = self.draw.randrange(3)
        if kind == 0:
            jump_s = self.draw.uniform(-1e9, 1e9)
            self.chance.count("clock jump", f"time of day by {jump_s:.0f} s")
            self.chance.wall_s += jump_s
        elif kind == 1:
            sleep_s = self.draw.uniform(0.0, 200.0)
            self.chance.count("clock jump", f"asleep for {sleep_s:.0f} s")
            self.chance.spend(sleep_s)
        else:
            self.talk.clock_back_s = self.draw.uniform(0.0, 1000.0)
            self.chance.count("clock jump", f"monotonic back by {self.talk.clock_back_s:.0f} s")

    def messages(self) -> None:
        self.talk.step()


STEPS: list[tuple[Step, int]] = [
    (Run.write, 6),
    (Run.write_again, 1),
    (Run.read, 10),
    (Run.move, 6),
    (Run.remove, 1),
    (Run.mend, 2),
    (Run.rot, 8),
    (Run.cut_power, 1),
    (Run.kill_host, 1),
    (Run.set_clock, 2),
    (Run.messages, 32),
]
"""What may happen, and how often."""


def simulate(
    num_faults: int, seed: int = 0, prepared: Callable[[Run], None] | None = None
) -> FaultReport:
    """Run one seed until so many faults were injected. Raises `chance.Broken`, which tells how to
    see it again. Takes the store's modules of this process for its own meanwhile."""
    with tempfile.TemporaryDirectory(prefix="ringspan-faults-", dir=memory_folder()) as folder:
        return Run(seed, Path(folder)).go(num_faults, prepared)
