"""Object storage that fails, as fsspec shows it: objects are put whole, or cut short, or not."""

from __future__ import annotations

import random
from typing import Any

import fsspec  # type: ignore[import-untyped, unused-ignore]

from ringspan.kvstore.faults.chance import Chance, flipped
from ringspan.kvstore.faults.disk import SimDisk

PROTOCOL = "simstore"
URL = f"{PROTOCOL}://bucket"
CALL_S, BYTES_PER_S = 20e-3, 200e6


class Objects:
    """The bucket, which outlives every process and power cut."""

    def __init__(self, chance: Chance, disk: SimDisk) -> None:
        self.held: dict[str, bytes] = {}
        self._chance, self._disk = chance, disk

    def enter(self, operation: str, path: str, size: int = 0) -> random.Random:
        self._chance.spend(CALL_S + size / BYTES_PER_S)
        draw = self._disk.point(f"remote {operation} {path}")
        if self._chance.strikes(draw, "remote error"):
            self._chance.count("remote error", f"{operation} of {path}")
            raise OSError("the service is not available")
        return draw

    def put(self, path: str, data: bytes) -> None:
        draw = self.enter("put", path, len(data))
        if data and self._chance.strikes(draw, "remote cut"):
            data = data[: draw.randrange(len(data))]
            self._chance.count("remote cut", f"{path} after {len(data)} bytes")
        self.held[path] = data
        if self._chance.strikes(draw, "remote error"):
            self._chance.count("remote error", f"no answer to the put of {path}")
            raise TimeoutError("no answer")

    def get(self, path: str, start: int | None, end: int | None) -> bytes:
        if path not in self.held:
            raise FileNotFoundError(path)
        data = self.held[path][start:end]
        draw = self.enter("get", path, len(data))
        if data and self._chance.strikes(draw, "flip in flight"):
            self._chance.count("flip in flight", f"remote {path}")
            data = flipped(data, draw)
        return data

    def flip(self, path: str, draw: random.Random) -> None:
        self.held[path] = flipped(self.held[path], draw)
        self._chance.count("flip at rest", f"remote {path}")


class SimRemote(fsspec.AbstractFileSystem):  # type: ignore[misc, unused-ignore]
    """What `RemoteTier` uses of a file system."""

    protocol = PROTOCOL
    cachable = False
    objects: Objects
    """Of the run that goes on."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Objects need no folders."""

    def invalidate_cache(self, path: str | None = None) -> None:
        """Nothing is kept."""

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self.objects.put(path, bytes(value))

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        return self.objects.get(path, start, end)

    def size(self, path: str) -> int:
        self.objects.enter("size", path)
        return len(self.objects.held[path])

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self.objects.enter("list", path)
        names = sorted(name for name in self.objects.held if name.startswith(f"{path}/"))
        if not names:
            raise FileNotFoundError(path)
        return names

    def rm_file(self, path: str) -> None:
        self.objects.enter("remove", path)
        del self.objects.held[path]


def register() -> None:
    fsspec.register_implementation(PROTOCOL, SimRemote, clobber=True)
