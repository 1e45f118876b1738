"""Prefix reuse: a document that begins with a known context equals one that is computed whole."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from ringspan.cluster import answers
from ringspan.cluster.controller import Controller
from ringspan.cluster.events import PrefillDone
from ringspan.cluster.known import Known
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions, plan_prefill
from ringspan.cluster.prefills import copy_pages
from ringspan.cluster.sampling import next_tokens
from ringspan.cluster.session import form_of, longest_prefix
from ringspan.errors import BadInput, CorruptPage
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.directory import Directory
from ringspan.kvstore.fidelity import Fidelity
from ringspan.kvstore.folder import Store
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, page_keys
from ringspan.kvstore.shard import ContextShard
from ringspan.types import Span

TINY = ModelSpec(name="random:tiny", seed=5)
TOKENS = np.random.default_rng(3).integers(0, 1024, size=1600, dtype=np.int32)
OPTIONS = PrefillOptions(chunk_tokens=256)
PAGE = 128
RELATIVE = 1e-5
"""Largest difference of fp32 logits over the largest |logit|."""


@functools.cache
def gang_of(world_size: int, model: ModelSpec = TINY) -> LocalGang:
    """Loopback ranks that all tests share; what they hold a `Controller` of its own knows not."""
    spec = GangSpec(world_size=world_size, model=model, device="cpu", threads=1, timeout_s=30.0)
    return LocalGang(spec).start()


@pytest.fixture(scope="module", autouse=True)
def _end_gangs():
    yield
    gang_of.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits that every token was chosen from, on rank 0."""
    rows: list[torch.Tensor] = []

    def listening(samplers: Any, logits: torch.Tensor, greedy: Any, collectives: Any) -> list[int]:
        if collectives.rank == 0:
            rows.extend(logits.clone())
        return next_tokens(samplers, logits, greedy, collectives)

    monkeypatch.setattr(answers, "next_tokens", listening)
    return rows


def said_of(controller: Controller, name: str, heard: list[torch.Tensor]) -> torch.Tensor:
    """The logits [4, vocabulary] of a token behind the context and of three greedy ones."""
    heard.clear()
    session = controller.begin_session(name)
    list(controller.ask(session, name, (17,), max_tokens=4))
    controller.end_session(session)
    return torch.stack(heard)


def assert_equals_whole(
    controller: Controller,
    done: PrefillDone,
    heard: list[torch.Tensor],
    model: ModelSpec = TINY,
    options: PrefillOptions = OPTIONS,
) -> None:
    """The context answers as one that one rank computed whole."""
    ours = said_of(controller, done.context_id, heard)
    whole = Controller(gang_of(1, model))
    computed = whole.prefill(TOKENS[: done.plan.num_tokens], options)
    assert (computed.context_id, computed.plan.reused_tokens) == (done.context_id, 0)
    theirs = said_of(whole, done.context_id, heard)
    whole.drop(done.context_id)
    assert (ours - theirs).abs().max() <= RELATIVE * theirs.abs().max()


def assert_stored_whole(store: Store, done: PrefillDone) -> None:
    manifest = store.manifest(done.context_id)
    fingerprint = manifest.origin.fingerprint
    tokens = TOKENS[: done.plan.num_tokens]
    assert manifest.keys == tuple(page_keys(fingerprint, PUBLIC_NAMESPACE, tokens, PAGE))
    assert store.verify(done.context_id).ok
    np.testing.assert_array_equal(store.tokens(manifest), tokens)


def reused(done: PrefillDone) -> tuple[str, int]:
    return done.plan.prefix_id, done.plan.reused_tokens


def test_extended_twice_from_the_store_on_other_numbers_of_ranks(
    store: Store, heard: list[torch.Tensor]
) -> None:
    first = Controller(gang_of(2), store).prefill(TOKENS[:701], OPTIONS)
    assert reused(first) == ("", 0)
    controller = Controller(gang_of(3), store)
    second = controller.prefill(TOKENS[:1100], OPTIONS)
    assert reused(second) == (first.context_id, 640)  # the short sixth page is computed anew
    assert second.plan.chunks == (Span(640, 896), Span(896, 1100))
    assert second.flops < 0.7 * controller.prefill(TOKENS[:1100], OPTIONS, again=True).flops
    assert_equals_whole(controller, second, heard)
    controller = Controller(gang_of(1), store)
    third = controller.prefill(TOKENS[:1500], OPTIONS)
    assert reused(third) == (second.context_id, 1024)
    assert_equals_whole(controller, third, heard)
    for done in (first, second, third):
        assert_stored_whole(store, done)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_extended_twice_from_what_the_gang_holds(layout: str, heard: list[torch.Tensor]) -> None:
    options = msgspec.structs.replace(OPTIONS, layout=layout)
    controller = Controller(gang_of(3))
    first = controller.prefill(TOKENS[:701], options)
    before = said_of(controller, first.context_id, heard)
    second = controller.prefill(TOKENS[:1100], options)
    third = controller.prefill(TOKENS[:1411], options)
    assert reused(second) == (first.context_id, 640)
    assert reused(third) == (second.context_id, 1024)
    assert_equals_whole(controller, second, heard)
    assert_equals_whole(controller, third, heard)
    assert torch.equal(said_of(controller, first.context_id, heard), before)
    for done in (first, second, third):
        controller.drop(done.context_id)


