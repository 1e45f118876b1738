"""Empty slabs of the host store: kept for the next pages, and in nobody's way."""

from __future__ import annotations

import socket
from pathlib import Path

from ringspan.kvstore.tiers import host_wire as wire
from ringspan.kvstore.tiers.host_server import HostStore
from ringspan.kvstore.tiers.ids import PageId

MIB = 1 << 20


def pages_of(form: str, count: int) -> tuple[PageId, ...]:
    return tuple(PageId(f"{index:064x}", form * 16) for index in range(count))


class Talk:
    """One client of a store with 32 MiB, in slabs of 4 MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = HostStore(folder, 32 * MIB)
        self._ends = socket.socketpair()
        self._client = self.store.join(self._ends[0])

    def put(self, pages: tuple[PageId, ...], size: int) -> wire.Reply:
        reply = self.store.answer(
            self._client, wire.Reserve(pages=pages, frame_bytes=(size,) * len(pages))
        )
        if not isinstance(reply, wire.Places):
            return reply
        places = tuple(place for place in reply.places if place is not None)
        self.store.answer(self._client, wire.Publish(places=places))
        return reply

    def delete(self, pages: tuple[PageId, ...]) -> None:
        self.store.answer(self._client, wire.Delete(pages=pages))

    @property
    def slabs(self) -> set[str]:
        return {path.name for path in self.folder.glob("slab-*")}

    def close(self) -> None:
        for end in self._ends:
            end.close()
        self.store.close(keep=False)


def test_an_emptied_slab_takes_the_next_pages(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.put(pages_of("a", 3), MIB)
    before = talk.slabs
    talk.delete(pages_of("a", 3))
    talk.put(pages_of("b", 3), MIB)
    assert talk.slabs == before
    talk.close()


def test_at_most_half_of_the_capacity_stays_empty(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.put(pages_of("a", 20), MIB)
    held = len(talk.slabs)
    talk.delete(pages_of("a", 20))
    left = sum(path.stat().st_size for path in tmp_path.glob("slab-*"))
    assert len(talk.slabs) < held
    assert left <= 16 * MIB
    talk.close()


def test_empty_slabs_make_room_for_pages_of_another_size(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.put(pages_of("a", 20), MIB)
    talk.delete(pages_of("a", 20))
    reply = talk.put(pages_of("b", 6), 4 * MIB)
    assert isinstance(reply, wire.Places), reply
    assert reply.gone, "the client was not told which slabs are no more"
    talk.close()


def test_a_full_store_still_refuses(tmp_path: Path) -> None:
    talk = Talk(tmp_path)
    talk.put(pages_of("a", 20), MIB)
    reply = talk.put(pages_of("b", 6), 4 * MIB)
    assert isinstance(reply, wire.Refused)
    assert "is full" in reply.why
    talk.close()
