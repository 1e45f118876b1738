"""Contexts handed over between real processes over gloo, and what must not pass for one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from ringspan.errors import BadInput, CorruptPage, PeerTimeout
from ringspan.kvstore.handoff import (
    AliveNote,
    Fence,
    PagesNote,
    check_plan,
    checksum_of,
    decode_note,
    encode_note,
    error_of,
    failed_note,
)
from ringspan.kvstore.handoff_case import (
    RECEIVER,
    SENDER,
    HandoffCase,
    RankEnded,
    ended_of,
    run_cases,
    run_function,
    save_ended,
    send_case,
    started,
    take_case,
)
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.leases import StaleHandle
from ringspan.kvstore.pair import Road, Sent

LONGEST_S = 120.0
"""For all cases of one start of processes, on a machine that does other things."""


class _Faulty:
    """A road that does to parcels of pages what `fault` says; the note says nothing of it."""

    def __init__(self, road: Road, fault: str) -> None:
        self._road, self._fault, self.peer = road, fault, road.peer
        self._seen = 0
        self._extra: list[Sent] = []
        self._kept: tuple[bytes, torch.Tensor | None] | None = None

    def send(self, note: bytes, payload: torch.Tensor | None = None) -> Sent:
        if payload is None:
            self._let_go()
            return self._road.send(note, payload)
        self._seen += 1
        if self._fault == "flip-all" or (self._fault == "flip" and self._seen == 2):
            payload = payload.clone()
            payload[payload.numel() // 3] ^= 0x10
        elif self._fault == "twice" and self._seen == 2:
            self._extra.append(self._road.send(note, payload.clone()))
        elif self._fault == "swap" and self._kept is None and self._seen == 1:
            self._kept = note, payload.clone()
            return Sent((), (), lambda _: None)
        elif self._fault == "other-bytes" and self._seen == 1:
            self._kept = note, payload.clone()  # its bytes go under the next one's note
        elif self._fault == "other-bytes" and self._kept is not None:
            kept, self._kept = self._kept[1], None
            if kept is not None and kept.shape == payload.shape:
                payload = kept
        sent = self._road.send(note, payload)
        if self._fault == "swap":
            self._let_go()
        return sent

    def _let_go(self) -> None:
        if self._fault == "swap" and self._kept is not None:
            kept, self._kept = self._kept, None
            self._extra.append(self._road.send(*kept))

    def recv(self, room: Any) -> bytes:
        self._let_go()
        return self._road.recv(room)

    def close(self) -> None:
        self._road.close()


def flip(road: Road, side: str, rank: int, peer: int) -> Any:
    return _Faulty(road, "flip") if side == SENDER else road


def flip_all(road: Road, side: str, rank: int, peer: int) -> Any:
    return _Faulty(road, "flip-all") if (side, rank, peer) == (SENDER, 1, 1) else road


def twice(road: Road, side: str, rank: int, peer: int) -> Any:
    return _Faulty(road, "twice") if side == SENDER else road


def swap(road: Road, side: str, rank: int, peer: int) -> Any:
    return _Faulty(road, "swap") if side == SENDER else road


def other_bytes(road: Road, side: str, rank: int, peer: int) -> Any:
    return _Faulty(road, "other-bytes") if side == SENDER else road


def _case(name: str, senders: int, receivers: int, num_tokens: int, **more: Any) -> HandoffCase:
    chunk = more.pop("chunk_tokens", 96)
    return HandoffCase(
        name=name,
        senders=senders,
        receivers=receivers,
        num_tokens=num_tokens,
        chunk_tokens=chunk,
        seed=num_tokens,
        **more,
    )


GOOD = (
    *[
        _case(
            f"{s}-to-{r}", s, r, 203 + 16 * s + r, layout=("zigzag", "striped", "contiguous")[r - 1]
        )
        for s in (1, 2, 3)
        for r in (1, 2, 3)
    ],
    _case("one-token", 2, 3, 1),
    _case("one-page", 3, 2, 16),
    _case("one-chunk", 2, 3, 95, chunk_tokens=960),
    _case("int8", 3, 2, 700, chunk_tokens=384, codec="int8"),
    _case("int4-odd", 2, 3, 517, chunk_tokens=256, codec="int4", head_dim=64),
    _case("fp16", 2, 1, 150, dtype="float16"),
    _case("raw-as-int8", 2, 3, 700, chunk_tokens=384, wire_codec="int8"),
    _case(
        "int8-as-int4", 3, 1, 517, chunk_tokens=256, codec="int8", wire_codec="int4", head_dim=64
    ),
)
MENDED = {
    name: _case(name, 2, 2, 331, chunk_tokens=112, wrap=f"{__file__}:{name}")
    for name in ("flip", "twice", "swap", "other_bytes")
}
REFUSED = {
    "flip_all": _case("flip_all", 2, 3, 203, wrap=f"{__file__}:flip_all"),
    "stale": _case("stale", 3, 2, 203, epoch=7, stale=2),
}
AFTER = _case("after", 3, 3, 203)
"""Last, by the same processes: what was refused has left them usable."""
ALL = (*GOOD, *MENDED.values(), *REFUSED.values(), AFTER)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handoff")
    with started(run_cases, 3, 3, ALL, str(folder)) as processes:
        until = time.monotonic() + LONGEST_S
        for process in processes.values():
            process.join(max(0.1, until - time.monotonic()))
            assert process.exitcode == 0
    return folder


def _ended(case: HandoffCase, side: str, folder: Path) -> list[RankEnded]:
    count = case.senders if side == SENDER else case.receivers
    found = [ended_of(case, side, rank, folder) for rank in range(count)]
    assert None not in found, f"{side} ranks of {case.name}: {found}"
    return [one for one in found if one is not None]


def _check_whole(case: HandoffCase, folder: Path) -> None:
    """Every receiver has its share bit for bit, and the counts of both sides agree."""
    takers, senders = _ended(case, RECEIVER, folder), _ended(case, SENDER, folder)
    assert [one.moved.failed for one in takers + senders] == [None] * len(takers + senders)
    assert all(one.right for one in takers)
    pages = -(-case.num_tokens // case.page_tokens)
    assert sum(one.moved.pages for one in takers) == pages
    assert sum(one.moved.payload_bytes for one in takers) == sum(
        case.plan(SENDER).form.bytes_of(min(case.page_tokens, case.num_tokens - start))
        for start in range(0, case.num_tokens, case.page_tokens)
    )
    assert sum(one.moved.bad_pages for one in senders) == sum(one.moved.bad_pages for one in takers)


@pytest.mark.parametrize("case", [*GOOD, AFTER], ids=lambda case: case.name)
def test_every_receiver_has_its_share_bit_for_bit(ran: Path, case: HandoffCase) -> None:
    _check_whole(case, ran)
    assert not any(one.moved.bad_pages for one in _ended(case, RECEIVER, ran))


@pytest.mark.parametrize("name", MENDED)
def test_what_the_wire_spoils_is_sent_again_or_dropped(ran: Path, name: str) -> None:
    case = MENDED[name]
    _check_whole(case, ran)
    takers = _ended(case, RECEIVER, ran)
    bad = sum(one.moved.bad_pages for one in takers)
    duplicates = sum(one.moved.duplicate_pages for one in takers)
    assert (bad > 0, duplicates > 0) == {
        "flip": (True, False),
        "twice": (False, True),
        "swap": (False, False),
        "other_bytes": (True, False),
    }[name]


def test_a_wire_that_spoils_a_page_every_time_ends_the_hand_off_for_both_ends(ran: Path) -> None:
    case = REFUSED["flip_all"]
    senders, takers = _ended(case, SENDER, ran), _ended(case, RECEIVER, ran)
    assert not takers[1].readable
    for one in (senders[1], takers[1]):
        assert one.moved.failed is not None
        assert "came to decode rank 1 wrong 3 times" in one.moved.failed.text
        assert "prefill rank 1" in one.moved.failed.text
    assert (senders[1].moved.hearsay, takers[1].moved.hearsay) == (False, True)
    for one in senders + takers:  # whoever was not through by then heard of it
        assert one.moved.failed is None or one.moved.failed.kind == "CorruptPage"


def test_pages_of_an_earlier_prefill_are_refused_and_nothing_is_installed(ran: Path) -> None:
    case = REFUSED["stale"]
    for one in _ended(case, RECEIVER, ran):
        assert not one.readable
        assert one.moved.pages == 0
        assert one.moved.failed is not None
        assert one.moved.failed.kind == "StaleHandle"
        assert "(epoch 5," in one.moved.failed.text
        assert "(epoch 7," in one.moved.failed.text
    assert all(one.moved.failed for one in _ended(case, SENDER, ran))


# what dies

DYING = _case("dying", 2, 2, 1024, chunk_tokens=64, timeout_s=2.0)
SECOND = _case("second", 1, 1, 203, timeout_s=20.0)


def _slow_part(side: str, rank: int, folder: str, victim: tuple[str, int]) -> None:
    """A process: `DYING` with time between chunks; those that live do `SECOND` after it."""
    torch.set_num_threads(1)

    def between(index: int) -> None:
        (Path(folder) / f"chunk-{index}-{rank}").touch()
        time.sleep(0.4)

    if side == SENDER:
        ended = RankEnded(moved=send_case(DYING, rank, Path(folder), between))
    else:
        ended = take_case(DYING, rank, Path(folder))
    save_ended(ended, DYING, side, rank, folder)
    alive = 1 - victim[1] if side == victim[0] else 0
    if rank == alive:
        case = SECOND
        if side == SENDER:
            again = RankEnded(moved=send_case(case, 0, Path(folder), lambda _: None))
        else:
            again = take_case(case, 0, Path(folder))
        save_ended(again, case, side, 0, folder)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", [(SENDER, 1), (RECEIVER, 0)], ids=["sender", "receiver"])
def test_a_rank_that_is_gone_is_named_by_all_and_they_go_on(
    tmp_path: Path, victim: tuple[str, int], how: signal.Signals
) -> None:
    with started(run_function, 2, 2, __file__, "_slow_part", str(tmp_path), victim) as processes:
        until = time.monotonic() + 60
        meet = [f"dying-joined-{SENDER}-{s}-{r}" for s in (0, 1) for r in (0, 1)]
        wanted = ["chunk-3-0", "chunk-3-1", *meet, *[m.replace(SENDER, RECEIVER) for m in meet]]
        while not all((tmp_path / name).exists() for name in wanted):
            assert time.monotonic() < until
            time.sleep(0.02)
        pid = processes[victim].pid
        assert pid is not None
        os.kill(pid, how)
        began = time.monotonic()
        others = [who for who in processes if who != victim]
        told: dict[tuple[str, int], float] = {}
        while len(told) < len(others) and time.monotonic() < until:
            for side, rank in others:
                if (side, rank) not in told and ended_of(DYING, side, rank, tmp_path):
                    told[side, rank] = time.monotonic() - began
            time.sleep(0.02)
        assert len(told) == len(others), told
        longest = 2 * DYING.timeout_s + 16 * 0.4 + 4.0  # senders first finish their chunks
        assert max(told.values()) < longest, told
        for side, rank in others:
            ended = ended_of(DYING, side, rank, tmp_path)
            assert ended is not None
            assert ended.moved.failed is not None
            assert not ended.readable
            assert ended.moved.failed.kind == "PeerTimeout"
            assert f"lost {victim[0]} rank {victim[1]} " in ended.moved.failed.text
        until = time.monotonic() + 60
        while time.monotonic() < until:
            ends = [ended_of(SECOND, side, 0, tmp_path) for side in (SENDER, RECEIVER)]
            if None not in ends:
                break
            time.sleep(0.05)
        assert [one is not None and one.moved.failed is None for one in ends] == [True, True]
        assert ends[1] is not None
        assert ends[1].right
        if how == signal.SIGSTOP:
            os.kill(pid, signal.SIGKILL)


# what is refused before anything moves

PLAN = HandoffCase(name="plan", senders=2, receivers=2, num_tokens=203, chunk_tokens=96)


def test_a_receiver_refuses_what_is_not_of_its_own_tokens() -> None:
    plan, keys = PLAN.plan(SENDER), PLAN.keys()
    check_plan(plan, keys)
    ids = np.arange(203)
    ids[150] += 1
    others = page_keys(plan.origin.fingerprint, PUBLIC_NAMESPACE, ids, plan.form.page_tokens)
    with pytest.raises(StaleHandle, match=r"the offer is of .* other tokens, another model or"):
        check_plan(plan, others)
    other_model = page_keys("cd" * 32, PUBLIC_NAMESPACE, np.arange(203), plan.form.page_tokens)
    with pytest.raises(StaleHandle, match="other tokens, another model"):
        check_plan(plan, other_model)


@pytest.mark.parametrize("stretches", [(), PLAN.chunks[1:], PLAN.chunks[:-1]], ids=str)
def test_stretches_that_do_not_tile_the_context_are_refused(stretches: Any) -> None:
    plan = msgspec.structs.replace(PLAN.plan(SENDER), stretches=stretches)
    with pytest.raises(BadInput, match=r"hand-off plan: "):
        check_plan(plan, PLAN.keys())


def test_a_fence_says_what_differs() -> None:
    plan = PLAN.plan(SENDER)
    note = AliveNote(fence=plan.fence, number=3)
    assert decode_note(encode_note(note), plan.fence, "decode rank 1") == note
    for other, why in (
        (Fence("0" * 16, plan.fence.epoch, plan.fence.checksum), "another context"),
        (Fence(plan.fence.context_id, 9, plan.fence.checksum), "an earlier prefill of it"),
        (Fence(plan.fence.context_id, 0, plan.fence.checksum), "a later prefill of it"),
        (Fence(plan.fence.context_id, 1, "0" * 32), "other tokens, another model"),
    ):
        with pytest.raises(StaleHandle, match=why):
            decode_note(encode_note(note), other, "decode rank 1")


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x81", os.urandom(200), b"\xff" * 50])
def test_bytes_that_are_no_note_are_a_clear_error(data: bytes) -> None:
    with pytest.raises(CorruptPage, match=r"what decode rank 1 sent .* cannot be read"):
        decode_note(data, PLAN.plan(SENDER).fence, "decode rank 1")


def test_the_checksum_covers_form_origin_and_every_key() -> None:
    plan, keys = PLAN.plan(SENDER), PLAN.keys()
    one = checksum_of(plan.form, plan.origin, keys)
    lossy = msgspec.structs.replace(plan.origin, provenance=("attended over int8 pages",))
    other = msgspec.structs.replace(plan.form, codec="bf16")
    swapped = [keys[1], keys[0], *keys[2:]]
    found = {
        one,
        checksum_of(plan.form, lossy, keys),
        checksum_of(other, plan.origin, keys),
        checksum_of(plan.form, plan.origin, swapped),
        checksum_of(plan.form, plan.origin, keys[:-1]),
    }
    assert len(found) == 5


def test_errors_cross_the_wire_as_what_they_are() -> None:
    fence = PLAN.plan(SENDER).fence
    for error in (CorruptPage("a\nb"), PeerTimeout("x"), StaleHandle("y"), BadInput("z")):
        back = error_of(failed_note(fence, error))
        assert type(back) is type(error)
        assert str(back) == str(error).splitlines()[0]
    assert str(error_of(failed_note(fence, KeyError("k")))) == "KeyError: 'k'"


def test_places_cover_every_page_once_and_rows_follow_each_other() -> None:
    for receivers in (1, 2, 3, 5):
        plan = msgspec.structs.replace(PLAN.plan(SENDER), receivers=receivers)
        places = plan.places()
        assert len(places) == 13
        for receiver in range(receivers):
            rows = [place.row for place in places if place.receiver == receiver]
            assert rows == [16 * at for at in range(len(rows))]


def test_a_note_of_pages_keeps_sums_of_64_bits() -> None:
    fence = PLAN.plan(SENDER).fence
    note = PagesNote(fence=fence, number=0, pages=())
    assert decode_note(encode_note(note), fence, "x") == note
