"""The directory: what holders publish is found, what is over is refused, what is used stays."""

from __future__ import annotations

import time

import pytest

from ringspan.errors import BadInput, UnknownName
from ringspan.kvstore.directory import Directory
from ringspan.kvstore.leases import LONGEST_S, InUse, StaleHandle
from ringspan.kvstore.records import PageEntry, Shelf, Tier

SPACE = "ten"
EXACT, EIGHT, FOUR = 100, 8, 4


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def directory(clock: FakeClock) -> Directory:
    return Directory(clock=clock)


def keys_of(text: str) -> list[str]:
    """Chained: equal keys have equal pasts."""
    return [text[: end + 1].ljust(64, "0") for end in range(len(text))]


def shelf(place: str, tier: Tier = Tier.GPU, form: str = "raw", fidelity: int = EXACT) -> Shelf:
    return Shelf(tier, place, form, fidelity)


def entries(keys: list[str], size_bytes: int = 10) -> list[PageEntry]:
    return [PageEntry(key, size_bytes) for key in keys]


def put(
    directory: Directory,
    holder: str,
    epoch: int,
    text: str,
    at: Shelf | None = None,
    *,
    space: str = SPACE,
    write: str = "",
    publish: bool = True,
) -> list[str]:
    """The context `text`, one page a letter, on a shelf of the holder."""
    keys = keys_of(text)
    write = write or f"write {text} {at}"
    directory.declare(space, text, keys, len(text), owner=holder, epoch=epoch, ref=write)
    directory.stage(holder, epoch, write, space, at or shelf(text), entries(keys))
    if publish:
        directory.publish(holder, epoch, write, len(keys))
        directory.release(holder, epoch, write)
    return keys


def pages_found(directory: Directory, text: str, space: str = SPACE, **ask: object) -> int:
    rows = directory.leading(space, keys_of(text), **ask)  # type: ignore[arg-type]
    return rows[0].pages if rows else 0


def test_the_longest_row_comes_first(directory: Directory) -> None:
    gang, disk = directory.join("gang"), directory.join("disk")
    put(directory, "gang", gang, "abc")
    put(directory, "gang", gang, "abcdex")
    put(directory, "disk", disk, "abcdefgh", shelf("abcdefgh", Tier.DISK))
    rows = directory.leading(SPACE, keys_of("abcdefz"))
    assert [(row.holder, row.shelf.place, row.pages) for row in rows] == [
        ("disk", "abcdefgh", 6),
        ("gang", "abcdex", 5),
        ("gang", "abc", 3),
    ]
    assert directory.known(SPACE, keys_of("abcdefz")) == 6
    assert directory.leading(SPACE, keys_of("zabc")) == []
    assert pages_found(directory, "abc", form="int8") == 0


def test_a_row_ends_where_a_page_is_lost(directory: Directory) -> None:
    epoch = directory.join("gang")
    keys = put(directory, "gang", epoch, "abcdef")
    assert directory.discard("gang", epoch, SPACE, shelf("abcdef"), [keys[3]], "sum differs") == 1
    assert directory.discard("gang", epoch, SPACE, shelf("abcdef"), [keys[3]], "sum differs") == 0
    assert pages_found(directory, "abcdef") == 3
    found = directory.locate(SPACE, keys)
    assert [copy is not None for copy in found] == [True, True, True, False, True, True]


def test_fidelity_is_met_first_and_then_the_nearest_tier_is_taken(directory: Directory) -> None:
    here, there, disk, far = map(directory.join, ("here", "there", "disk", "far"))
    put(directory, "far", far, "ab", shelf("", Tier.REMOTE))
    keys = keys_of("ab")

    def nearest(lowest: int) -> tuple[str, str] | None:
        first = directory.locate(SPACE, keys, here=["here"], lowest=lowest)[0]
        return first and (first.holder, first.shelf.tier)

    assert nearest(EXACT) == ("far", "remote")
    put(directory, "disk", disk, "ab", shelf("", Tier.DISK))
    assert nearest(EXACT) == ("disk", "disk")
    put(directory, "here", here, "ab", shelf("", Tier.HOST, "int8", EIGHT))
    assert nearest(EXACT) == ("disk", "disk")
    assert nearest(EIGHT) == ("here", "host")
    put(directory, "there", there, "ab", shelf("ab", Tier.GPU, "int4", FOUR))
    assert nearest(EIGHT) == ("here", "host")
    assert nearest(FOUR) == ("there", "gpu")
    put(directory, "here", here, "ab", shelf("ab", Tier.GPU, "int4", FOUR))
    assert nearest(FOUR) == ("here", "gpu")
    put(directory, "here", here, "ab", shelf("x", Tier.GPU, "int8", EIGHT))
    first = directory.locate(SPACE, keys, here=["here"], lowest=FOUR)[0]
    assert first is not None
    assert first.shelf.fidelity == EIGHT


