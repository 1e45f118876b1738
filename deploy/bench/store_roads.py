"""The sides that `bench store` times: ours by the shipped classes, and plain ones beside them.

Every method that is timed gives its seconds and counts only what it names: pages are hashed where
they would be sealed or verified, memory was touched before, other threads' work is waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from ringspan.deploy.bench.store_case import Stored, new_shard
from ringspan.deploy.bench.store_peers import fio_read_s, forget, preadv_read_s
from ringspan.errors import RingspanError
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.page import Page, payload_digest
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.supply import NO_QUARANTINE, Supply
from ringspan.kvstore.tiers.base import form_id, page_id
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.transfer import READERS, load_shard, save_shard

if TYPE_CHECKING:
    from ringspan.cluster.controller import Controller
    from ringspan.kvstore.tiers.base import Reader, Tier

FIO_DEPTH = 8
READER_NOTES = {
    "fio": "buffered as ours, the page cache dropped before",
    "fio, direct": f"O_DIRECT, {FIO_DEPTH} blocks asked for at a time",
    "preadv": "no fio on this machine: a loop of preadv, buffered as ours",
    "preadv, direct": "no fio on this machine: a loop of preadv, O_DIRECT",
}


class TierRoad:
    """All pages into a tier that keeps them by key, and out of it into buffers of the host."""

    def __init__(self, stored: Stored, tier: Tier) -> None:
        self._tier, self._stored = tier, stored
        self._pages = stored.pages()
        self._records = stored.manifest.pages
        self._form = form_id(stored.manifest.form, stored.origin)
        self._room = np.zeros((len(self._pages), aligned(stored.page_bytes)), np.uint8)

    def put(self) -> float:
        """Hashed as when they are sealed, then visible in the tier. What lay there goes first."""
        self._tier.delete([page_id(page.header) for page in self._pages])
        began = time.perf_counter()
        with ThreadPoolExecutor(READERS, "seal") as pool:
            sealed = list(pool.map(_sealed, self._pages))
        self._tier.put(sealed)
        return time.perf_counter() - began

    def fill(self) -> None:
        self._tier.put(self._pages)

    def get(self) -> float:
        """Headers and payloads verified, as a loader does it."""
        began = time.perf_counter()
        with self.supply() as supply, ThreadPoolExecutor(READERS, "get") as pool:
            rooms = [memoryview(room.data) for room in self._room]
            for _ in pool.map(supply.page, self._records, rooms):
                pass
        took = time.perf_counter() - began
        for page, room in zip(self._pages, self._room, strict=True):
            if not np.array_equal(np.frombuffer(page.payload, np.uint8), room[: len(page.payload)]):
                raise RingspanError(f"bench store: tier {self._tier.name} gave other bytes back")
        self._room.fill(0)
        return took

    def supply(self) -> Supply:
        return Supply(self._stored.manifest, [self._reader()], NO_QUARANTINE, StoreCounters())

    def _reader(self) -> Reader:
        return self._tier.reading(self._form, self._records)


def _sealed(page: Page) -> Page:
    header = msgspec.structs.replace(page.header, xxh3=payload_digest(page.payload))
    return Page(header, page.payload)


class Copy:
    """From memory to memory, by one thread."""

    def __init__(self, size_bytes: int) -> None:
        self._from = np.ones(size_bytes, np.uint8)
        self._to = np.zeros(size_bytes, np.uint8)

    def run(self) -> float:
        began = time.perf_counter()
        np.copyto(self._to, self._from)
        return time.perf_counter() - began


class DiskRoad:
    """A context's segments: saved by `save_shard`, restored by `load_shard` from the disk."""

    def __init__(self, stored: Stored, scratch: Path) -> None:
        self._stored, self._scratch = stored, scratch
        self._opened = new_shard(stored.shard, "cpu")
        self._block = stored.manifest.pages[0].frame_bytes
        self._saved = 0
        self._pages = stored.pages()

    def save(self) -> float:
        """Sums, hashes, writes and fsync."""
        folder = self._scratch / f"saved-{self._saved}"
        self._saved += 1
        folder.mkdir()
        began = time.perf_counter()
        save_shard(
            self._stored.shard, self._stored.origin, self._stored.keys, folder / "rank-0.seg"
        )
        took = time.perf_counter() - began
        for path in folder.iterdir():
            path.unlink()
        return took

    def plain_write(self) -> float:
        """The payloads' bytes to one file, then fsync."""
        path = self._scratch / "plain.bin"
        began = time.perf_counter()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for page in self._pages:
                os.writev(fd, [page.payload])
            os.fsync(fd)
        finally:
            os.close(fd)
        took = time.perf_counter() - began
        path.unlink()
        return took

    def restore(self) -> float:
        """From the disk, not from the page cache, into a shard, verified down to its rows."""
        stored, shard = self._stored, self._opened
        forget(stored.segments)
        shard.cancel()
        began = time.perf_counter()
        load_shard(stored.store.root, stored.manifest, stored.manifest.pages, shard)
        took = time.perf_counter() - began
        check_same(stored.shard, shard)
        return took

    def readers(self, has_fio: bool) -> dict[str, Callable[[], float]]:
        """What reads the same segments without looking at them, by name."""
        files, block = self._stored.segments, self._block
        if has_fio:
            return {
                "fio": lambda: fio_read_s(files, block, direct=False, depth=1),
                "fio, direct": lambda: fio_read_s(files, block, direct=True, depth=FIO_DEPTH),
            }
        return {
            "preadv": lambda: preadv_read_s(files, block, direct=False),
            "preadv, direct": lambda: preadv_read_s(files, block, direct=True),
        }


