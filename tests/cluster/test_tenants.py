"""Controllers over one gang, one store and one directory: leases, references, namespaces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ringspan.cluster import reading as reading_module
from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.errors import BadInput, StoreError, UnknownName
from ringspan.kvstore import leases as leases_module
from ringspan.kvstore.directory import Directory, open_directory
from ringspan.kvstore.folder import Store
from ringspan.kvstore.keys import namespace_digest
from ringspan.kvstore.leases import InUse, StaleHandle
from ringspan.kvstore.manifest import MANIFEST
from ringspan.kvstore.tenancy import tenant_namespace

MODEL = ModelSpec(name="random:tiny", seed=3)
OPTIONS = PrefillOptions(chunk_tokens=256)
TOKENS = np.random.default_rng(11).integers(0, 256, size=700, dtype=np.int32)
A, B = (tenant_namespace(tenant, b"s" * 32) for tenant in ("a", "b"))


@pytest.fixture(scope="module")
def gang() -> Iterator[LocalGang]:
    spec = GangSpec(world_size=2, model=MODEL, device="cpu", threads=1, timeout_s=30.0)
    with LocalGang(spec) as gang:
        yield gang


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def answer(controller: Controller, name: str) -> list[int]:
    session = controller.begin_session(name)
    return [t.token_id for t in controller.ask(session, name, (5, 17, 200), max_tokens=4)]


def test_the_same_text_of_two_tenants_shares_no_page(gang: LocalGang, store: Store) -> None:
    directory = Directory()
    public = Controller(gang, store, directory=directory)
    first, second = public.beside(A), public.beside(B)
    done = [c.prefill(TOKENS, OPTIONS) for c in (public, first, second)]
    assert len({d.context_id for d in done}) == 3
    assert [(d.reused, d.plan.reused_tokens, d.plan.not_reused) for d in done] == [
        (False, 0, "")
    ] * 3
    manifests = [store.manifest(d.context_id) for d in done]
    keys = [key for manifest in manifests for key in manifest.keys]
    assert len(set(keys)) == len(keys) == 3 * 6
    assert [m.origin.namespace for m in manifests[1:]] == [namespace_digest(n) for n in (A, B)]
    assert all(store.verify(d.context_id).ok for d in done)
    assert answer(public, done[0].context_id) == answer(first, done[1].context_id)
    longer = np.concatenate([TOKENS, TOKENS[:100]])
    again = first.prefill(longer, OPTIONS)
    assert (again.plan.prefix_id, again.plan.reused_tokens) == (done[1].context_id, 640)
    for controller, mine in ((public, 1), (first, 2), (second, 1)):
        assert len(controller.contexts) == mine
        assert len(directory.contexts(controller._known.space)) == mine


def test_another_tenants_context_does_not_exist(gang: LocalGang, store: Store) -> None:
    directory = Directory()
    first = Controller(gang, store, directory=directory, namespace=A)
    second = first.beside(B)
    name = first.prefill(TOKENS[:300], OPTIONS).context_id
    unknown = "f" * 16
    for given in (name, name[:6], name[0]):
        for act in (second.open, second.begin_session):
            with pytest.raises(UnknownName) as told:
                act(given)
            with pytest.raises(UnknownName) as never:
                act(unknown)
            assert str(told.value) == str(never.value).replace(unknown, given)
    session = first.begin_session(name)
    with pytest.raises(UnknownName, match="known: none"):
        second.ask(session, name, (1,))
    second.drop(name)
    assert answer(first, name)
    fresh = Controller(gang, store, namespace=A)
    assert fresh.open(name[:6]).context_id == name


def test_a_context_that_is_read_stays_until_the_reader_is_done(gang: LocalGang) -> None:
    directory = Directory()
    controller = Controller(gang, directory=directory)
    name = controller.prefill(TOKENS[:300], OPTIONS).context_id
    session = controller.begin_session(name)
    tokens = controller.ask(session, name, (5, 17), max_tokens=50)
    next(tokens)
    with pytest.raises(InUse, match=f"at {name} cannot go yet: 1 leases stand"):
        controller.drop(name)
    with pytest.raises(InUse):
        controller.prefill(TOKENS[:300], OPTIONS, again=True)
    assert next(tokens).index == 1  # nothing was taken from it, its session goes on
    tokens.close()  # type: ignore[attr-defined]
    controller.end_session(session)
    controller.drop(name)
    assert directory.contexts(controller._known.space) == ()


def test_a_reader_whose_lease_is_gone_stops(
    gang: LocalGang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_module, "RENEW_S", 0.01)
    clock = Clock()
    controller = Controller(gang, directory=Directory(clock=clock))
    name = controller.prefill(TOKENS[:300], OPTIONS).context_id
    tokens = controller.ask(controller.begin_session(name), name, (5, 17), max_tokens=500)
    next(tokens)
    clock.now_s += leases_module.LONGEST_S + 1.0  # this process stood still for so long
    with pytest.raises(StaleHandle, match="look the pages up again"):
        for _ in tokens:
            pass
    assert answer(controller, name)
    controller.drop(name)


def test_sessions_are_references_that_end_with_them(gang: LocalGang) -> None:
    directory = Directory()
    controller = Controller(gang, directory=directory)
    name = controller.prefill(TOKENS[:300], OPTIONS).context_id
    space = controller._known.space
    sessions = [controller.begin_session(name) for _ in range(3)]

    def references() -> int:
        (found,) = directory.contexts(space)
        return found.references

    assert references() == 3
    controller.end_session(sessions[0])
    controller.end_session(sessions[0])
    assert references() == 2
    controller.drop(name)
    assert directory.contexts(space) == ()


def test_a_controller_that_ends_leaves_nothing_in_a_shared_directory(
    gang: LocalGang, store: Store
) -> None:
    directory = Directory()
    controller = Controller(gang, store, directory=directory)
    empty = len(directory.records())
    name = controller.prefill(TOKENS[:300], OPTIONS).context_id
    controller.begin_session(name)
    longer = controller.prefill(TOKENS[:600], OPTIONS)
    assert longer.plan.prefix_id == name
    controller._known.close()
    assert len(directory.records()) == empty - 2  # its two holders have left


def test_what_others_do_to_the_store_is_seen(gang: LocalGang, store: Store) -> None:
    ours, theirs = Controller(gang, store), Controller(gang, store)
    name = theirs.prefill(TOKENS[:300], OPTIONS).context_id
    theirs.drop(name)
    assert ours.prefill(TOKENS[:300], OPTIONS).reused
    onto = ours.plan(TOKENS[:400])
    assert ours.prefill(TOKENS[:400], OPTIONS).plan.prefix_id == name
    ours.drop(onto.context_id)
    store.remove(name)
    store.remove(onto.context_id)
    with pytest.raises(UnknownName, match="known: none"):
        ours.open(name)
    assert ours.prefill(TOKENS[:400], OPTIONS, reuse=True).plan.prefix_id == ""
    ours.drop(onto.context_id)
    path = store.root / "contexts" / onto.context_id / MANIFEST
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match="manifest cannot be read"):
        ours.open(onto.context_id)


def test_a_fidelity_that_is_asked_for_is_kept(gang: LocalGang, store: Store) -> None:
    controller = Controller(gang, store)
    encoded = msgspec.structs.replace(OPTIONS, codec="int8")
    name = controller.prefill(TOKENS[:300], encoded).context_id
    assert controller.open(name, "8-bit").context_id == name
    with pytest.raises(BadInput, match=f"context {name} is 8-bit, asked for is exact or better"):
        controller.open(name, "exact")
    controller.drop(name)
    with pytest.raises(BadInput, match=r"8-bit .*asked for is exact or better"):
        Controller(gang, store).open(name, "exact")


def test_a_reader_goes_on_when_the_directory_is_started_anew(
    gang: LocalGang, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reading_module, "RENEW_S", 0.01)
    path = str(tmp_path / "journal")
    directory = Restarting(path)
    controller = Controller(gang, directory=directory)  # type: ignore[arg-type]
    name = controller.prefill(TOKENS[:300], OPTIONS).context_id
    reading = controller.reading([name])
    before = reading._leases
    directory.start()
    wait_until(lambda: reading._leases != before)
    reading.check()
    with pytest.raises(InUse):
        controller.drop(name)
    monkeypatch.setattr(reading, "_renewed_s", reading._renewed_s - 1e3)
    reading._pulse.stop()
    with pytest.raises(StaleHandle, match="was not renewed for"):
        reading.check()
    reading.end()


class Restarting:
    """A directory in front of one that can be started anew, as an actor is."""

    shared = False

    def __init__(self, path: str) -> None:
        self._path, self._directory = path, open_directory(path)

    def start(self) -> None:
        self._directory.close()
        self._directory = open_directory(self._path)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            return getattr(self._directory, name)(*args, **named)

        return call


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