def test_staged_pages_are_seen_once_they_are_published(directory: Directory) -> None:
    epoch = directory.join("gang")
    keys = put(directory, "gang", epoch, "abc", write="w", publish=False)
    assert pages_found(directory, "abc") == 0
    assert directory.used_bytes(SPACE) == {Tier.GPU: 30}
    with pytest.raises(StaleHandle, match="has staged 3 pages, 4 were to be published"):
        directory.publish("gang", epoch, "w", 4)
    directory.publish("gang", epoch, "w", 3)
    assert pages_found(directory, "abc") == len(keys)
    assert directory.used_bytes(SPACE) == {Tier.GPU: 30}


def test_messages_that_come_twice_or_late_change_nothing(directory: Directory) -> None:
    epoch = directory.join("gang")
    keys = put(directory, "gang", epoch, "abc", write="w")
    state = directory.records()
    directory.publish("gang", epoch, "w", 3)
    directory.stage("gang", epoch, "w", SPACE, shelf("abc"), entries(keys))
    assert not directory.release("gang", epoch, "w")
    directory.declare(SPACE, "abc", keys, 3, owner="gang", epoch=epoch, ref="w")  # released
    assert directory.records() == state
    assert directory.withdraw("gang", epoch, SPACE, shelf("abc")) == 3
    assert directory.withdraw("gang", epoch, SPACE, shelf("abc")) == 0
    directory.publish("gang", epoch, "w", 3)  # the publish of before, once more
    assert pages_found(directory, "abc") == 0


def test_an_aborted_write_stays_so_whatever_comes_after(directory: Directory) -> None:
    epoch = directory.join("gang")
    keys = put(directory, "gang", epoch, "abc", write="w", publish=False)
    directory.abort("gang", epoch, "w")
    directory.abort("gang", epoch, "w")
    directory.stage("gang", epoch, "w", SPACE, shelf("abc"), entries(keys))
    with pytest.raises(StaleHandle, match="write w of gang was aborted"):
        directory.publish("gang", epoch, "w", 3)
    directory.abort("gang", epoch, "early")
    directory.stage("gang", epoch, "early", SPACE, shelf("abc"), entries(keys))
    assert directory.used_bytes(SPACE) == {}
    put(directory, "gang", epoch, "abc", write="again")
    with pytest.raises(StaleHandle, match="was published: withdraw it"):
        directory.abort("gang", epoch, "again")


def test_a_publish_that_overtakes_its_stage_is_refused_and_said_again(directory: Directory) -> None:
    epoch = directory.join("gang")
    keys = keys_of("ab")
    directory.declare(SPACE, "ab", keys, 2, owner="gang", epoch=epoch, ref="r")
    with pytest.raises(StaleHandle, match="has staged 0 pages"):
        directory.publish("gang", epoch, "w", 2)
    directory.stage("gang", epoch, "w", SPACE, shelf("ab"), entries(keys[1:]))
    directory.stage("gang", epoch, "w", SPACE, shelf("ab"), entries(keys[:1]))
    directory.publish("gang", epoch, "w", 2)
    assert pages_found(directory, "ab") == 2


def test_what_a_dead_writer_staged_is_gone(directory: Directory) -> None:
    epoch = directory.join("gang")
    put(directory, "gang", epoch, "abc", write="w", publish=False)
    again = directory.join("gang")
    assert again > epoch
    assert directory.used_bytes(SPACE) == {}
    with pytest.raises(StaleHandle, match=f"epoch {epoch} of gang is over, it is in epoch {again}"):
        directory.publish("gang", epoch, "w", 3)
    with pytest.raises(StaleHandle, match="has staged 0 pages"):
        directory.publish("gang", again, "w", 3)
    assert directory.forget_lost(SPACE) == ("abc",)
    assert directory.contexts(SPACE) == ()


