"""A store, its processes and an oracle that knows what must be read from it.

Whatever a read gives is compared with what the context holds. A context that was published stays
published; where it cannot be read although a copy of every page, parity or its tokens exist, a
promise is broken.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from ringspan.cluster.messages import PageRecord
from ringspan.errors import BadInput, CorruptPage, RingspanError, StoreError, UnknownName
from ringspan.kvstore.faults.chance import Broken, Chance, Killed
from ringspan.kvstore.faults.contexts import (
    Known,
    Recompute,
    copies_exist,
    make,
    open_context,
    prefill,
    wrong_pages,
)
from ringspan.kvstore.faults.disk import FRAMES, SimDisk
from ringspan.kvstore.faults.host import SimHost
from ringspan.kvstore.faults.remote import URL, Objects
from ringspan.kvstore.folder import Store
from ringspan.kvstore.index_copy import check_index_copy, mend_index
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.repair import PageWriter, mend_parity, mend_stored, republish
from ringspan.kvstore.tiers.counters import QUARANTINED, REPAIRED, VERIFIED, StoreCounters
from ringspan.kvstore.tiers.moving import forget, move
from ringspan.kvstore.tiers.placement import TierName
from ringspan.kvstore.tiers.quarantine import FOLDER as QUARANTINE
from ringspan.kvstore.tokens import TOKENS, encode_tokens

MOST_CONTEXTS = 5
MOST_QUARANTINED = 40
PLAIN = ("tiers.json", "parity.json", "owner.json")
"""Files without a checksum, which say where to look and nothing about KV: they do not rot here."""


class Beside(Protocol):
    """Another process of the machine, which goes down with it."""

    def stop(self, power: bool) -> None:
        """Some process has died; with `power` all have."""

    def again(self) -> None:
        """It is started again, if it is down."""


class World:
    """One simulated machine with its disk, host store and bucket, and everything stored there."""

    def __init__(self, folder: Path, chance: Chance) -> None:
        self.chance = chance
        root = folder / "disk"
        root.mkdir()
        self.disk = SimDisk(root, chance)
        self.host = SimHost(folder / "host", chance, self.disk)
        self.objects = Objects(chance, self.disk)
        self.root = root / "store"
        self.contexts: dict[str, Known] = {}
        """Published; the store answers for them."""
        self.counts: Counter[str] = Counter()
        """What readers got: reads, refused, repaired, recomputed, wrong, lost and the like."""
        self.repair_s: list[float] = []
        """Simulated time of each repair."""
        self._untold: dict[str, Known] = {}
        """Written or removed by processes that did not live to hear that it was done."""
        self._rotted: set[str] = set()
        """Contexts of which a file that is no segment has lost a bit."""
        self.beside: list[Beside] = []

    # processes

    @contextlib.contextmanager
    def process(self, what: str) -> Iterator[None]:
        """The body runs in a process that can be killed at any call it makes; errors of ours end
        it as an error does. `self.died` tells which."""
        self.died = self.failed = False
        self.disk.pid += 1
        self.disk.mortal = True
        self.chance.tell(what)
        try:
            yield
        except (StoreError, CorruptPage, BadInput) as error:
            if self.disk.picture is None:
                self.failed = True
                self.chance.tell(f"refused: {self._said(error)}")
        except Killed:
            pass
        finally:
            self.disk.mortal = False
        if self.disk.picture is not None:
            self.died = True
            self.revive()

    def _said(self, error: BaseException) -> str:
        """An error's text without the folder of this run."""
        return f"{type(error).__name__}: {error}".replace(str(self.root.parent.parent), "")

    def revive(self) -> None:
        """The dead process's files as it left them; after a power cut, the machine started anew."""
        assert self.disk.picture is not None
        power = self.disk.picture.power
        for beside in self.beside:
            beside.stop(power)
        self.disk.restore()
        self.disk.pid += 1
        self.host.disconnect_all()
        if power:
            self.host.lose_memory()
        with self.calm():
            for beside in self.beside:
                beside.again()
            if power:
                self._reconcile()

    @contextlib.contextmanager
    def calm(self) -> Iterator[None]:
        """Faults stop."""
        rates, self.chance.rates = self.chance.rates, {}
        try:
            yield
        finally:
            self.chance.rates = rates

    # what may happen

    def write(self, known: Known, world_size: int, parity: bool) -> None:
        """A gang prefills and saves a context."""
        before = known.name in self.contexts
        done = False
        with self.process(f"write {known.name} by {world_size} ranks, {len(known.keys)} pages"):
            store = Store(self.root)
            manifest = prefill(store, known, world_size)
            done = True
            self.contexts[known.name] = known  # told that it is stored: from here on it must be
            self._untold.pop(known.name, None)
            if parity:
                mend_parity(store, manifest, 1)
        if not done and not before:
            self._untold[known.name] = known
            self._reconcile()

    def read(self, name: str, world_size: int, recompute: bool) -> None:
        """Ranks open a context; what they get must be right."""
        known = self.contexts[name]
        with self.process(f"read {name} on {world_size} ranks"):
            self.counts["reads"] += 1
            store = Store(self.root)
            manifest = store.manifest(name)
            repair = Recompute(known, store.tokens(manifest)) if recompute else None
            self._open(known, manifest, world_size, repair)
        if self.failed:
            self.counts["refused"] += 1

    def _open(
        self, known: Known, manifest: Manifest, world_size: int, repair: Recompute | None
    ) -> StoreCounters:
        counters = StoreCounters()
        try:
            opened = open_context(self.root, manifest, known, world_size, counters, repair)
            wrong = wrong_pages(known, opened)
        finally:
            self.counts["quarantined"] += counters.total(QUARANTINED)
            self.counts["verified"] += counters.total(VERIFIED)
            self.counts["repaired by parity"] += counters.snapshot()[REPAIRED].get("parity", 0)
            if repair is not None:
                self.chance.spend(repair.seconds)
                self.counts["recomputed"] += repair.pages
        if wrong:
            self.counts["wrong"] += len(wrong)
            raise self.chance.broken(f"wrong KV served: pages {wrong} of context {known.name}")
        return counters

    def move(self, name: str, to: TierName, keep: bool) -> None:
        """A context goes to another tier, or is copied there."""
        with self.process(f"{'copy' if keep else 'move'} {name} to {to.kind}"):
            move(Store(self.root), name, to, keep=keep)

    def remove(self, name: str) -> None:
        """A context that nobody wants any more; if it fails half-way, it may be there or not."""
        with self.process(f"remove {name}"):
            known = self.contexts.pop(name)
            forget(Store(self.root), name)
        self._untold.pop(name, None)
        if self.died or self.failed:
            self._untold[name] = known
            self._reconcile()

    def mend(self, name: str) -> None:
        """A repair that can itself fail."""
        with self.process(f"mend {name}"):
            self._mend(self.contexts[name])

    def _reconcile(self) -> None:
        """What nobody was told the end of is there or is not, until a power cut has its say too;
        what is listed is whole."""
        with self.calm():
            listed = set(Store(self.root).ids())
        for name, known in self._untold.items():
            if name in listed:
                self.contexts[name] = known
            else:
                self.contexts.pop(name, None)

    # faults have stopped

    def settle(self) -> None:
        """Everything becomes readable again, and is whole afterwards."""
        with self.calm():
            self._check_store()
            self._clear_quarantine()
            for name in sorted(self.contexts):
                began_s = self.chance.monotonic_s
                if self._recover(self.contexts[name]):
                    self.repair_s.append(self.chance.monotonic_s - began_s)

    def _clear_quarantine(self) -> None:
        """Now and then a person looks at it and empties it."""
        folder = self.root / QUARANTINE
        if folder.is_dir() and len(list(folder.iterdir())) > MOST_QUARANTINED:
            shutil.rmtree(folder)

    def _check_store(self) -> None:
        """Nothing but what was published is listed; nothing of a dead process is left."""
        store = Store(self.root)
        strange = set(store.ids()) - set(self.contexts)
        if strange:
            raise self.chance.broken(f"contexts listed that nobody published: {sorted(strange)}")
        left = [path.name for path in (self.root / "staging").glob("*") if _is_marked(path)]
        if left:
            raise self.chance.broken(f"what dead processes were writing is still there: {left}")

    def _recover(self, known: Known) -> bool:
        """Whether there was something to repair."""
        store = Store(self.root)
        try:
            whole = store.verify(known.name).ok
            whole = whole and not check_index_copy(self.root / "contexts" / known.name)
        except UnknownName:
            raise self.chance.broken(f"context {known.name}, published, is gone") from None
        try:
            if not whole:
                self._mend(known)
            self._check_readable(known)
            return not whole
        except RingspanError as error:
            if isinstance(error, Broken):
                raise
            why = str(error)
            self.chance.tell(f"{known.name} cannot be mended: {self._said(error)}")
        self._prefill_again(store, known, why)
        return True

    def _check_readable(self, known: Known) -> None:
        store = Store(self.root)
        manifest = store.manifest(known.name)
        self.counts["reads"] += 1
        self._open(known, manifest, 2, None)
        if not store.verify(known.name).ok:
            raise StoreError(f"context {known.name} is not whole after its repair")

    def _mend(self, known: Known) -> None:
        """As `contexts repair` does: from another copy or parity, else from the tokens. Then one
        good copy, on the disk; the other tiers' may be damaged."""
        store = Store(self.root)
        mended = mend_index(self.root / "contexts" / known.name)
        self.counts["index files mended"] += len(mended)
        for _ in range(3):  # pages of several tiers become those of the disk one after the other
            bad = {page.key for page in store.verify(known.name).bad_pages}
            manifest = store.manifest(known.name)
            damaged = [record for record in manifest.pages if record.key in bad]
            if not damaged:
                break
            self._write_anew(store, known, manifest, damaged)
        mend_parity(store, store.manifest(known.name))
        move(store, known.name, TierName("disk"))

    def _write_anew(
        self, store: Store, known: Known, manifest: Manifest, damaged: list[PageRecord]
    ) -> None:
        mended = mend_stored(store, manifest, damaged, StoreCounters())
        self.counts["repaired"] += len(damaged) - len(mended.lost)
        for road, pages in mended.roads.items():
            self.counts[f"repaired by {road}"] += pages
        if not mended.lost:
            return
        recompute = Recompute(known, store.tokens(mended.manifest))
        folder = store.folder(manifest)
        with PageWriter(folder, f"c{self.chance.token_hex(4)}") as writer:
            for record, page in zip(mended.lost, recompute(mended.lost), strict=True):
                writer.append(record, page)
        republish(store, mended.manifest, writer.records)
        self.chance.spend(recompute.seconds)
        self.counts["recomputed"] += recompute.pages

    def _prefill_again(self, store: Store, known: Known, why: str) -> None:
        """From the tokens, where somebody has them; else it must be lost for good."""
        if known.client_has_tokens or self._tokens_exist(known):
            self.chance.spend(0.01 * len(known.keys))
            prefill(store, known, 2)
            self.counts["prefilled again"] += 1
            self._check_readable(known)
            return
        places = [path.read_bytes() for path in self.root.rglob("*") if path.is_file()]
        places += [path.read_bytes() for path in self.host.folder.glob("slab-*")]
        places += list(self.objects.held.values())
        if copies_exist(known, places) and self._is_indexed(store, known):
            self.counts["lost"] += 1
            raise self.chance.broken(
                f"context {known.name} is lost ({why}), though every page of it exists"
            )
        indexed = self._is_indexed(store, known)
        if not indexed and known.name not in self._rotted:
            self.counts["lost"] += 1
            raise self.chance.broken(
                f"context {known.name} is lost ({why}), though no bit of its index turned over"
            )
        left = "no page or token left" if indexed else "no whole index"
        self.counts[f"gone with {left}"] += 1
        store.remove(known.name)
        del self.contexts[known.name]

    def _tokens_exist(self, known: Known) -> bool:
        """In a file of the store, whole."""
        wanted = bytes(encode_tokens(known.token_ids))
        folder = self.root / "contexts" / known.name
        return any(path.read_bytes() == wanted for path in folder.glob(f"{TOKENS[:6]}*"))

    def _is_indexed(self, store: Store, known: Known) -> bool:
        """Manifest and tokens are there, whole: without them nobody can say what the pages are."""
        try:
            mend_index(self.root / "contexts" / known.name)
            return store.manifest(known.name).keys == known.keys
        except StoreError:
            return False

    # at rest

    def rot(self) -> None:
        """Bits turn over somewhere."""
        draw = self.chance.random
        at = draw.random()
        if at < 0.25 and self.host.rot():
            return
        if at < 0.4 and self.objects.held:
            self.objects.flip(draw.choice(sorted(self.objects.held)), draw)
            return
        files = [path for path in self.disk.files() if path.startswith("store/contexts/")]
        files = [path for path in files if not path.endswith(PLAIN)]
        if files:
            path = draw.choice(files)
            self.disk.flip(path, draw)
            if not path.endswith(FRAMES):
                self._rotted.add(path.split("/")[2])

    def random_context(self) -> Known:
        """New, or with a beginning that another one has too."""
        draw = self.chance.random
        codec = draw.choices(("raw", "int8", "int4"), (8, 1, 1))[0]
        count = draw.randint(5, 26) if codec == "raw" else draw.randint(100, 300)
        ids = np.array([draw.randrange(50_000) for _ in range(count)], dtype=np.int32)
        if codec == "raw" and self.contexts and draw.random() < 0.3:
            other = self.contexts[draw.choice(sorted(self.contexts))].token_ids
            ids[: min(8, len(other))] = other[:8][: len(ids)]
        return make(ids, codec, client_has_tokens=draw.random() < 0.5)

    def remote(self) -> TierName:
        return TierName("remote", URL)

    def in_host(self) -> TierName:
        return TierName("host", str(self.host.folder))


def _is_marked(folder: Path) -> bool:
    """Says whose it is; where a power cut took the mark, only its age can tell (a day)."""
    try:
        return bool(json.loads((folder / "owner.json").read_text()))
    except (OSError, ValueError):
        return False
