"""Sessions that advance together say what each of them says alone."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.tail import owned
from ringspan.attention.transport import Transport
from ringspan.cluster import answers, decoding
from ringspan.cluster.messages import AnswerRequest, GangSpec, ModelSpec, PrefillPlan
from ringspan.cluster.rank import Rank
from ringspan.errors import BadInput, TooLarge
from ringspan.testing import spawn_ranks
from ringspan.types import Span, page_tokens_for

LLAMA = "random:tiny-llama"
CONTEXT = 300
"""Tokens of the first context: its last page is short, so that tails begin within a page."""
QUESTIONS = (1, 7, 130, 83, 2)
"""Lengths. With 83 the question ends one token before a page of 128 does."""


class Ranks:
    """Loopback ranks that hold the contexts `c` (300 tokens) and `d` (517 others)."""

    def __init__(
        self, model: str, world_size: int, codec: str = "raw", device: str = "cpu"
    ) -> None:
        spec = GangSpec(
            world_size=world_size,
            model=ModelSpec(name=model, dtype="float32"),
            transport="loopback",
            device=device,
            threads=1,
            measure=False,
        )
        self.world_size = world_size
        self.world = LoopbackWorld(world_size, timeout_s=60.0, poison=True)
        self.ranks = [Rank(rank, spec) for rank in range(world_size)]
        facts = self.each(lambda rank: rank.start(self.world))[0].facts
        self.page_tokens = page_tokens_for(facts.head_dim)
        for name, tokens, seed in (("c", CONTEXT, 7), ("d", 517, 8)):
            plan = PrefillPlan(
                context_id=name,
                num_tokens=tokens,
                page_tokens=self.page_tokens,
                chunk_tokens=8 * self.page_tokens,
                layout="zigzag",
                scheme="ring",
                codec=codec,
            )
            ids = np.random.default_rng(seed).integers(0, 1024, tokens).astype(np.int32)
            self.each(lambda rank, plan=plan, ids=ids: rank.begin_prefill(plan, ids))
            for index in range(len(plan.chunks)):
                self.each(lambda rank, name=name, at=index: rank.prefill_chunk(name, at))

    def each(self, do: Any) -> list[Any]:
        return self.world.run([functools.partial(do, rank) for rank in self.ranks])

    def together(self, requests: Sequence[AnswerRequest]) -> dict[str, list[int]]:
        """The tokens of every session; every rank says the same."""
        told = self.each(lambda rank: list(rank.generate_together(tuple(requests))))
        assert all(one == told[0] for one in told)
        said: dict[str, list[int]] = {request.session_id: [] for request in requests}
        for tokens in told[0]:
            for chunk in tokens.chunks:
                assert chunk.index == len(said[chunk.session_id])
                said[chunk.session_id].append(chunk.token_id)
        return said

    def alone(self, requests: Sequence[AnswerRequest]) -> dict[str, list[int]]:
        """The same, each with all ranks to itself, in sessions `alone ..`."""
        said = {}
        for request in requests:
            by_itself = replace(request, session_id=f"alone {request.session_id}")
            told = self.each(lambda rank, one=by_itself: list(rank.generate(one)))
            said[request.session_id] = [chunk.token_id for chunk in told[0]]
        return said

    def tails(self, session: str) -> list[tuple[Span, ...]]:
        return [rank.answers._sessions[session].tail.spans for rank in self.ranks]

    def end(self) -> None:
        self.each(lambda rank: rank.answers.clear())


@functools.cache
def started(model: str, world_size: int, codec: str) -> Ranks:
    return Ranks(model, world_size, codec)


def ranks_of(model: str, world_size: int, codec: str = "raw") -> Ranks:
    """Without sessions; started once."""
    ranks = started(model, world_size, codec)
    ranks.end()
    return ranks


def asked(lengths: Sequence[int] = QUESTIONS, **options: Any) -> list[AnswerRequest]:
    drawn = np.random.default_rng(3).integers(0, 1024, 2000)
    return [
        AnswerRequest(
            session_id=f"s{at}",
            context_id="c",
            token_ids=tuple(int(t) for t in drawn[at : at + length]),
            **{"max_tokens": 9, **options},
        )
        for at, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sessions_say_together_what_they_say_alone(world_size: int) -> None:
    ranks, requests = ranks_of(LLAMA, world_size), asked()
    assert ranks.together(requests) == ranks.alone(requests)
    for request, length in zip(requests, QUESTIONS, strict=True):
        stop = CONTEXT + length + 8  # the last token has not been through the model
        assert ranks.tails(request.session_id) == [
            owned(Span(CONTEXT, stop), rank, world_size, ranks.page_tokens)
            for rank in range(world_size)
        ]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("model", ["random:tiny-gemma2", "random:tiny-mistral"])
def test_windows_move_on_with_every_session(model: str, world_size: int) -> None:
    ranks, requests = ranks_of(model, world_size), asked()
    assert ranks.together(requests) == ranks.alone(requests)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("model", ["random:tiny", "random:tiny-mistral"])
def test_an_encoded_context_is_swept_once_for_all(model: str, codec: str, world_size: int) -> None:
    ranks, requests = ranks_of(model, world_size, codec), asked()
    assert ranks.together(requests) == ranks.alone(requests)


@pytest.mark.parametrize("world_size", [1, 2])
def test_sessions_of_two_contexts_share_a_step(world_size: int) -> None:
    ranks = ranks_of(LLAMA, world_size)
    requests = [replace(request, context_id="cd"[at % 2]) for at, request in enumerate(asked())]
    assert ranks.together(requests) == ranks.alone(requests)


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_answer_stops_where_it_stops_alone(world_size: int) -> None:
    ranks, requests = ranks_of(LLAMA, world_size), asked(max_tokens=12)
    whole = ranks.alone(requests)
    ranks.end()
    stops = (0, 3, 5, 11)  # the fifth one goes on to the end
    requests = [
        replace(request, stop_ids=(whole[request.session_id][stop],), max_tokens=12 - at)
        if at < len(stops) else request
        for at, (request, stop) in enumerate(zip(requests, (*stops, 0), strict=True))
    ]  # fmt: skip
    said = ranks.together(requests)
    assert said == ranks.alone(requests)
    assert len({len(tokens) for tokens in said.values()}) > 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_draws_depend_on_a_sessions_own_seed_alone(world_size: int) -> None:
    ranks = ranks_of(LLAMA, world_size)
    requests = [
        replace(request, seed=at, temperature=(0.0, 0.8, 1.5)[at % 3], top_p=0.9)
        for at, request in enumerate(asked())
    ]
    said = ranks.together(requests)
    assert said == ranks.alone(requests)
    assert said["s1"] != ranks.alone([replace(requests[1], session_id="t", seed=99)])["t"]


def test_sessions_go_on_alone_or_together() -> None:
    ranks, requests = ranks_of(LLAMA, 2), asked()
    first = ranks.together(requests)
    assert first == ranks.alone(requests)
    following = asked(lengths=(3, 200, 1, 4, 5), max_tokens=5)
    again = [replace(request, token_ids=request.token_ids[::-1]) for request in following]
    assert ranks.together(again[:3]) == ranks.alone(again[:3])
    one = replace(again[3], session_id="s3")
    assert ranks.alone([replace(one, session_id="s3")]) == ranks.together([one])


def test_more_sessions_than_one_step_takes_answer_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "MAX_TOGETHER", 2)
    ranks, requests = ranks_of(LLAMA, 1), asked(max_tokens=3)
    assert ranks.together(requests) == ranks.alone(requests)


def test_a_client_that_goes_away_leaves_sessions_that_go_on() -> None:
    ranks, requests = ranks_of(LLAMA, 2), asked(lengths=(5, 60), max_tokens=8)

    def some(rank: Rank) -> list[Any]:
        stream = rank.generate_together(tuple(requests))
        told = [next(stream) for _ in range(4)]  # the first tokens, then three of each
        stream.close()
        return told

    heard = [chunk.token_id for step in ranks.each(some)[0] for chunk in step.chunks]
    assert len(heard) == 2 + 2 * 3
    short = [replace(request, max_tokens=4) for request in requests]
    ranks.alone(short)
    more = [replace(request, token_ids=(9, 8, 7)) for request in requests]
    assert ranks.together(more) == ranks.alone(more)


def test_what_cannot_be_asked_is_refused_and_changes_nothing() -> None:
    ranks, requests = ranks_of(LLAMA, 1), asked(lengths=(3, 4))
    with pytest.raises(BadInput, match="at least one token"):
        ranks.together([requests[0], replace(requests[1], token_ids=())])
    with pytest.raises(BadInput, match="asked twice at once"):
        ranks.together([requests[0], requests[0]])
    with pytest.raises(TooLarge, match="is beyond the"):
        ranks.together([requests[0], replace(requests[1], max_tokens=10**7)])
    assert not ranks.ranks[0].answers._sessions
    pool = ranks.ranks[0]._runtime.pool
    assert not [name for name in pool.shards if name.startswith("tails")]


def test_the_memory_of_tails_is_given_back_with_the_last_session() -> None:
    ranks, requests = ranks_of(LLAMA, 1), asked(lengths=(3, 4))
    ranks.together(requests)
    pool = ranks.ranks[0]._runtime.pool

    def blocks() -> list[str]:
        return [name for name in pool.shards if name.startswith("tails")]

    assert len(blocks()) == 1
    ranks.each(lambda rank: rank.end_session("s0"))
    assert len(blocks()) == 1
    ranks.each(lambda rank: rank.end_session("s1"))
    assert not blocks()


def answer_over_gloo(transport: Transport, rank: int, folder: Path) -> None:
    """In a process of its own: prefill `c`, answer together and alone."""
    world_size = transport.world_size
    transport.close()  # the rank joins a group of its own
    spec = GangSpec(
        world_size=world_size,
        model=ModelSpec(name=LLAMA, dtype="float32"),
        transport="gloo",
        device="cpu",
        threads=1,
    )
    one, place = Rank(rank, spec), folder / "address"
    if rank == 0:
        address, port = one.host_store()
        (folder / "writing").write_text(f"{address} {port}")
        (folder / "writing").rename(place)
    while not place.exists():
        time.sleep(0.05)
    address, text = place.read_text().split()
    one.start((address, int(text)))
    plan = PrefillPlan(
        context_id="c", num_tokens=CONTEXT, page_tokens=128, chunk_tokens=1024,
        layout="zigzag", scheme="ring", codec="raw",
    )  # fmt: skip
    one.begin_prefill(plan, np.random.default_rng(7).integers(0, 1024, CONTEXT).astype(np.int32))
    one.prefill_chunk("c", 0)
    requests = asked()
    together: dict[str, list[int]] = {request.session_id: [] for request in requests}
    for step in one.generate_together(tuple(requests)):
        for chunk in step.chunks:
            together[chunk.session_id].append(chunk.token_id)
    for request in requests:
        alone = one.generate(replace(request, session_id=f"alone {request.session_id}"))
        assert [chunk.token_id for chunk in alone] == together[request.session_id]
    (folder / f"said by {rank}").write_text(json.dumps(together))
    one.stop()


def test_real_processes_say_together_what_they_say_alone(tmp_path: Path) -> None:
    spawn_ranks(answer_over_gloo, 2, tmp_path)
    said = [json.loads((tmp_path / f"said by {rank}").read_text()) for rank in range(2)]
    assert said[0] == said[1] == ranks_of(LLAMA, 2).together(asked())


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
@pytest.mark.parametrize("sessions", [1, 5])
def test_a_captured_step_says_what_launches_say(codec: str, sessions: int) -> None:
    """On one GPU, where the ranks are one."""
    ranks = Ranks("random:tiny-llama", 1, codec, device="cuda")
    requests = asked(QUESTIONS[:sessions], max_tokens=40)
    runtime = ranks.ranks[0]._runtime
    captured: list[bool] = []
    step = decoding.Decoding.step

    def noted(self: decoding.Decoding) -> Any:
        out = step(self)
        captured.append(self.is_captured)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding.Decoding, "step", noted)
        said = ranks.together(requests)
    assert captured[-1]
    ranks.end()
    runtime.captures = False
    assert ranks.together(requests) == said