def test_a_holder_that_begins_anew_has_lost_its_copies_and_ends_their_leases(
    directory: Directory,
) -> None:
    epoch = directory.join("gang")
    put(directory, "gang", epoch, "abc")
    lease = directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"))
    assert directory.check(lease) == lease
    again = directory.join("gang")
    with pytest.raises(StaleHandle, match=f"gang has begun epoch {again}"):
        directory.check(lease)
    with pytest.raises(StaleHandle, match="is over"):
        directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"))
    with pytest.raises(StaleHandle, match="has no page of context abc"):
        directory.lease(SPACE, "abc", "gang", again, shelf("abc"))
    assert pages_found(directory, "abc") == 0
    assert not directory.leave("gang", epoch)  # the word of the dead one comes late
    assert directory.leave("gang", again)
    assert not directory.leave("gang", again)
    assert directory.join("gang") > again


def test_a_silent_holder_is_dead(directory: Directory, clock: FakeClock) -> None:
    epoch = directory.join("gang", silence_s=10.0)
    put(directory, "gang", epoch, "abc")
    clock.now_s += 9.0
    directory.beat("gang", epoch)
    clock.now_s += 9.0
    assert pages_found(directory, "abc") == 3
    clock.now_s += 1.5
    assert pages_found(directory, "abc") == 0
    with pytest.raises(StaleHandle, match="has left or died: join again"):
        directory.beat("gang", epoch)


def test_what_is_leased_stays_until_the_lease_ends(directory: Directory, clock: FakeClock) -> None:
    epoch = directory.join("gang")
    put(directory, "gang", epoch, "abc")
    lease = directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"), ttl_s=20.0)
    with pytest.raises(InUse, match=r"3 pages of gang cannot go yet: 1 leases stand, .* 20.0 s"):
        directory.withdraw("gang", epoch, SPACE, shelf("abc"))
    with pytest.raises(InUse, match="context abc cannot go yet"):
        directory.forget(SPACE, "abc")
    clock.now_s += 15.0
    assert directory.renew(lease, 20.0).until_s == clock.now_s + 20.0
    clock.now_s += 15.0
    directory.check(lease)
    clock.now_s += 5.0
    with pytest.raises(StaleHandle, match=r"ended 0.0 s ago; look the pages up again"):
        directory.check(lease)
    with pytest.raises(StaleHandle):
        directory.renew(lease)
    assert not directory.end_lease(lease)
    assert directory.withdraw("gang", epoch, SPACE, shelf("abc")) == 3


def test_a_released_lease_is_refused_and_does_not_come_back(directory: Directory) -> None:
    epoch = directory.join("gang")
    keys = put(directory, "gang", epoch, "abc")
    whole = directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"))
    page = directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"), key=keys[1])
    assert directory.in_use(SPACE, keys[0]) == 1
    assert directory.in_use(SPACE, keys[1]) == 2
    assert directory.end_lease(whole)
    assert not directory.end_lease(whole)
    with pytest.raises(StaleHandle, match="it was released"):
        directory.check(whole)
    assert directory.withdraw("gang", epoch, SPACE, shelf("abc"), [keys[0]]) == 1
    with pytest.raises(InUse):
        directory.withdraw("gang", epoch, SPACE, shelf("abc"), [keys[1], keys[2]])
    assert directory.check(page) == page
    directory.discard("gang", epoch, SPACE, shelf("abc"), [keys[1]], "page b was damaged")
    with pytest.raises(StaleHandle, match="page b was damaged"):
        directory.check(page)


def test_a_lease_is_as_long_as_may_be_at_most(directory: Directory, clock: FakeClock) -> None:
    epoch = directory.join("gang")
    put(directory, "gang", epoch, "abc")
    lease = directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"), ttl_s=1e9)
    assert (lease.ttl_s, lease.until_s) == (LONGEST_S, clock.now_s + LONGEST_S)
    with pytest.raises(BadInput, match="wanted more than 0"):
        directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"), ttl_s=0.0)