def test_pages_stay_on_the_ranks_that_have_them(store: Store) -> None:
    controller, options = Controller(gang_of(3), store), PrefillOptions(chunk_tokens=768)
    first = controller.prefill(TOKENS[:701], options)
    second = controller.prefill(TOKENS[:1100], options)
    assert reused(second) == (first.context_id, 640)
    where = [
        [page.segment for page in store.manifest(done.context_id).pages] for done in (first, second)
    ]
    assert where[1][:5] == where[0][:5]
    assert set(where[0]) == set(where[1]) == {"rank-0.seg", "rank-1.seg", "rank-2.seg"}


def test_windows_see_the_prefix(heard: list[torch.Tensor]) -> None:
    model = ModelSpec(name="random:tiny-gemma2")
    controller = Controller(gang_of(2, model))
    first = controller.prefill(TOKENS[:300], OPTIONS)
    second = controller.prefill(TOKENS[:700], OPTIONS)
    assert reused(second) == (first.context_id, 256)
    assert_equals_whole(controller, second, heard, model)


def test_fewer_pages_than_ranks(store: Store, heard: list[torch.Tensor]) -> None:
    first = Controller(gang_of(1), store).prefill(TOKENS[:130], OPTIONS)
    controller = Controller(gang_of(4), store)
    second = controller.prefill(TOKENS[:390], OPTIONS)
    assert reused(second) == (first.context_id, 128)
    assert_equals_whole(controller, second, heard)


def test_the_beginning_of_a_known_context_is_taken_but_for_one_page(
    heard: list[torch.Tensor],
) -> None:
    controller = Controller(gang_of(2))
    known = controller.prefill(TOKENS[:701], OPTIONS)
    for num_tokens, wanted in ((400, 384), (384, 256)):
        done = controller.prefill(TOKENS[:num_tokens], OPTIONS)
        assert reused(done) == (known.context_id, wanted)
        assert_equals_whole(controller, done, heard)


def test_what_differs_in_codec_or_model_is_not_taken(store: Store) -> None:
    controller = Controller(gang_of(2), store)
    controller.prefill(TOKENS[:300], OPTIONS)
    encoded = msgspec.structs.replace(OPTIONS, codec="int8")
    assert reused(controller.prefill(TOKENS[:400], encoded)) == ("", 0)
    other = Controller(gang_of(2, ModelSpec(name="random:tiny", seed=6)), store)
    assert reused(other.prefill(TOKENS[:400], OPTIONS)) == ("", 0)
    changed = TOKENS[:400].copy()
    changed[5] += 1
    assert reused(controller.prefill(changed, OPTIONS)) == ("", 0)


def test_nothing_is_taken_when_that_is_asked(store: Store) -> None:
    controller = Controller(gang_of(2), store)
    controller.prefill(TOKENS[:300], OPTIONS)
    assert reused(controller.prefill(TOKENS[:400], OPTIONS, reuse=False)) == ("", 0)
    assert reused(controller.prefill(TOKENS[:400], OPTIONS, again=True)) == ("", 0)


def test_a_scheme_that_is_asked_for_is_kept() -> None:
    controller = Controller(gang_of(2))
    controller.prefill(TOKENS[:300], OPTIONS)
    options = msgspec.structs.replace(OPTIONS, scheme="all-gather")
    done = controller.prefill(TOKENS[:500], options)
    assert (done.plan.scheme, done.plan.reused_tokens) == ("all-gather", 256)


