"""A context handed from one gang to another while it is prefilled: real ranks, a real model."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from ray.cloudpickle import register_pickle_by_value

from ringspan.cluster.gang import Gang
from ringspan.cluster.handing import HandingOver, stretches_of
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import AnswerRequest, GangSpec, ModelSpec, PrefillPlan
from ringspan.cluster.rank import Rank
from ringspan.cluster.ray_cluster import connect
from ringspan.cluster.ray_gang import RayGang
from ringspan.errors import BadInput, RankLost, RingspanError, StoreError
from ringspan.kvstore.handoff import HandoffPlan, Moved, StaleHandle, error_of
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, page_keys
from ringspan.types import Span

register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test module

MODEL = ModelSpec(name="random:tiny", seed=3)
TOKENS = np.random.default_rng(5).integers(0, 256, size=1419, dtype=np.int32)
"""Eleven pages of 128 and a short one."""
EPOCHS = itertools.count(1)
QUESTION = (7, 200, 31)


class OpenRank(Rank):
    """Shows what it holds."""

    def pages_of(self, name: str) -> list[tuple[Span, bytes]]:
        held = self.contexts[name]
        keys = ["00" * 32] * 20
        shard = held.resident
        pages = [shard.export_page(i, held.origin, keys) for i in range(len(shard.pages()))]
        return [(page.header.span, bytes(page.payload)) for page in pages]

    def free_bytes(self) -> int:
        return self._runtime.pool.free_bytes

    def pid(self) -> int:
        return os.getpid()


def _spec(world_size: int, **more: Any) -> GangSpec:
    return GangSpec(
        world_size=world_size, model=MODEL, device="cpu", threads=1, timeout_s=30.0, **more
    )


@pytest.fixture(scope="module")
def gangs() -> Iterator[dict[int, LocalGang]]:
    """By size; each of them hands over and takes."""
    found = {size: LocalGang(_spec(size), rank_class=OpenRank) for size in (1, 2, 3)}
    try:
        for gang in found.values():
            gang.start()
        yield found
    finally:
        for gang in found.values():
            gang.close()


def _plan(gang: Gang, codec: str = "raw", tokens: np.ndarray = TOKENS) -> PrefillPlan:
    keys = page_keys(gang.ready[0].facts.fingerprint, PUBLIC_NAMESPACE, tokens, 128)
    return PrefillPlan(
        context_id=context_id(keys),
        num_tokens=len(tokens),
        page_tokens=128,
        chunk_tokens=384,
        layout="zigzag",
        scheme="ring",
        codec=codec,
    )


def _call(gang: Gang, method: str, *args: Any) -> list[Any]:
    return gang.call(method, *args, timeout_s=120, what=method)


def _chunks(gang: Gang, plan: PrefillPlan, first: int = 0) -> None:
    for index in range(first, len(plan.chunks)):
        _call(gang, "prefill_chunk", plan.context_id, index)


def _pages(gang: Gang, name: str) -> dict[Span, bytes]:
    return dict(page for rank in _call(gang, "pages_of", name) for page in rank)


def _answer(gang: Gang, name: str, session: str) -> list[int]:
    request = AnswerRequest(
        session_id=session, context_id=name, token_ids=QUESTION, max_tokens=5, audit_rows=0
    )
    return [
        chunk.token_id for chunk in gang.stream("generate", request, timeout_s=60, what="asking")
    ]


def _drop(name: str, *gangs: Gang) -> None:
    for gang in gangs:
        _call(gang, "drop", name)


@pytest.mark.parametrize(
    ("senders", "receivers", "codec"),
    [(1, 2, "raw"), (3, 1, "raw"), (2, 3, "int8"), (3, 2, "raw")],
)
def test_what_arrives_while_it_is_prefilled_is_what_was_computed(
    gangs: dict[int, LocalGang], senders: int, receivers: int, codec: str
) -> None:
    ours, theirs = gangs[senders], gangs[receivers]
    plan = _plan(ours, codec)
    name = plan.context_id
    _call(ours, "begin_prefill", plan, TOKENS)
    _call(ours, "prefill_chunk", name, 0)  # what is there already goes too
    epoch = next(EPOCHS)
    handing = HandingOver.begin(ours, theirs, name, TOKENS, epoch=epoch, layout="striped")
    _chunks(ours, plan, 1)
    with pytest.raises(BadInput, match=f"does not hold context {name}"):
        _pages(theirs, name)  # not before all is verified
    handed = handing.finish()
    assert sum(moved.pages for moved in handed.receivers) == 12
    assert handed.bad_pages == 0
    assert sum(shard.num_pages for shard in handed.opened) == 12
    assert sum(shard.pages["verified"]["handoff"] for shard in handed.opened) == 12
    assert _pages(theirs, name) == _pages(ours, name)
    assert handed.payload_bytes == sum(map(len, _pages(ours, name).values()))
    assert _answer(theirs, name, "there") == _answer(ours, name, "here")
    _drop(name, ours, theirs)


def test_pages_are_recoded_before_they_are_sent(gangs: dict[int, LocalGang]) -> None:
    ours, theirs = gangs[2], gangs[3]
    plan = _plan(ours)
    name = plan.context_id
    _call(ours, "begin_prefill", plan, TOKENS)
    _chunks(ours, plan)
    handing = HandingOver.begin(ours, theirs, name, TOKENS, epoch=100, codec_name="int8")
    handed = handing.finish()
    raw_bytes = sum(map(len, _pages(ours, name).values()))
    assert handed.payload_bytes < raw_bytes / 3  # 9 bits of 32
    assert len(_answer(theirs, name, "recoded")) == 5
    with pytest.raises(BadInput, match=r"is in codec int8 .* claim to be exact"):
        HandingOver.begin(theirs, gangs[1], name, TOKENS, epoch=101, codec_name="raw")
    again = HandingOver.begin(theirs, gangs[1], name, TOKENS, epoch=101).finish()
    assert again.payload_bytes == handed.payload_bytes  # encoded pages stay as they are
    assert _pages(gangs[1], name) == _pages(theirs, name)
    _drop(name, ours, theirs, gangs[1])


def test_a_prefill_begun_anew_is_another_one(gangs: dict[int, LocalGang]) -> None:
    """What was under way is given up on both sides, and its reference is refused."""
    ours, theirs = gangs[2], gangs[1]
    plan = _plan(ours)
    name = plan.context_id
    free = _call(theirs, "free_bytes")
    _call(ours, "begin_prefill", plan, TOKENS)
    handing = HandingOver.begin(ours, theirs, name, TOKENS, epoch=200, timeout_s=5.0)
    _call(ours, "prefill_chunk", name, 0)
    _call(ours, "begin_prefill", plan, TOKENS)
    with pytest.raises(StoreError, match=f"context {name} .* is not offered here any more"):
        _call(ours, "begin_sending", handing.plan)
    with pytest.raises(RingspanError, match=r"gave the hand-off of .* up: the context was dropped"):
        handing.finish(30.0)
    assert _call(theirs, "free_bytes") == free
    with pytest.raises(StaleHandle, match=r"offered under epoch 200, now under 200"):
        HandingOver.begin(ours, theirs, name, TOKENS, epoch=200)
    handing = HandingOver.begin(ours, theirs, name, TOKENS, epoch=201)
    _chunks(ours, plan)
    handing.finish()
    assert _pages(theirs, name) == _pages(ours, name)
    fence = msgspec.structs.replace(handing.plan.fence, epoch=200)
    old = msgspec.structs.replace(handing.plan, fence=fence, handoff_id="old")
    with pytest.raises(StoreError, match=r"epoch 200.* is older than epoch 201"):
        _call(theirs, "begin_receiving", old, TOKENS, "")
    _drop(name, ours, theirs)


def test_another_prompt_is_refused_by_the_receivers(gangs: dict[int, LocalGang]) -> None:
    ours, theirs = gangs[2], gangs[3]
    plan = _plan(ours)
    _call(ours, "begin_prefill", plan, TOKENS)
    free = _call(theirs, "free_bytes")
    offer = _call(ours, "offer_handoff", plan.context_id, 300, "", TOKENS, "")[0]
    other = TOKENS.copy()
    other[3] += 1
    address, port = _call(theirs, "host_handoff", "h")[0]
    made = HandoffPlan(
        handoff_id="h",
        fence=offer.fence,
        form=offer.form,
        origin=offer.origin,
        num_tokens=offer.num_tokens,
        stretches=stretches_of(offer, 3),
        senders=2,
        receivers=3,
        address=address,
        port=port,
    )
    with pytest.raises(StoreError, match="other tokens, another model or another form"):
        _call(theirs, "begin_receiving", made, other, "")
    assert _call(theirs, "free_bytes") == free
    _call(theirs, "abandon_handoff", "h", "it was refused")
    assert not theirs.lost
    _drop(plan.context_id, ours)


def test_a_hand_off_can_be_abandoned_and_leaves_no_memory_taken(
    gangs: dict[int, LocalGang],
) -> None:
    ours, theirs = gangs[1], gangs[2]
    plan = _plan(ours)
    name = plan.context_id
    _call(ours, "begin_prefill", plan, TOKENS)
    free = _call(theirs, "free_bytes")
    handing = HandingOver.begin(ours, theirs, name, TOKENS, epoch=400, timeout_s=4.0)
    assert _call(theirs, "free_bytes") != free
    _call(ours, "prefill_chunk", name, 0)
    handing.abandon("the client went away")
    handing.abandon("again")
    assert _call(theirs, "free_bytes") == free
    _chunks(ours, plan, 1)  # the prefill goes on
    ends: list[Moved] = _call(theirs, "end_receiving", handing.plan.handoff_id, 1.0)
    assert all(one.failed and "was given up" in str(error_of(one.failed)) for one in ends)
    _drop(name, ours)


@pytest.mark.ray
@pytest.mark.slow
def test_a_receiver_that_dies_costs_the_senders_nothing() -> None:
    """Two gangs of Ray actors; gloo between all of them."""
    with (
        connect(num_cpus=4),
        RayGang(_spec(2), rank_class=OpenRank) as ours,
        RayGang(_spec(2), rank_class=OpenRank) as theirs,
    ):
        plan = _plan(ours)
        name = plan.context_id
        _call(ours, "begin_prefill", plan, TOKENS)
        handing = HandingOver.begin(ours, theirs, name, TOKENS, epoch=1, timeout_s=5.0)
        _call(ours, "prefill_chunk", name, 0)
        os.kill(_call(theirs, "pid")[1], signal.SIGKILL)
        _chunks(ours, plan, 1)
        with pytest.raises(RankLost, match=r"rank 1 .* died"):
            handing.finish(30.0)
        assert not ours.lost
        assert len(_pages(ours, name)) == 12
        theirs.close()  # its place on the machine is wanted
        with RayGang(_spec(1), rank_class=OpenRank) as others:
            HandingOver.begin(ours, others, name, TOKENS, epoch=2).finish()
            assert _pages(others, name) == _pages(ours, name)
            assert _answer(others, name, "there") == _answer(ours, name, "here")
