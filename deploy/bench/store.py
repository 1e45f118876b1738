"""How fast do pages go into the store and come back, beside what does the same without checking?

    ringspan bench store --peers-python PEERS/bin/python --json rows.jsonl --markdown table.md

Everything of ours is the shipped path with its checksums on: what is put is hashed (xxh3-128) at
sealing, what comes back is hashed and compared before anybody gets it, and a restored context's
plane sums are computed from the rows themselves. Each is timed in turn with what it is compared to,
in one run, and ratios are taken pair by pair:

    host tier       Mooncake Store on loopback (a process that owns the memory, as ours), and a copy
    disk            fio, which reads the same files with the same block size and the same flags
    remote          fsspec on a local folder: what our frames and index cost over plain files
    host -> device  a copy of as many bytes, from pinned memory where there is a GPU
    saved prefill   the same prefill without a store

Before the clock counts everything runs once, and what came back is compared byte by byte.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import torch

from ringspan.deploy.bench import store_roads as roads
from ringspan.deploy.bench.attention import Spread
from ringspan.deploy.bench.store_case import StoreCase, Stored, host_store, make_stored
from ringspan.deploy.bench.store_peers import MODES, Mooncake, fio
from ringspan.deploy.machine import Hardware, hardware, versions

MEMORY = Path("/dev/shm")
SAVED = "saved prefill"
TARGETS = {"Mooncake": 2.0, "fio": 0.8, "pinned copy": 0.85}
"""The rate of ours over theirs that must be reached."""

Timed = Callable[[], float]
"""Does its work once; the seconds of what counts."""


class StoreRow(msgspec.Struct, frozen=True, kw_only=True):
    """One thing done with the pages, beside one that it is compared with."""

    benchmark: str = "store"
    command: str
    what: str
    """`put host`, `get host`, `save disk`, `restore disk`, ..."""
    against: str
    """Empty where there is nothing to compare with."""
    case: StoreCase
    page_bytes: int
    payload_bytes: int
    """Of all pages; rates count these."""
    seconds: Spread
    against_seconds: Spread | None = None
    ratio: Spread | None = None
    """Our rate over theirs (their seconds over ours), pair by pair."""
    target: float | None = None
    note: str = ""
    device: str
    hardware: Hardware
    versions: dict[str, str]

    @property
    def gb_per_s(self) -> float:
        return self.payload_bytes / self.seconds.median / 1e9


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run of the benchmark."""

    case: StoreCase
    parts: tuple[str, ...]
    folder: Path
    """On the disk to measure."""
    memory: Path = MEMORY
    peers_python: Path | None = None
    device: str = "cpu"
    model: str = "random:tiny"
    """Of the prefill; `tokens` of it on `ranks`."""
    tokens: int = 4096
    ranks: int = 2
    command: str


class _Timings:
    """Seconds by name, a list a repeat; the first round of all is left out."""

    def __init__(self, asked: Asked, stored: Stored) -> None:
        self._asked, self._stored = asked, stored
        self.seconds: dict[str, list[float]] = {}

    def take(self, sides: dict[str, Timed]) -> None:
        """Each side once, then all again."""
        for repeat in range(self._asked.case.repeats + 1):
            for name, run in sides.items():
                took = run()
                if repeat:
                    self.seconds.setdefault(name, []).append(took)

    def row(self, what: str, against: str = "", note: str = "") -> StoreRow:
        """Of `what`, beside `AGAINST what`'s side."""
        ours = self.seconds[what]
        theirs = self.seconds[f"{against} {what}"] if against else None
        stored = self._stored
        device = torch.device(self._asked.device)
        return StoreRow(
            command=self._asked.command,
            what=what,
            against=against,
            case=self._asked.case,
            page_bytes=stored.page_bytes,
            payload_bytes=stored.payload_bytes,
            seconds=Spread.of(ours),
            against_seconds=Spread.of(theirs) if theirs else None,
            ratio=Spread.of([b / a for a, b in zip(ours, theirs, strict=True)]) if theirs else None,
            target=TARGETS.get(against),
            note=note,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            hardware=hardware(),
            versions=versions(),
        )


def bench_store(asked: Asked) -> Iterator[StoreRow]:
    """Rows as they come. Raises RingspanError where a peer fails or other bytes come back."""
    with ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=asked.folder))
        )
        stored = make_stored(asked.case, scratch / "store")
        for part in asked.parts:
            yield from _MEASURES[part](asked, stored, scratch)