class Files:
    """One plain file a page."""

    def __init__(self, stored: Stored, folder: Path) -> None:
        folder.mkdir()
        self._pages = stored.pages()
        self._paths = [folder / str(index) for index in range(len(self._pages))]
        self._room = bytearray(stored.page_bytes)

    def write(self) -> float:
        for path in self._paths:
            path.unlink(missing_ok=True)
        began = time.perf_counter()
        for path, page in zip(self._paths, self._pages, strict=True):
            path.write_bytes(page.payload)
        return time.perf_counter() - began

    def read(self) -> float:
        began = time.perf_counter()
        for path in self._paths:
            with open(path, "rb", buffering=0) as file:
                file.readinto(self._room)
        return time.perf_counter() - began


class DeviceRoad:
    """From the host store to a shard on the device, beside a copy of as many bytes."""

    def __init__(self, stored: Stored, tier: Tier, device: str) -> None:
        self._stored, self._tier = stored, tier
        self._device = torch.device(device)
        self._shard = new_shard(stored.shard, self._device)
        self._form = form_id(stored.manifest.form, stored.origin)
        pinned = self._device.type == "cuda"
        size = stored.payload_bytes
        self._from = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
        self._to = torch.zeros(size, dtype=torch.uint8, device=self._device)

    def restore(self) -> float:
        """Fetched by the device; the first time it pins the slabs too."""
        return self._restore(None if self._device.type == "cpu" else True)

    def first(self) -> float:
        """As what was never read before is restored: through a copy."""
        return self._restore(False)

    def _restore(self, mapped: bool | None) -> float:
        stored, shard = self._stored, self._shard
        records = stored.manifest.pages
        shard.cancel()
        self._wait()
        began = time.perf_counter()
        reader = self._tier.reading(self._form, records)
        supply = Supply(stored.manifest, [reader], NO_QUARANTINE, StoreCounters())
        load_shard(stored.store.root, stored.manifest, records, shard, supply=supply, mapped=mapped)
        self._wait()
        took = time.perf_counter() - began
        check_same(stored.shard, shard)
        return took

    def copy(self) -> float:
        self._wait()
        began = time.perf_counter()
        self._to.copy_(self._from, non_blocking=True)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def check_same(wanted: ContextShard, found: ContextShard) -> None:
    """Byte by byte, in every layer. Raises RingspanError."""
    for layer in range(wanted.num_layers):
        for a, b in zip(wanted.tensors(layer), found.tensors(layer), strict=True):
            if not torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8)):
                raise RingspanError(f"bench store: layer {layer} came back with other bytes")


class Prefills:
    """The same tokens with a store and without; a context manager."""

    def __init__(self, model: str, tokens: int, ranks: int, device: str, scratch: Path) -> None:
        from ringspan.cluster.controller import Controller
        from ringspan.cluster.local_gang import LocalGang
        from ringspan.cluster.messages import GangSpec, ModelSpec
        from ringspan.kvstore.folder import Store

        self.text = f"{tokens:,} tokens of {model} on {ranks} ranks; seconds of all of it"
        self._gang = LocalGang(
            GangSpec(
                world_size=ranks,
                model=ModelSpec(name=model),
                transport="loopback",
                device=device,
            )
        )
        self._gang.__enter__()
        self._store = Store(scratch / "prefills")
        self._with = Controller(self._gang, self._store)
        self._without = Controller(self._gang)
        vocabulary = 1000
        self._ids = np.random.default_rng(0).integers(0, vocabulary, tokens, dtype=np.int32)
        self.payload_bytes = self.page_bytes = 0

    def saved(self) -> float:
        """Prefilled, written behind, durable and published."""
        took = self._timed(self._with)
        manifest = self._store.contexts()[0][0]
        self.payload_bytes = manifest.payload_bytes
        self.page_bytes = manifest.pages[0].payload_bytes
        return took

    def plain(self) -> float:
        return self._timed(self._without)

    def _timed(self, controller: Controller) -> float:
        began = time.perf_counter()
        done = controller.prefill(self._ids, again=True, reuse=False)
        took = time.perf_counter() - began
        controller.drop(done.context_id)
        return took

    def __enter__(self) -> Prefills:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._gang.__exit__(kind, error, trace)
