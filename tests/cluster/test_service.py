"""A service over loopback ranks with a small random model: many clients, each told the truth."""

from __future__ import annotations

import functools
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.events import Cancelled
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.cluster.service import Service
from ringspan.cluster.service_jobs import Ticket
from ringspan.cluster.service_types import (
    DoneEvent,
    Event,
    FailedEvent,
    JobState,
    Limits,
    Overloaded,
    ProgressEvent,
    Sampling,
    TenantLimits,
    TokenEvent,
)
from ringspan.errors import BadInput, RankLost, TooLarge, UnknownName
from ringspan.kvstore.folder import Store
from ringspan.kvstore.manifest import Manifest, read_manifest

MODEL = ModelSpec(name="random:tiny", seed=3)
LONG = np.random.default_rng(11).integers(0, 256, size=1800, dtype=np.int32)
OPTIONS = PrefillOptions(chunk_tokens=256)
WAIT_S = 8.0


def prompt(at: int, length: int = 40) -> list[int]:
    drawn = np.random.default_rng(100 + at).integers(0, 256, size=length)
    return [int(token) for token in drawn]


class Mortal(Rank):
    """Rank 1 is lost in the call of a method that `dies` names, once."""

    dies: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, rank: int, spec: GangSpec) -> None:
        super().__init__(rank, spec)
        self.number = rank

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in {method for method, _ in Mortal.dies} or self.number != 1:
            return found

        def mortal(*args: Any) -> Any:
            for at, (method, calls) in enumerate(Mortal.dies):
                if method == name:
                    if calls == 0:
                        del Mortal.dies[at]
                        raise ConnectionAbortedError("killed on purpose")
                    Mortal.dies[at] = method, calls - 1
            return found(*args)

        return mortal


@pytest.fixture(scope="module")
def gang() -> Iterator[LocalGang]:
    alone()
    spec = GangSpec(
        world_size=2, model=MODEL, device="cpu", threads=1, timeout_s=30.0, measure=False
    )
    with LocalGang(spec, rank_class=Mortal) as gang:
        yield gang
    alone().close()


@pytest.fixture
def service(gang: LocalGang) -> Iterator[Service]:
    yield from serving(gang)


def serving(gang: LocalGang, **more: Any) -> Iterator[Service]:
    Mortal.dies = []
    controller = Controller(gang)
    service = Service(controller, **more)
    yield service
    service.close()
    for handle in controller.contexts:
        controller.drop(handle.context_id)


