"""The host store of a node: a process that outlives the ranks and keeps frames in shared memory.

    python -P -m ringspan.kvstore.tiers.host_server FOLDER CAPACITY_BYTES

It hands out slots of slab files (`slabs`), by size; ranks copy frames into them and out of them.
What a connection reserved and did not publish is free again when it ends, however it ends; what it
leased may then be deleted. One thread, no torch, no payload passes through it. When it is full it
refuses: what must go is decided by those who know what a page costs. The folder is the user's alone
(mode 0700), on a file system in memory; a store started again on it has every published page.
"""

from __future__ import annotations

import fcntl
import logging
import os
import selectors
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ringspan.kvstore.tiers import host_wire as wire
from ringspan.kvstore.tiers.ids import PageId
from ringspan.kvstore.tiers.slabs import (
    ALIGN,
    SLAB_BYTES,
    BadSlab,
    Entry,
    Slab,
    is_page_id,
    slab_bytes,
)

log = logging.getLogger("ringspan.host_store")


@dataclass(eq=False)
class _Held:
    """A published page."""

    place: wire.Place
    leases: int = 0
    doomed: bool = False
    """Deleted, and free when the last lease ends."""


@dataclass(eq=False)
class _Client:
    """One connection."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    reserved: dict[wire.Place, PageId] = field(default_factory=dict)
    leases: dict[int, list[_Held]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


class HostStore:
    """The store's state, without its sockets: tests call `answer`."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        self._folder, self._capacity = folder, capacity_bytes
        self._slabs: dict[str, Slab] = {}
        self._free: dict[int, list[tuple[str, int]]] = {}
        """(slab, slot) by slot size."""
        self._pages: dict[PageId, _Held] = {}
        self._coming: set[PageId] = set()
        """Reserved by some client."""
        self._clients: list[_Client] = []
        self._generation = 0
        self._lease = 0
        self._adopt()

    def _adopt(self) -> None:
        for path in sorted(self._folder.glob("slab-*")):
            try:
                slab = Slab.adopt(path)
            except (BadSlab, OSError) as error:
                log.warning("slab=%s removed: %s", path.name, error)
                path.unlink(missing_ok=True)
                continue
            self._slabs[path.name] = slab
            used = set()
            for entry in slab.entries():
                if entry.page in self._pages:
                    slab.clear(entry.slot)
                    continue
                used.add(entry.slot)
                self._generation = max(self._generation, entry.generation)
                self._pages[entry.page] = _Held(
                    wire.Place(
                        path.name, slab.offset(entry.slot), entry.frame_bytes, entry.generation
                    )
                )
            self._free.setdefault(slab.slot_bytes, []).extend(
                (path.name, slot) for slot in range(slab.slots) if slot not in used
            )
            self._drop_if_empty(slab)

    def join(self, connection: socket.socket) -> _Client:
        client = _Client(connection)
        self._clients.append(client)
        return client

    def leave(self, client: _Client) -> None:
        """The connection ended: what it was about to do never happened."""
        self._clients.remove(client)
        for place, page in client.reserved.items():
            self._coming.discard(page)
            self._free_slot(place)
        client.reserved.clear()
        for lease in list(client.leases):
            self._release(client, lease)

    def answer(self, client: _Client, request: wire.Request) -> wire.Reply:
        match request:
            case wire.Reserve():
                return self._reserve(client, request)
            case wire.Publish():
                return self._publish(client, request)
            case wire.Lookup():
                return self._look_up(client, request)
            case wire.Release():
                self._release(client, request.lease)
                return wire.Done()
            case wire.Holds():
                return wire.Answers(held=tuple(page in self._pages for page in request.pages))
            case wire.Delete():
                for page in request.pages:
                    self._delete(page)
                return wire.Done()
            case wire.Stat() | wire.Stop():
                used = sum(held.place.frame_bytes for held in self._pages.values())
                return wire.Stated(
                    pages=len(self._pages),
                    used_bytes=used,
                    capacity_bytes=self._capacity,
                    pid=os.getpid(),
                )

    def _reserve(self, client: _Client, request: wire.Reserve) -> wire.Reply:
        if len(request.pages) != len(request.frame_bytes):
            return wire.Refused(why="a reservation must have one size for each page")
        taken: dict[wire.Place, PageId] = {}
        places: list[wire.Place | None] = []
        for page, frame_bytes in zip(request.pages, request.frame_bytes, strict=True):
            if page in self._pages or page in self._coming:
                places.append(None)
                continue
            try:
                if not is_page_id(page) or frame_bytes < 1:
                    raise _Full(f"page {page} of {frame_bytes} bytes cannot be")
                place = self._take(frame_bytes)
            except _Full as full:
                for undone, name in taken.items():
                    self._coming.discard(name)
                    self._free_slot(undone)
                return wire.Refused(why=str(full))
            taken[place] = page
            self._coming.add(page)
            places.append(place)
        client.reserved.update(taken)
        return wire.Places(places=tuple(places), gone=_taken(client))

    def _take(self, frame_bytes: int) -> wire.Place:
        slot_bytes = -(-frame_bytes // ALIGN) * ALIGN
        free = self._free.setdefault(slot_bytes, [])
        if not free:
            free += self._new_slab_or_spare(slot_bytes)
        name, slot = free.pop()
        self._generation += 1
        return wire.Place(name, self._slabs[name].offset(slot), frame_bytes, self._generation)

    def _new_slab_or_spare(self, slot_bytes: int) -> list[tuple[str, int]]:
        """Where there is no room for another slab, empty ones of other slots make it."""
        try:
            return self._new_slab(slot_bytes)
        except _Full:
            empty = self._empty_slabs()
            if not empty:
                raise
            for slab in empty:
                self._drop(slab)
            return self._new_slab(slot_bytes)

    def _new_slab(self, slot_bytes: int) -> list[tuple[str, int]]:
        used = sum(slab.size_bytes for slab in self._slabs.values())
        slots = max(1, min(SLAB_BYTES, self._capacity // 8) // slot_bytes)
        more = slab_bytes(slots, slot_bytes)
        if used + more > self._capacity:
            raise _Full(
                f"host store {self._folder} is full: {used / 1e9:.3f} GB of "
                f"{self._capacity / 1e9:.3f} GB in slabs, {more / 1e9:.3f} GB more wanted; "
                f"delete pages or start it with a larger capacity"
            )
        try:
            slab = Slab.new(self._folder, slots, slot_bytes)
        except OSError as error:
            raise _Full(
                f"host store {self._folder}: no memory for another slab of {more / 1e9:.3f} GB "
                f"({os.strerror(error.errno or 0)}): delete pages or give it less to keep"
            ) from None
        self._slabs[slab.path.name] = slab
        return [(slab.path.name, slot) for slot in range(slab.slots)]

    def _publish(self, client: _Client, request: wire.Publish) -> wire.Reply:
        if not all(place in client.reserved for place in request.places):
            return wire.Refused(
                why=f"host store {self._folder}: these places were not reserved by this "
                f"connection; the store may have been started again: put the pages again"
            )
        for place in request.places:
            page = client.reserved.pop(place)
            self._coming.discard(page)
            slab = self._slabs[place.slab]
            slot = slab.slot(place.offset)
            slab.publish(Entry(slot, page, place.frame_bytes, place.generation))
            self._pages[page] = _Held(place)
        return wire.Done()

    def _look_up(self, client: _Client, request: wire.Lookup) -> wire.Reply:
        found = [self._pages.get(page) for page in request.pages]
        self._lease += 1
        leased = [held for held in found if held is not None]
        for held in leased:
            held.leases += 1
        client.leases[self._lease] = leased
        places = tuple(None if held is None else held.place for held in found)
        return wire.Places(places=places, lease=self._lease, gone=_taken(client))

    def _release(self, client: _Client, lease: int) -> None:
        for held in client.leases.pop(lease, ()):
            held.leases -= 1
            if held.doomed and not held.leases:
                self._free_slot(held.place)

    def _delete(self, page: PageId) -> None:
        held = self._pages.pop(page, None)
        if held is None:
            return
        slab = self._slabs[held.place.slab]
        slab.clear(slab.slot(held.place.offset))
        held.doomed = True
        if not held.leases:
            self._free_slot(held.place)

    def _free_slot(self, place: wire.Place) -> None:
        slab = self._slabs[place.slab]
        self._free[slab.slot_bytes].append((place.slab, slab.slot(place.offset)))
        self._drop_if_empty(slab)

    def _drop_if_empty(self, slab: Slab) -> None:
        """Half of the capacity may stay as empty slabs: memory that the kernel has cleared already
        takes the next pages at several times the speed."""
        if not self._is_empty(slab):
            return
        spare = sum(empty.size_bytes for empty in self._empty_slabs())
        if spare > self._capacity // 2:
            self._drop(slab)

    def _is_empty(self, slab: Slab) -> bool:
        free = self._free[slab.slot_bytes]
        return sum(name == slab.path.name for name, _ in free) == slab.slots

    def _empty_slabs(self) -> list[Slab]:
        free = Counter(name for slots in self._free.values() for name, _ in slots)
        return [slab for name, slab in self._slabs.items() if free[name] == slab.slots]

    def _drop(self, slab: Slab) -> None:
        name = slab.path.name
        slots = self._free[slab.slot_bytes]
        slots[:] = [at for at in slots if at[0] != name]
        del self._slabs[name]
        slab.remove()
        for client in self._clients:
            client.gone.append(name)

    def close(self, keep: bool) -> None:
        for slab in self._slabs.values():
            if keep:
                slab.close()
            else:
                slab.remove()


class _Full(Exception):
    """There is no slot."""


def _taken(client: _Client) -> tuple[str, ...]:
    gone, client.gone = tuple(client.gone), []
    return gone


def serve(folder: Path, capacity_bytes: int) -> None:
    """Until a `Stop` comes. Exits with a line where another store serves the folder."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / wire.LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{folder}: another host store serves it") from None
        lock.write(str(os.getpid()))
        lock.flush()
        address = folder / wire.SOCKET
        address.unlink(missing_ok=True)
        store = HostStore(folder, capacity_bytes)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(address))
            listening.listen(128)
            keep = _loop(listening, store)
        address.unlink(missing_ok=True)
        store.close(keep)


def _loop(listening: socket.socket, store: HostStore) -> bool:
    """Serves until told to stop; whether the slabs are to be kept."""
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                connection, _ = listening.accept()
                connection.settimeout(30.0)  # for a reply that nobody takes
                selector.register(connection, selectors.EVENT_READ, store.join(connection))
                continue
            client: _Client = key.data
            try:
                stop = _serve_one(store, client)
            except (OSError, msgspec.DecodeError) as error:
                log.info("connection ended: %s", error)
                selector.unregister(client.connection)
                client.connection.close()
                store.leave(client)
                continue
            if stop is not None:
                return stop.keep


def _serve_one(store: HostStore, client: _Client) -> wire.Stop | None:
    """What has come on a connection. Raises OSError or DecodeError where it must end."""
    more = client.connection.recv(1 << 20)
    if not more:
        raise ConnectionError("closed by the rank")
    client.received += more
    head = wire.LENGTH.size
    while len(client.received) >= head:
        (size,) = wire.LENGTH.unpack_from(client.received)
        if size > wire.MOST_BYTES:
            raise ConnectionError(f"a message of {size} bytes")
        if len(client.received) < head + size:
            break
        request = wire.decode_request(wire.checked(bytes(client.received[head : head + size])))
        del client.received[: head + size]
        client.connection.sendall(wire.framed(store.answer(client, request)))
        if isinstance(request, wire.Stop):
            return request
    return None


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    serve(Path(sys.argv[1]), int(sys.argv[2]))