def test_clocks_that_are_set_change_no_lease(
    directory: Directory, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = directory.join("gang")
    put(directory, "gang", epoch, "abc")
    lease = directory.lease(SPACE, "abc", "gang", epoch, shelf("abc"), ttl_s=20.0)
    for set_to in (0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda now_s=set_to: now_s)
        directory.check(lease)
    clock.now_s -= 500.0  # no monotonic clock does this: were it to, time stands still
    directory.check(lease)
    with pytest.raises(InUse, match=r"20.0 s more"):
        directory.withdraw("gang", epoch, SPACE, shelf("abc"))
    clock.now_s += 519.0
    directory.check(lease)
    clock.now_s += 1.0
    with pytest.raises(StaleHandle):
        directory.check(lease)


def test_a_reference_keeps_the_last_copy_or_the_one_it_names(directory: Directory) -> None:
    gang, disk, control = map(directory.join, ("gang", "disk", "control"))
    put(directory, "gang", gang, "abc")
    keys = put(directory, "disk", disk, "abcd", shelf("abcd", Tier.DISK))
    directory.refer("control", control, "session 1", SPACE, "abc")
    assert directory.withdraw("disk", disk, SPACE, shelf("abcd", Tier.DISK), keys[3:]) == 1
    assert directory.withdraw("disk", disk, SPACE, shelf("abcd", Tier.DISK), []) == 0
    assert directory.withdraw("disk", disk, SPACE, shelf("abcd", Tier.DISK)) == 3
    with pytest.raises(InUse, match="3 pages of context abc at gang are needed by session 1"):
        directory.withdraw("gang", gang, SPACE, shelf("abc"))
    put(directory, "disk", disk, "abcd", shelf("abcd", Tier.DISK), write="again")
    directory.refer("control", control, "session 2", SPACE, "abc", holder="gang", place="abc")
    assert directory.release("control", control, "session 1")
    assert not directory.release("control", control, "session 1")
    directory.refer("control", control, "session 1", SPACE, "abc")  # late: it is over
    with pytest.raises(InUse, match="session 2 of control"):
        directory.withdraw("gang", gang, SPACE, shelf("abc"))
    put(directory, "gang", gang, "ab")  # a copy of its own, which session 2 does not need
    assert directory.withdraw("gang", gang, SPACE, shelf("ab")) == 2
    directory.join("control")  # the one that had the sessions is dead
    assert directory.withdraw("gang", gang, SPACE, shelf("abc")) == 3


def test_pages_are_stored_once_and_live_as_long_as_a_context_has_them(directory: Directory) -> None:
    epoch = directory.join("host")
    at = shelf("", Tier.HOST)
    put(directory, "host", epoch, "abc", at)
    put(directory, "host", epoch, "abd", at)
    assert directory.used_bytes(SPACE) == {Tier.HOST: 40}
    assert directory.forget(SPACE, "abc")
    assert not directory.forget(SPACE, "abc")
    assert directory.used_bytes(SPACE) == {Tier.HOST: 30}
    assert pages_found(directory, "abd") == 3
    assert directory.known(SPACE, keys_of("abc")) == 2
    assert directory.forget(SPACE, "abd")
    assert directory.used_bytes(SPACE) == {}


def test_tenants_do_not_see_each_other(directory: Directory) -> None:
    epoch = directory.join("gang")
    put(directory, "gang", epoch, "abc")
    state = directory.records()
    assert pages_found(directory, "abc", "other") == 0
    assert directory.contexts("other") == ()
    assert directory.used_bytes("other") == {}
    assert directory.locate("other", keys_of("abc")) == [None] * 3
    assert directory.in_use("other", keys_of("abc")[0]) == 0
    assert not directory.forget("other", "abc")
    for act in (
        lambda: directory.lease("other", "abc", "gang", epoch, shelf("abc")),
        lambda: directory.refer("gang", epoch, "r", "other", "abc"),
    ):
        with pytest.raises(UnknownName, match="unknown context 'abc'; known: none"):
            act()
    with pytest.raises(BadInput, match="is of no context"):
        directory.stage("gang", epoch, "w", "other", shelf("abc"), entries(keys_of("abc")))
    assert directory.records() == state  # not even a place for the other one was made


def test_what_makes_no_sense_is_refused(directory: Directory) -> None:
    epoch = directory.join("gang")
    put(directory, "gang", epoch, "abc")
    with pytest.raises(BadInput, match="two contexts cannot have one id"):
        directory.declare(SPACE, "abc", keys_of("abd"), 3, owner="gang", epoch=epoch, ref="r")
    with pytest.raises(BadInput, match="0 page keys"):
        directory.declare(SPACE, "x", [], 0, owner="gang", epoch=epoch, ref="r")
    with pytest.raises(BadInput, match="out of order"):
        directory.declare(SPACE, "x", keys_of("abc")[1:], 2, owner="gang", epoch=epoch, ref="r")
    with pytest.raises(BadInput, match="without a name"):
        directory.join("")
    with pytest.raises(StaleHandle, match="join again"):
        directory.beat("nobody", 1)
    with pytest.raises(UnknownName, match="unknown context 'z'; known: abc"):
        directory.refer("gang", epoch, "r", SPACE, "z")