class Heard:
    """What a client hears of one ticket."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.tokens: list[TokenEvent] = []
        self.views: list[Any] = []
        self.first_s = 0.0
        self.ended_s = 0.0
        self.first = threading.Event()
        self.ended = threading.Event()
        self.last: Event | None = None

    def __call__(self, events: Sequence[Event]) -> None:
        for event in events:
            assert self.last is None, "an event behind the last one"
            if isinstance(event, TokenEvent):
                self.tokens.append(event)
                self.first.set()
            elif isinstance(event, ProgressEvent):
                self.views.append(event.view)
            else:
                self.last, self.ended_s = event, time.monotonic()
                self.ended.set()

    def said(self) -> list[int]:
        """The whole answer."""
        assert self.ended.wait(WAIT_S), "stuck"
        if isinstance(self.last, FailedEvent):
            raise self.last.error
        assert [token.index for token in self.tokens] == list(range(len(self.tokens)))
        assert self.tokens[-1].finish_reason is not None
        return [token.token_id for token in self.tokens]


def ask(service: Service, tokens: Sequence[int], **more: Any) -> tuple[Heard, Ticket]:
    heard = Heard()
    where = {
        name: more.pop(name)
        for name in ("context_id", "session_id", "tenant", "priority", "keep", "idempotency_key")
        if name in more
    }
    sampling = Sampling(**{"max_tokens": 10, **more})
    return heard, service.answer(tokens, sampling, listener=heard, **where)


def make(service: Service, tokens: np.ndarray = LONG, **more: Any) -> tuple[Heard, Ticket]:
    heard = Heard()
    return heard, service.prefill(tokens, OPTIONS, listener=heard, **more)


@functools.cache
def alone() -> Controller:
    """On a gang of one rank. Models are loaded one at a time: that sets the default dtype."""
    spec = GangSpec(
        world_size=1, model=MODEL, device="cpu", threads=1, timeout_s=30.0, measure=False
    )
    return Controller(LocalGang(spec).start())


@functools.cache
def greedy(tokens: tuple[int, ...], most: int = 10) -> list[int]:
    """By a controller alone, the prompt taken through at once."""
    controller = alone()
    name = controller.prefill(np.array(tokens[:-1], dtype=np.int32), reuse=False).context_id
    session = controller.begin_session(name)
    return [t.token_id for t in controller.ask(session, name, tokens[-1:], max_tokens=most)]


def test_eight_at_once_say_what_each_says_alone(service: Service) -> None:
    prompts = [prompt(at, 5 + 47 * at) for at in range(8)]
    clients = [ask(service, one) for one in prompts]
    for (heard, _), one in zip(clients, prompts, strict=True):
        assert heard.said() == greedy(tuple(one))
        assert heard.tokens[-1].finish_reason == "length"
    assert len(service.views()) == 8
    assert all(view.state is JobState.done for view in service.views())


def test_one_joins_in_the_middle_and_another_leaves(service: Service) -> None:
    first, _ = ask(service, prompt(0), max_tokens=60)
    leaver, ticket = ask(service, prompt(1), max_tokens=400)
    assert leaver.first.wait(WAIT_S)
    later, _ = ask(service, prompt(2))
    ticket.leave()
    assert later.said() == greedy(tuple(prompt(2)))
    assert first.said() == greedy(tuple(prompt(0)), 60)
    until = time.monotonic() + WAIT_S
    while not service.view(ticket.request_id).state.ended and time.monotonic() < until:
        time.sleep(0.01)
    assert service.view(ticket.request_id).state is JobState.cancelled
    assert service.view(ticket.request_id).completion_tokens < 400


def test_slices_change_no_draw_no_stop_and_no_logprob(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy(tuple(prompt(5)), 24)
    stop = (whole[7],)
    asked = [
        {"temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 24},
        {"stop_ids": stop, "max_tokens": 24},
        {"stop_ids": stop, "min_tokens": 20, "max_tokens": 24, "logprobs": 3},
    ]
    said: dict[int, list[Any]] = {}
    for steps in (1, 3, 32):
        monkeypatch.setattr("ringspan.cluster.service_answers.MOST_STEPS", steps)
        monkeypatch.setattr("ringspan.cluster.service_answers.SLICE_S", 1e9)
        clients = [ask(service, prompt(5), **one)[0] for one in asked]
        for client in clients:
            client.said()
        said[steps] = [
            [(t.token_id, t.finish_reason, [one for one, _ in t.top]) for t in client.tokens]
            for client in clients
        ]
    assert said[1] == said[3] == said[32]
    drawn, stopped, least = said[1]
    assert [token for token, _, _ in stopped] == whole[: whole.index(stop[0]) + 1]
    assert stopped[-1][1] == "stop"
    assert [token for token, _, _ in drawn] != whole
    assert stop[0] not in [token for token, _, _ in least[:20]]
    for token, _, top in least:
        assert len(top) == 3
        assert token == top[0] or stop[0] == top[0]
    logprobs = clients[2].tokens
    assert all(token.logprob is not None and token.logprob < 0 for token in logprobs)


def test_one_prefill_serves_all_who_want_it(service: Service) -> None:
    first, one = make(service)
    second, two = make(service)
    asker, _ = ask(service, prompt(3), context_id=one.context_id)
    assert one.context_id == two.context_id
    assert one.request_id != two.request_id
    one.leave()  # the work goes on
    expected = greedy((*LONG.tolist(), *prompt(3)))
    assert asker.said() == expected
    assert second.ended.wait(WAIT_S)
    assert isinstance(second.last, DoneEvent)
    assert [view.chunk_index for view in second.views][-1] == 8
    assert first.last is None
    assert service.metrics.render().decode().count("ringspan_prefills_total{") == 1
    (view,) = [view for view in service.contexts() if view.context_id == one.context_id]
    assert view.on_gang
    assert sum(shard.tokens for shard in view.shards) == len(LONG)
    again, _ = ask(service, prompt(3), context_id=one.context_id)
    assert again.said() == expected
    service.delete_context(one.context_id)
    with pytest.raises(UnknownName):
        service.context(one.context_id)


def test_cancel_ends_the_work_for_all(service: Service) -> None:
    first, one = make(service, LONG[::-1].copy())
    second, _ = make(service, LONG[::-1].copy())
    while not any(view.chunk_index for view in first.views):
        time.sleep(0.005)
    one.cancel()
    for heard in (first, second):
        with pytest.raises(Cancelled):
            heard.said()
    after, _ = ask(service, prompt(4))
    assert after.said() == greedy(tuple(prompt(4)))


def test_an_idempotency_key_stands_for_one_request(service: Service) -> None:
    first, one = ask(service, prompt(1), idempotency_key="k")
    first.said()
    again, two = ask(service, prompt(1), idempotency_key="k")
    assert two.request_id == one.request_id
    assert again.ended.wait(WAIT_S)
    assert isinstance(again.last, DoneEvent)
    with pytest.raises(BadInput, match="stands for another request"):
        ask(service, prompt(2), idempotency_key="k")


def test_one_key_at_the_same_instant_is_one_request(service: Service) -> None:
    together = threading.Barrier(8)

    def one(at: int) -> str:
        together.wait()
        return make(service, LONG[:200], idempotency_key="k")[1].request_id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(one, range(8)))) == 1
    assert len([view for view in service.views() if view.kind == "context"]) == 1


def test_a_short_answer_does_not_wait_for_a_long_prefill(service: Service, gang: LocalGang) -> None:
    long, ticket = make(service)
    while not any(view.chunk_index for view in long.views):
        time.sleep(0.005)
    short, _ = ask(service, prompt(7))
    assert short.said() == greedy(tuple(prompt(7)))
    assert long.last is None, "the prefill came first"
    assert long.ended.wait(WAIT_S)
    assert isinstance(long.last, DoneEvent)
    assert short.ended_s < long.ended_s
    disturbed = planes(gang, ticket.context_id)
    service.delete_context(ticket.context_id)
    Controller(gang).prefill(LONG, OPTIONS)
    for one, other in zip(disturbed, planes(gang, ticket.context_id), strict=True):
        np.testing.assert_array_equal(one, other)
    gang.call("drop", ticket.context_id, timeout_s=30.0, what="tidying")


def planes(gang: LocalGang, name: str) -> list[np.ndarray]:
    """K and V of every rank and layer, as they lie there."""
    found = []
    for streams in gang._host._streams:
        rank = streams.rank
        for layer in range(rank._runtime.facts.num_layers):
            found += [t.numpy().copy() for t in rank.contexts[name].shard.tensors(layer)]
    return found


def test_too_much_is_refused_with_numbers(gang: LocalGang) -> None:
    limits = Limits(max_waiting=3, max_running=1, retry_after_s=3.0)
    quota = TenantLimits(tokens_per_minute=60)
    for service in serving(gang, limits=limits, tenant_limits=lambda tenant: quota):
        busy, _ = ask(service, prompt(0), max_tokens=300)
        assert busy.first.wait(WAIT_S)
        waiting = [ask(service, prompt(at)) for at in (1, 2, 5)]
        with pytest.raises(Overloaded, match=r"3 requests wait already, at most 3 may") as full:
            ask(service, prompt(3))
        assert full.value.retry_after_s >= 3.0
        assert not full.value.tenant
        waiting[1][1].cancel()
        waiting[2][1].leave()
        assert waiting[1][0].ended.wait(WAIT_S)
        mine, _ = ask(service, prompt(3), tenant="a")
        with pytest.raises(Overloaded, match="at most 60 a minute") as spent:
            ask(service, prompt(4), tenant="a")
        assert spent.value.tenant == "a"
        assert waiting[0][0].said() == greedy(tuple(prompt(1)))
        assert mine.said() == greedy(tuple(prompt(3)))
        with pytest.raises(TooLarge, match="positions"):
            ask(service, prompt(0), max_tokens=10**7)
        with pytest.raises(BadInput, match="wanted at least 2"):
            ask(service, [5])
        with pytest.raises(UnknownName):
            service.view(waiting[0][1].request_id, tenant="b")


def test_gauges_tell_what_is_there_now(service: Service) -> None:
    def gauge(name: str) -> float:
        found = re.findall(rf"^ringspan_{name} (.*)$", service.metrics.render().decode(), re.M)
        return sum(map(float, found))

    _, ticket = make(service)
    asked = [ask(service, prompt(at), priority=at)[0] for at in range(2)]
    for heard in asked:
        heard.said()
    turn, _ = ask(service, prompt(3), context_id=ticket.context_id, session_id="s", max_tokens=60)
    assert turn.first.wait(WAIT_S)
    assert gauge("answers_running") == 1
    assert gauge("sessions") == 1
    turn.said()
    until = time.monotonic() + WAIT_S
    while gauge("answers_running"):
        assert time.monotonic() < until, "it runs for ever"
        time.sleep(0.01)
    assert gauge(r'contexts_held\{kind="named"\}') == 1
    assert gauge(r'contexts_held\{kind="plain"\}') == 2
    assert gauge(r"requests_waiting\{.*\}") == 0


def test_a_tenant_has_limits_of_its_own(gang: LocalGang) -> None:
    of = {
        "often": TenantLimits(requests_per_minute=2),
        "much": TenantLimits(tokens_in_flight=150),
        "many": TenantLimits(contexts=1),
    }
    for service in serving(gang, tenant_limits=of.__getitem__):
        for at in range(2):
            ask(service, prompt(at), tenant="often")[0].said()
        with pytest.raises(Overloaded, match="at most 2 may: try again in") as refused:
            ask(service, prompt(2), tenant="often")
        assert 50 < refused.value.retry_after_s <= 60
        busy, _ = ask(service, prompt(0), tenant="much", max_tokens=60)
        with pytest.raises(Overloaded, match="100 tokens of this tenant are under way") as refused:
            ask(service, prompt(1), tenant="much", max_tokens=60)
        assert refused.value.tenant == "much"
        busy.said()
        ask(service, prompt(1), tenant="much", max_tokens=60)[0].said()
        made, _ = make(service, LONG[:200], tenant="many")
        again, _ = make(service, LONG[:200], tenant="many")  # the same one
        assert made.ended.wait(WAIT_S)
        assert again.ended.wait(WAIT_S)
        with pytest.raises(Overloaded, match="has 1 contexts, at most 1 may be"):
            make(service, LONG[:300], tenant="many")
        make(service, LONG[:300])[1].cancel()


def test_questions_do_not_wait_for_room_for_a_context_that_is_there(gang: LocalGang) -> None:
    limits = Limits(max_running=1, max_tokens_waiting=len(LONG) + 100)
    for service in serving(gang, limits=limits):
        heard, ticket = make(service)
        assert heard.ended.wait(WAIT_S)
        name = service.view(ticket.request_id).context_id
        asked = [ask(service, [at + 1, at + 2], context_id=name)[0] for at in range(6)]
        assert all(len(one.said()) > 0 for one in asked)


def test_a_session_goes_on_and_others_end(service: Service, gang: LocalGang) -> None:
    _, ticket = make(service, LONG[:300])
    turns = [ask(service, prompt(at, 4), context_id=ticket.context_id, session_id="mine")[0].said()
             for at in (1, 2)]  # fmt: skip
    assert turns[0] == greedy((*LONG[:300].tolist(), *prompt(1, 4)))
    assert turns[1] == greedy((*LONG[:300].tolist(), *prompt(1, 4), *turns[0], *prompt(2, 4)))
    ask(service, prompt(3, 4), context_id=ticket.context_id)[0].said()
    ask(service, prompt(3, 4), context_id=ticket.context_id)[0].said()
    assert len(gang._host._streams[0].rank.answers._sessions) <= 2


def test_a_session_ends_though_no_other_request_comes(gang: LocalGang) -> None:
    for service in serving(gang, limits=Limits(kept_s=0.5)):
        _, ticket = make(service, LONG[:300])
        ask(service, prompt(1, 4), context_id=ticket.context_id, session_id="gone")[0].said()
        sessions = gang._host._streams[0].rank.answers._sessions
        assert sessions
        until = time.monotonic() + WAIT_S
        while sessions:
            assert time.monotonic() < until, "it was kept"
            time.sleep(0.05)


def test_a_lost_rank_ends_no_answer_that_can_begin_anew(gang: LocalGang) -> None:
    for service in serving(gang):
        Mortal.dies = [("generate_together", 0)]
        heard, _ = ask(service, prompt(1))
        assert heard.said() == greedy(tuple(prompt(1)))
        assert not Mortal.dies
        half, _ = ask(service, prompt(2), max_tokens=200)
        assert half.first.wait(WAIT_S)
        Mortal.dies = [("generate_together", 1)]
        with pytest.raises(RankLost, match="tokens were given out"):
            half.said()
        after, _ = ask(service, prompt(3))
        assert after.said() == greedy(tuple(prompt(3)))


def test_a_rank_lost_in_an_interlude_is_mended_by_the_prefill(gang: LocalGang) -> None:
    for service in serving(gang):
        long, ticket = make(service)
        while not any(view.chunk_index for view in long.views):
            time.sleep(0.005)
        Mortal.dies = [("generate_together", 0)]
        short, _ = ask(service, prompt(9))
        assert short.said() == greedy(tuple(prompt(9)))
        assert long.ended.wait(WAIT_S)
        assert isinstance(long.last, DoneEvent)
        asker, _ = ask(service, prompt(3), context_id=ticket.context_id)
        assert asker.said() == greedy((*LONG.tolist(), *prompt(3)))


def test_a_context_comes_back_from_the_store(gang: LocalGang, tmp_path: Any) -> None:
    Mortal.dies = []
    controller = Controller(gang, Store(tmp_path / "store"))
    service = Service(controller)
    made, ticket = make(service, LONG[:600])
    assert made.ended.wait(WAIT_S)
    expected = greedy((*LONG[:600].tolist(), *prompt(3)))
    assert ask(service, prompt(3), context_id=ticket.context_id)[0].said() == expected
    Mortal.dies = [("generate_together", 0)]
    assert ask(service, prompt(3), context_id=ticket.context_id)[0].said() == expected
    twice, again = make(service, LONG[:600])
    assert twice.ended.wait(WAIT_S)
    assert again.cached_tokens == 600
    assert service.verify_context(ticket.context_id)["ok"]
    service.delete_context(ticket.context_id)
    assert service.contexts() == []
    service.close()


def test_a_manifest_is_read_again_only_when_it_is_another(
    gang: LocalGang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(folder: Path, *spaces: Any) -> Manifest:
        read.append(folder.name)
        return read_manifest(folder, *spaces)

    monkeypatch.setattr("ringspan.cluster.service_contexts.read_manifest", counted)
    Mortal.dies = []
    service = Service(Controller(gang, Store(tmp_path / "store")))
    made, ticket = make(service, LONG[:600])
    assert made.ended.wait(WAIT_S)
    name = ticket.context_id
    for at in range(3):
        ask(service, prompt(at, 4), context_id=name)[0].said()
    assert read == [name]
    file = tmp_path / "store" / "contexts" / name / "manifest.json"
    whole = file.read_bytes()
    for data, stored in ((whole[:-9], False), (whole, True)):
        (tmp_path / "other").write_bytes(data)
        (tmp_path / "other").replace(file)
        assert service.context(name).stored is service.context(name).stored is stored
    assert read == [name] * 3
    service.delete_context(name)
    assert service.contexts() == []
    service.close()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_and_goes_no_answer_is_wrong_and_nobody_is_stuck(
    seed: int, gang: LocalGang
) -> None:
    """50 events each: arrivals, leaves, cancels, contexts, lost ranks."""
    rng = np.random.default_rng(seed)
    prompts = [prompt(at, 20 + 30 * at) for at in range(5)]
    expected = [greedy(tuple(one), 12) for one in prompts]
    for service in serving(gang, limits=Limits(max_running=5, max_plain_contexts=3)):
        asked: list[tuple[int, Heard, Ticket]] = []
        made: list[tuple[Heard, Ticket]] = []
        gone: set[int] = set()
        for _ in range(50):
            draw = rng.random()
            if draw < 0.6 or not asked:
                at = int(rng.integers(len(prompts)))
                most = int(rng.integers(1, 13))
                asked.append((at, *ask(service, prompts[at], max_tokens=most)))
            elif draw < 0.75:
                victim = int(rng.integers(len(asked)))
                gone.add(victim)
                if rng.random() < 0.5:
                    asked[victim][2].leave()
                else:
                    asked[victim][2].cancel()
            elif draw < 0.82:
                made.append(make(service, LONG[: int(rng.integers(300, 900))]))
                if rng.random() < 0.5:
                    made[-1][1].cancel()
            elif draw < 0.86:
                Mortal.dies = [("generate_together", int(rng.integers(4)))]
            time.sleep(float(rng.random()) * 0.02)
        assert service.drain(WAIT_S), [v for v in service.views() if not v.state.ended]
        for index, (at, heard, _) in enumerate(asked):
            told = [token.token_id for token in heard.tokens]
            assert told == expected[at][: len(told)]
            if isinstance(heard.last, FailedEvent):
                assert isinstance(heard.last.error, RankLost | Cancelled)
                assert index in gone or isinstance(heard.last.error, RankLost)
            else:
                assert index in gone or isinstance(heard.last, DoneEvent)
        for heard, _ in made:
            assert heard.ended.wait(WAIT_S)