@pytest.mark.parametrize(
    ("harm", "said"),
    [("a flipped bit", "payload's xxh3-128 differs"), ("a lost file", "cannot open segment")],
)
def test_pages_that_cannot_be_used_are_computed(
    harm: str, said: str, store: Store, heard: list[torch.Tensor]
) -> None:
    known = Controller(gang_of(2), store).prefill(TOKENS[:701], OPTIONS)
    manifest = store.manifest(known.context_id)
    page = manifest.pages[2]
    path = store.folder(manifest) / page.segment
    if harm == "a flipped bit":
        data = bytearray(path.read_bytes())
        data[page.offset + page.frame_bytes - page.payload_bytes // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    controller = Controller(gang_of(3), store)
    done = controller.prefill(TOKENS[:900], OPTIONS)
    assert reused(done) == ("", 0)
    assert said in done.plan.not_reused
    assert_equals_whole(controller, done, heard)
    assert_stored_whole(store, done)


def test_an_encoded_prefix_gives_what_chunks_cut_there_give(
    store: Store, heard: list[torch.Tensor]
) -> None:
    options = msgspec.structs.replace(OPTIONS, codec="int8")
    controller = Controller(gang_of(1), store)
    first = controller.prefill(TOKENS[:256], options)
    second = controller.prefill(TOKENS[:700], options)
    assert reused(second) == (first.context_id, 256)
    assert_equals_whole(controller, second, heard, options=options)
    assert_stored_whole(store, second)
    one, many = (store.manifest(done.context_id).origin.provenance for done in (first, second))
    assert one == ("exact",)  # one chunk, which used its own keys as computed
    assert many == ("attended over int8 pages",)


def test_an_approximate_prefix_makes_what_follows_approximate(store: Store) -> None:
    """Whatever it was, and by either road: here int8 pages that two chunks made."""
    options = msgspec.structs.replace(OPTIONS, codec="int8")
    controller = Controller(gang_of(2), store)
    first = controller.prefill(TOKENS[:512], options)
    wanted = store.manifest(first.context_id).origin
    assert wanted.provenance == ("attended over int8 pages",)
    held = controller.prefill(TOKENS[:600], options)
    controller = Controller(gang_of(2), store)
    stored = controller.prefill(TOKENS[:700], options)
    assert (held.plan.reused_tokens, stored.plan.reused_tokens) == (512, 512)
    assert store.manifest(held.context_id).origin == wanted
    assert store.manifest(stored.context_id).origin == wanted


def test_the_longest_prefix_wins_and_a_held_one_at_a_draw() -> None:
    ready = gang_of(1).ready
    facts = ready[0].facts
    plan = plan_prefill(facts, ready, 1000, 1, OPTIONS, context_id="new")
    keys = [f"{page:064x}" for page in range(8)]

    def longest(*held: tuple[str, int, str]) -> tuple[str, int] | None:
        known = Known(Directory(), PUBLIC_NAMESPACE, None)
        for name, pages, codec_name in held:
            theirs = (*keys[:pages], f"{name:f>64}")
            form = form_of(msgspec.structs.replace(plan, codec=codec_name), facts)
            write = known.begin(name, theirs, 128 * len(theirs))
            kept = Fidelity.EXACT if codec_name == "raw" else Fidelity.EIGHT_BIT
            known.arrived(write, name, theirs, form, kept, 0)
        found = longest_prefix(plan, keys, form_of(plan, facts), known)
        return found and (found.plan.prefix_id, found.plan.reused_tokens)

    assert longest() is None
    assert longest(("a", 0, "raw")) is None
    assert longest(("a", 2, "raw"), ("b", 5, "raw"), ("c", 5, "raw")) == ("b", 640)
    assert longest(("a", 2, "raw"), ("b", 5, "int8")) == ("a", 256)
    assert longest(("new", 6, "raw"), ("a", 1, "raw")) == ("a", 128)
    assert longest(("a", 8, "raw")) == ("a", 896)  # 1000 tokens: the eighth page is short


def shard(codec_name: str, tokens: int) -> ContextShard:
    return ContextShard(codec(codec_name), 2, 2, 16, torch.float32, "cpu", tokens, PAGE)


def filled(codec_name: str) -> ContextShard:
    full, spans = shard(codec_name, 4 * PAGE), (Span(128, 384), Span(640, 896))
    full.reserve(spans)
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        full.write(layer, *(torch.randn(4 * PAGE, 2, 16, generator=generator) for _ in range(2)))
    return full


@pytest.mark.parametrize("codec_name", ["raw", "int8"])
def test_pages_are_copied_bit_for_bit(codec_name: str) -> None:
    source, into = filled(codec_name), shard(codec_name, 4 * PAGE)
    copy_pages(source, into, (Span(128, 384), Span(640, 768)))
    assert into.spans == (Span(128, 384), Span(640, 768))
    for layer in range(2):
        for ours, theirs in zip(into.tensors(layer), source.tensors(layer, 384), strict=True):
            assert torch.equal(ours, theirs)
    nothing = shard(codec_name, 4 * PAGE)
    copy_pages(source, nothing, ())
    assert nothing.num_tokens == 0


def test_a_copy_that_differs_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    source, into = filled("raw"), shard("raw", 4 * PAGE)
    with pytest.raises(BadInput, match="do not fit the shard: codec 'raw', wanted 'int8'"):
        copy_pages(source, shard("int8", 4 * PAGE), (Span(128, 384),))
    fill = ContextShard.fill

    def harmed(self: ContextShard, row: int, tokens: int, payloads: torch.Tensor) -> None:
        payloads[0, 5] ^= 1
        fill(self, row, tokens, payloads)

    monkeypatch.setattr(ContextShard, "fill", harmed)
    with pytest.raises(CorruptPage, match="differs from what was copied"):
        copy_pages(source, into, (Span(128, 384),))
    assert into.num_tokens == 0
