"""The node's host store without its process: its sockets fail, it is killed, its memory rots.

The shipped server answers the shipped client; between them lies a wire in place of a unix socket.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket as real_socket
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ringspan.kvstore.faults.chance import Chance, flipped
from ringspan.kvstore.faults.disk import SimDisk
from ringspan.kvstore.tiers import host_server

CAPACITY_BYTES = 4 << 20
CALL_S = 30e-6


class SimHost:
    """One host store, and the `socket` that leads to it."""

    AF_UNIX = real_socket.AF_UNIX

    def __init__(self, folder: Path, chance: Chance, disk: SimDisk) -> None:
        self.folder = folder
        self.chance, self.disk = chance, disk
        self.store: host_server.HostStore | None = None
        self._wires: list[SimSocket] = []
        self.start()

    def socket(self, family: int) -> SimSocket:
        return SimSocket(self)

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.store = host_server.HostStore(self.folder, CAPACITY_BYTES)

    def kill(self, where: str) -> None:
        """The process is gone; its slabs stay. Another one starts at once."""
        self.chance.count("kill host store", where)
        self._end(keep=True)
        self.start()

    def lose_memory(self) -> None:
        """With the power."""
        self._end(keep=True)
        shutil.rmtree(self.folder)
        self.start()

    def close(self) -> None:
        self._end(keep=False)

    def _end(self, keep: bool) -> None:
        if self.store is not None:
            self.store.close(keep)
            self.store = None
        for wire in self._wires:
            wire.client = None
        self._wires.clear()

    def disconnect_all(self) -> None:
        """The process at the other end is dead: its connections end."""
        for wire in list(self._wires):
            wire.close()

    def connect(self, wire: SimSocket) -> Any:
        if self.store is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no host store")
        self._wires.append(wire)
        return self.store.join(wire)  # type: ignore[arg-type]

    def leave(self, wire: SimSocket) -> None:
        if wire in self._wires:
            self._wires.remove(wire)
        if self.store is not None and wire.client is not None:
            self.store.leave(wire.client)
        wire.client = None

    # faults of its memory

    def rot(self) -> bool:
        """A bit of a slab turns over."""
        slabs = sorted(path.name for path in self.folder.glob("slab-*"))
        if not slabs:
            return False
        draw = self.chance.keyed("rot")
        path = self.folder / draw.choice(slabs)
        used = _used(path)
        if not used:
            return False
        at = draw.choice(used) + draw.randrange(512)
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
        self.chance.count("flip at rest", f"host {path.name} at byte {at}")
        return True

    def copyto(self, into: np.ndarray, data: np.ndarray) -> None:
        """`numpy.copyto`, between a rank and a slab."""
        draw = self.disk.point(f"host copy of {into.nbytes} bytes")
        np.copyto(into, data)
        if into.nbytes and self.chance.strikes(draw, "flip in flight"):
            self.chance.count("flip in flight", f"host copy of {into.nbytes} bytes")
            flat = into.reshape(-1).view(np.uint8)
            at = draw.randrange(flat.size)
            flat[at] ^= 1 << draw.randrange(8)


def _used(path: Path) -> list[int]:
    """Blocks of 512 bytes that are not all zero."""
    data = path.read_bytes()
    return [at for at in range(0, len(data) - 511, 512) if data[at : at + 512].strip(b"\0")]


class SimSocket:
    """Both ends of one connection: the client's calls reach the server at once, or fail."""

    def __init__(self, host: SimHost) -> None:
        self._host = host
        self.client: Any = None
        self._to_server = b""
        self._to_client = b""
        self._served = False

    # the client's calls

    def settimeout(self, seconds: float) -> None:
        self._timeout_s = seconds

    def connect(self, address: str) -> None:
        self._host.disk.point("host connect")
        self.client = self._host.connect(self)
        self._served = True

    def sendall(self, data: bytes) -> None:
        """The client's request, or from within `_serve` the server's reply."""
        if self._serving:
            self._to_client += data
            return
        host = self._host
        host.chance.spend(CALL_S)
        draw = host.disk.point("host request")
        if self.client is None:
            raise BrokenPipeError(errno.EPIPE, "the host store is gone")
        for kind in ("wire reset", "kill host store"):
            if host.chance.strikes(draw, kind):
                self._end(kind, "before a request")
                raise ConnectionResetError(errno.ECONNRESET, "reset")
        if host.chance.strikes(draw, "wire drop"):
            host.chance.count("wire drop", "a request to the host store")
            return
        if host.chance.strikes(draw, "wire flip"):
            host.chance.count("wire flip", "a request to the host store")
            data = flipped(data, draw)
        self._to_server += data
        self._serve()
        if host.chance.strikes(draw, "wire flip"):
            host.chance.count("wire flip", "a reply of the host store")
            self._to_client = flipped(self._to_client, draw)
        if host.chance.strikes(draw, "wire drop"):
            host.chance.count("wire drop", "a reply of the host store")
            self._to_client = b""
        if host.chance.strikes(draw, "wire delay"):
            host.chance.count("wire delay", "a reply of the host store")
            host.chance.spend(5.0)
        for kind in ("wire reset", "kill host store"):
            if host.chance.strikes(draw, kind):
                self._end(kind, "after a request")
                self._to_client = b""
        host.disk.point("host reply")

    def recv(self, size: int) -> bytes:
        if self._serving:
            data, self._to_server = self._to_server[:size], self._to_server[size:]
            return data
        data, self._to_client = self._to_client[:size], self._to_client[size:]
        if not data and self.client is not None:
            self._host.chance.spend(self._timeout_s)
            raise TimeoutError("timed out")
        return data

    def close(self) -> None:
        if self.client is not None:
            self._host.leave(self)

    # the server's side

    _serving = False
    _timeout_s = 30.0

    def _serve(self) -> None:
        store = self._host.store
        assert store is not None
        self._serving = True
        try:
            host_server._serve_one(store, self.client)
        except (OSError, msgspec.DecodeError):
            self._host.leave(self)  # as its loop does
        finally:
            self._serving = False

    def _end(self, kind: str, where: str) -> None:
        if kind == "kill host store":
            self._host.kill(where)
        else:
            self._host.chance.count(kind, where)
            self._host.leave(self)


class HostOs:
    """`os` for the host store's own process: its memory can be short, and no kill of a rank or
    power cut stops it in the middle."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        draw = self._chance.keyed("slab", str(size))
        if self._chance.strikes(draw, "disk full"):
            self._chance.count("disk full", f"a slab of {size} bytes")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, offset, size)