def _host(asked: Asked, stored: Stored, scratch: Path) -> Iterator[StoreRow]:
    timings = _Timings(asked, stored)
    with ExitStack() as stack:
        capacity = 2 * stored.payload_bytes + (1 << 30)
        tier = stack.enter_context(host_store(capacity, asked.memory))
        ours = roads.TierRoad(stored, tier)
        copy = roads.Copy(stored.payload_bytes)
        sides: dict[str, Timed] = {"put host": ours.put, "get host": ours.get}
        peers = _mooncakes(asked, stored, scratch, stack)
        for peer in peers:
            sides[f"{peer.name} put host"] = peer.put
            sides[f"{peer.name} get host"] = _then(peer.get, peer.remove)
        sides["copy put host"] = copy.run
        sides["copy get host"] = copy.run
        timings.take(sides)
    for what in ("put host", "get host"):
        for against in [peer.name for peer in peers]:
            note = "" if MODES[against][0] == "owner" else "within one process, nothing is sent"
            yield timings.row(what, against, note)
        yield timings.row(what, "copy", "of as many bytes, by one thread")


def _mooncakes(asked: Asked, stored: Stored, scratch: Path, stack: ExitStack) -> list[Mooncake]:
    if asked.peers_python is None:
        return []
    path = scratch / "pages.npy"
    np.save(path, np.stack([np.frombuffer(page.payload, np.uint8) for page in stored.pages()]))
    return [
        stack.enter_context(Mooncake(asked.peers_python, name, path, scratch)) for name in MODES
    ]


def _then(run: Timed, after: Callable[[], None]) -> Timed:
    def both() -> float:
        took = run()
        after()
        return took

    return both


def _disk(asked: Asked, stored: Stored, scratch: Path) -> Iterator[StoreRow]:
    timings = _Timings(asked, stored)
    road = roads.DiskRoad(stored, scratch)
    sides: dict[str, Timed] = {
        "save disk": road.save,
        "write and fsync save disk": road.plain_write,
        "restore disk": road.restore,
    }
    readers = road.readers(fio() is not None)
    for name, run in readers.items():
        sides[f"{name} restore disk"] = run
    timings.take(sides)
    yield timings.row("save disk", "write and fsync", "of the same bytes by one thread")
    for name in readers:
        yield timings.row("restore disk", name, roads.READER_NOTES.get(name, ""))


def _remote(asked: Asked, stored: Stored, scratch: Path) -> Iterator[StoreRow]:
    from ringspan.kvstore.tiers.remote import RemoteTier

    timings = _Timings(asked, stored)
    folder = scratch / "remote"
    road = roads.TierRoad(stored, RemoteTier(folder.as_uri()))
    files = roads.Files(stored, scratch / "plain")
    timings.take(
        {
            "put remote": road.put,
            "get remote": road.get,
            "plain files put remote": files.write,
            "plain files get remote": files.read,
        }
    )
    for what in ("put remote", "get remote"):
        yield timings.row(what, "plain files", "fsspec on a local folder, from the page cache")


def _device(asked: Asked, stored: Stored, scratch: Path) -> Iterator[StoreRow]:
    timings = _Timings(asked, stored)
    against = "pinned copy" if asked.device == "cuda" else "memory copy"
    with host_store(2 * stored.payload_bytes + (1 << 30), asked.memory) as tier:
        roads.TierRoad(stored, tier).fill()
        road = roads.DeviceRoad(stored, tier, asked.device)
        sides = {"restore host": road.restore, f"{against} restore host": road.copy}
        if asked.device == "cuda":
            sides |= {"restore host first": road.first, f"{against} restore host first": road.copy}
        timings.take(sides)
    yield timings.row("restore host", against, "plane sums computed on the device")
    if asked.device == "cuda":
        note = "through a copy and its hash, as what is not pinned yet"
        row = timings.row("restore host first", against, note)
        yield msgspec.structs.replace(row, target=None)


def _prefill(asked: Asked, stored: Stored, scratch: Path) -> Iterator[StoreRow]:
    timings = _Timings(asked, stored)
    made = roads.Prefills(asked.model, asked.tokens, asked.ranks, asked.device, scratch)
    with made as prefills:
        timings.take({SAVED: prefills.saved, f"without a store {SAVED}": prefills.plain})
        note = prefills.text
        payload_bytes = prefills.payload_bytes
    row = timings.row(SAVED, "without a store", note)
    yield msgspec.structs.replace(row, payload_bytes=payload_bytes, page_bytes=prefills.page_bytes)


_MEASURES: dict[str, Callable[[Asked, Stored, Path], Iterator[StoreRow]]] = {
    "host": _host,
    "disk": _disk,
    "remote": _remote,
    "device": _device,
    "prefill": _prefill,
}
PARTS = tuple(_MEASURES)


def missed(rows: Sequence[StoreRow]) -> list[StoreRow]:
    """Those beneath their target."""
    return [row for row in rows if row.target and row.ratio and row.ratio.median < row.target]
