"""The directory and those who talk to it, over a wire that drops, repeats, delays and mixes up.

Holders write copies, refer to contexts and withdraw copies by messages; readers take leases by
calls. The oracle (`Told`) keeps what must hold of it in sets, apart from the directory's own maps:

    visible      only what its writer, in its present incarnation, has written whole and published
    references   as many as were taken and not released
    leases       what one is on stays until the reader's own clock says that it is over
    crashes      a directory started anew knows what it knew, or had just been told
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from ringspan.errors import BadInput, RingspanError, StoreError, UnknownName
from ringspan.kvstore.directory import Directory
from ringspan.kvstore.faults.chance import Killed
from ringspan.kvstore.faults.told import Reading, Said, Told, twin_of
from ringspan.kvstore.journal import Journal
from ringspan.kvstore.leases import Lease, StaleHandle, StartedAnew
from ringspan.kvstore.records import AnyRecord, PageEntry, Referred, Released, Shelf, Tier

if TYPE_CHECKING:
    from ringspan.kvstore.faults.world import World

SPACES = ("space-a", "space-b")
HOLDERS = ("gang-0", "gang-1", "host-0")
HISTORY = 200
"""Messages that may come again, however late."""


class Talk:
    """The directory of one run, with its journal on the run's disk."""

    def __init__(self, world: World) -> None:
        self._world, self._chance = world, world.chance
        self.told = Told()
        self.clock_back_s = 0.0
        self._path = Path(world.disk.root) / "directory.journal"
        self._directory: Directory | None = None
        self._runs = 0
        self._pool: list[tuple[float, Said]] = []
        self._history: deque[Said] = deque(maxlen=HISTORY)
        self._readings: list[Reading] = []
        self._count = 0
        self._unsure: Said | None = None
        """Refused since the journal could neither be written nor mended: it may stand there."""
        self._states: tuple[tuple[AnyRecord, ...], ...] = ()
        """That the directory may have when it is started anew."""
        self._made: dict[tuple[str, str], tuple[str, ...]] = {}
        """Contexts by (namespace, id)."""

    @property
    def directory(self) -> Directory:
        assert self._directory is not None
        return self._directory

    @property
    def _is_broken(self) -> bool:
        """It asks to be started anew."""
        journal = self.directory._journal
        return journal is not None and bool(journal._broken)

    def start(self) -> None:
        self._open()
        self._world.beside.append(self)
        for holder in HOLDERS:
            self._join(holder)

    def close(self) -> None:
        if self._directory is not None:
            self._directory.close()

    def _open(self) -> None:
        self._runs += 1
        self._directory = Directory(Journal(self._path), self._now)

    def _now(self) -> float:
        back_s, self.clock_back_s = self.clock_back_s, 0.0
        return self._chance.monotonic_s - back_s

    # one step

    def step(self) -> None:
        """Somebody says something; something arrives; now and then the directory dies."""
        draw = self._chance.random
        for _ in range(draw.randint(2, 10)):
            draw.choices(
                (self._write, self._refer, self._withdraw, self._lease, self._repeat, self._rejoin,
                 self._forget, self._wait),
                (6, 5, 3, 5, 3, 1, 1, 2),
            )[0]()  # fmt: skip
        self._deliver(everything=False)
        if self._is_broken or draw.random() < 0.1:
            self._die()

    def settle(self) -> None:
        """What is on its way arrives."""
        self._deliver(everything=True)
        self.check()

    def _write(self) -> None:
        draw = self._chance.random
        holder = draw.choice(HOLDERS)
        epoch = self.told.epochs[holder]
        space, context, keys = self._some_context()
        shelf = Shelf(draw.choice(list(Tier)), context, f"form-{draw.randrange(2)}", 8)
        name = self._name()
        self._say(Said("declare", holder, epoch, (space, context, keys, 4 * len(keys), name)))
        cut = draw.randint(0, len(keys))
        for part in (keys[:cut], keys[cut:]):
            if part:
                entries = tuple(PageEntry(key, 100, "") for key in part)
                self._say(Said("stage", holder, epoch, (name, space, shelf, entries)))
        if draw.random() < 0.15:  # the writer dies in the middle of it
            self._chance.count("kill", f"{holder} within write {name}")
            if draw.random() < 0.5:
                self._join(holder)  # else it takes its time, and what it staged lies there
            return
        self.told.whole.setdefault((holder, epoch, space, shelf), set()).update(keys)
        self._say(Said("publish", holder, epoch, (name, len(keys))))
        if draw.random() < 0.7:
            self._say(Said("release", holder, epoch, (name,)))

    def _refer(self) -> None:
        draw = self._chance.random
        holder, name = draw.choice(HOLDERS), self._name()
        space, context, _ = self._some_context()
        epoch = self.told.epochs[holder]
        self._say(Said("refer", holder, epoch, (name, space, context)))
        if draw.random() < 0.8:
            self._say(Said("release", holder, epoch, (name,)))

    def _withdraw(self) -> None:
        draw = self._chance.random
        shelves = sorted(self.told.whole, key=repr)
        if shelves:
            holder, epoch, space, shelf = draw.choice(shelves)
            self._say(Said("withdraw", holder, epoch, (space, shelf)))

    def _repeat(self) -> None:
        """An old message comes again, perhaps from an incarnation that is over."""
        if self._history:
            said = self._chance.random.choice(self._history)
            self._chance.count("message late", f"{said.method} of {said.holder} {said.epoch}")
            self._pool.append((0.0, said))

    def _rejoin(self) -> None:
        holder = self._chance.random.choice(HOLDERS)
        self._chance.count("kill", f"{holder}, which begins anew")
        self._join(holder)

    def _join(self, holder: str) -> None:
        with self._world.calm():
            epoch = self.directory.join(holder)
        if epoch in self.told.given:
            raise self._chance.broken(f"epoch {epoch} was given twice")
        self.told.joined(holder, epoch)

    def _forget(self) -> None:
        space, context, _ = self._some_context()
        try:
            with self._world.calm():
                self.directory.forget(space, context)
        except StoreError:
            return
        if self.told.references(space, context):
            raise self._chance.broken(f"{context} was forgotten though it is referred to")
        for reading in self._standing():
            if (reading.lease.namespace, reading.lease.context_id) == (space, context):
                raise self._chance.broken(f"{context} was forgotten under {reading.lease}")

    def _wait(self) -> None:
        self._chance.spend(self._chance.random.uniform(0.0, 40.0))

    def _lease(self) -> None:
        draw = self._chance.random
        space, _, keys = self._some_context()
        copies = [copy for copy in self.directory.locate(space, keys) if copy is not None]
        if not copies:
            return
        copy = draw.choice(copies)
        asked_s, ttl_s = self._chance.monotonic_s, draw.uniform(1.0, 60.0)
        self._chance.spend(draw.uniform(0.0, 0.1))
        try:
            lease = self.directory.lease(
                space, copy.shelf.place, copy.holder, copy.epoch, copy.shelf,
                key=copy.key, ttl_s=ttl_s,
            )  # fmt: skip
        except UnknownName:
            return  # the context that it was written for is forgotten, its page another's too
        self._readings.append(Reading(lease, asked_s + ttl_s, self._runs))
        if draw.random() < 0.3:
            self.directory.end_lease(lease)
            self._readings.pop()
            self._must_refuse(lease)

    def _some_context(self) -> tuple[str, str, tuple[str, ...]]:
        """One of few, which share beginnings."""
        draw = self._chance.random
        space, number = draw.choice(SPACES), draw.randrange(6)
        stem, length = number % 3, 2 + number
        context = f"context-{number}"
        keys = tuple(f"{space}-{stem}-{index}" for index in range(length))
        self._made[space, context] = keys
        return space, context, keys

    def _name(self) -> str:
        self._count += 1
        return f"name-{self._count}"

    # the wire

    def _say(self, said: Said) -> None:
        draw = self._chance.random
        self._history.append(said)
        at_s = self._chance.monotonic_s
        fate = draw.random()
        if fate < 0.08:
            self._chance.count("message dropped", said.method)
            if draw.random() < 0.5:
                return
            at_s += 10.0  # it is said again, for there was no answer
        elif fate < 0.16:
            self._chance.count("message twice", said.method)
            self._pool.append((at_s + draw.uniform(0.0, 60.0), said))
        elif fate < 0.28:
            self._chance.count("message delayed", said.method)
            at_s += draw.uniform(0.0, 60.0)
        self._pool.append((at_s, said))

    def _deliver(self, everything: bool) -> None:
        draw, now_s = self._chance.random, self._chance.monotonic_s
        due = [said for at_s, said in self._pool if everything or at_s <= now_s]
        self._pool = [(at_s, said) for at_s, said in self._pool if not everything and at_s > now_s]
        for at in range(len(due) - 1):
            if draw.random() < 0.15:
                self._chance.count("message overtaken", due[at].method)
                due[at], due[at + 1] = due[at + 1], due[at]
        for said in due:
            self._hear(said)

    def _hear(self, said: Said) -> None:
        """A message at the directory; then what must have come of it."""
        stale = said.epoch != self.told.epochs[said.holder]
        try:
            self._call(self.directory, said)
        except (StoreError, BadInput) as error:
            if stale and not isinstance(error, StaleHandle):
                raise self._chance.broken(f"{said} of an epoch that is over: {error}") from None
            self._world.counts["messages refused"] += 1
            if self._is_broken and self._unsure is None:
                self._unsure = said
            return
        if stale:
            raise self._chance.broken(f"{said} of an epoch that is over was taken")
        self._note(said)

    def _note(self, said: Said) -> None:
        holder, epoch, args = said.holder, said.epoch, said.args
        match said.method:
            case "declare":
                self.told.referred(holder, epoch, args[4], args[0], args[1])
            case "refer":
                self.told.referred(holder, epoch, *args)
            case "release":
                self.told.done(holder, epoch, args[0])
            case "withdraw":
                space, shelf = args
                for reading in self._standing():
                    lease = reading.lease
                    if (lease.holder, lease.epoch, lease.namespace, lease.shelf) == (
                        holder, epoch, space, shelf,
                    ):  # fmt: skip
                        raise self._chance.broken(f"copies were withdrawn under {lease}")

    @staticmethod
    def _call(directory: Directory, said: Said) -> None:
        holder, epoch, args = said.holder, said.epoch, said.args
        match said.method:
            case "declare":
                space, context, keys, tokens, ref = args
                directory.declare(space, context, keys, tokens, owner=holder, epoch=epoch, ref=ref)
            case "stage":
                directory.stage(holder, epoch, *args)
            case "publish":
                directory.publish(holder, epoch, *args)
            case "refer":
                directory.refer(holder, epoch, *args)
            case "release":
                directory.release(holder, epoch, *args)
            case "withdraw":
                directory.withdraw(holder, epoch, *args)

    # death

    def _die(self) -> None:
        """The directory's process is killed in the middle of a message, and started again."""
        due = [said for _, said in self._pool if said.method in ("refer", "release", "stage")]
        before = self.directory.records()
        if self._is_broken or not due or not self._struck(self._chance.random.choice(due), before):
            self._chance.count("kill", "the directory, between messages")
            self._world.disk.keep()
        self.stop(power=True)
        self._world.revive()

    def _struck(self, said: Said, before: tuple[AnyRecord, ...]) -> bool:
        """Whether it died of the message."""
        disk = self._world.disk
        after = self._would_be(before, said)
        self._chance.rates = {**self._chance.rates, "kill": 0.4}
        disk.mortal = True
        try:
            self._hear(said)
        except Killed:
            self._states = (before, after)
            return True
        finally:
            disk.mortal = False
        return False

    def _would_be(self, before: tuple[AnyRecord, ...], said: Said) -> tuple[AnyRecord, ...]:
        twin = twin_of(before)
        try:
            self._call(twin, said)
        except RingspanError:
            return before
        return twin.records()

    def stop(self, power: bool) -> None:
        """`world.Beside`: its process ends where it is."""
        if power and self._directory is not None:
            if not self._states:
                now = self.directory.records()
                unsure, self._unsure = self._unsure, None
                self._states = (now,) if unsure is None else (now, self._would_be(now, unsure))
            self._directory.close()
            self._directory = None

    def again(self) -> None:
        """`world.Beside`: started anew, on the disk as it was left."""
        if self._directory is not None:
            return
        states, self._states = self._states, ()
        self._open()
        found = self.directory.records()
        if found not in states:
            raise self._chance.broken("the directory has forgotten what it had answered")
        refs = [record for record in found if isinstance(record, Referred)]
        self.told.refs = {
            (ref.owner, ref.epoch, ref.ref): (ref.namespace, ref.context_id) for ref in refs
        }
        self.told.released |= {
            (record.owner, record.epoch, record.ref)
            for record in found
            if isinstance(record, Released)
        }

    # promises

    def _standing(self) -> list[Reading]:
        """Leases that their readers rely on: not over, and their holders have not begun anew."""
        now_s = self._chance.monotonic_s
        return [
            reading
            for reading in self._readings
            if reading.until_s > now_s
            and self.told.epochs[reading.lease.holder] == reading.lease.epoch
        ]

    def check(self) -> None:
        self._check_visible()
        for (space, context), _ in self._made.items():
            found = {info.context_id: info for info in self.directory.contexts(space)}
            wanted = self.told.references(space, context)
            if wanted and context not in found:
                raise self._chance.broken(f"{context}, referred to {wanted} times, is gone")
            if context in found and found[context].references != wanted:
                raise self._chance.broken(
                    f"{context} has {found[context].references} references, wanted {wanted}"
                )
        self._check_leases()

    def _check_visible(self) -> None:
        for (space, context), keys in self._made.items():
            for copy in self.directory.locate(space, keys):
                if copy is None:
                    continue
                if copy.epoch != self.told.epochs[copy.holder]:
                    raise self._chance.broken(f"{copy} of an epoch that is over is visible")
                shelf = (copy.holder, copy.epoch, space, copy.shelf)
                if copy.key not in self.told.whole.get(shelf, ()):
                    raise self._chance.broken(f"{copy} of {context} is visible before it is whole")

    def _check_leases(self) -> None:
        standing = self._standing()
        for reading in self._readings:
            if reading in standing:
                try:
                    self.directory.check(reading.lease)
                except StartedAnew:
                    continue
                except StaleHandle as error:
                    raise self._chance.broken(f"a lease ended early: {error}") from None
            elif reading.lease.epoch != self.told.epochs[reading.lease.holder]:
                self._must_refuse(reading.lease)
        self._readings = standing

    def _must_refuse(self, lease: Lease) -> None:
        try:
            self.directory.check(lease)
        except StaleHandle:
            return
        raise self._chance.broken(f"{lease} is over and counts")
