"""Long questions: dealt to the ranks as a partial prefill, they are what one process gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ringspan.attention.engine import PrefillStep, Proof
from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.models.load import load_model
from ringspan.attention.models.tokenizer import load_tokenizer, tokenize_documents
from ringspan.attention.tail import (
    FLOPS_PER_BYTE,
    GATHER_ROWS,
    owned,
    tail_deal,
    turn_chunks,
    turn_scheme,
    why_dealt,
)
from ringspan.cluster import answers, scheme_choices
from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import (
    AnswerRequest,
    GangSpec,
    LongTurn,
    ModelFacts,
    ModelSpec,
    PrefillPlan,
)
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.rank import Rank
from ringspan.cluster.sampling import next_tokens
from ringspan.errors import TooLarge
from ringspan.kvstore.folder import Store
from ringspan.types import Span, page_tokens_for, total_tokens

LLAMA = "random:tiny-llama"
RELATIVE = 1e-5
"""Largest difference of fp32 logits over the largest |logit|."""
CONTEXT = 300
"""Tokens of a context: its last page is short, so that the first turn begins within a page."""
LENGTHS = (1, 255, 256, 700, 1500)
"""Of questions."""


@functools.cache
def single(model: str) -> Any:
    """The unmodified model, with transformers' own attention."""
    return load_model(ModelSpec(name=model, dtype="float32"), torch.device("cpu"))


@functools.cache
@torch.inference_mode()
def wanted(model: str, ids: tuple[int, ...], more: int) -> list[torch.Tensor]:
    """The logits [vocabulary] of `ids`' last token and of the greedy ones behind it."""
    out = single(model).model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    rows = [out.logits[0, -1]]
    for position in range(len(ids), len(ids) + more - 1):
        out = single(model).model(
            rows[-1].argmax().view(1, 1),
            past_key_values=out.past_key_values,
            position_ids=torch.tensor([[position]]),
            use_cache=True,
        )
        rows.append(out.logits[0, -1])
    return rows


@functools.cache
def text(model: str, n: int) -> tuple[int, ...]:
    if model == "smollm2":
        tokenizer = load_tokenizer(ModelSpec(name=model))
        assert tokenizer is not None
        ids = tokenize_documents(tokenizer, [Path(__file__).read_text()])
        assert len(ids) >= n
        return tuple(ids[:n].tolist())
    return tuple(np.random.default_rng(7).integers(0, 1024, n).tolist())


class Ranks:
    """Loopback ranks of one model that hold `text`'s first tokens as context `c`."""

    def __init__(self, model: str, world_size: int, layout: str = "zigzag") -> None:
        self.model, self.world_size = model, world_size
        spec = GangSpec(
            world_size=world_size,
            model=ModelSpec(name=model, dtype="float32"),
            transport="loopback",
            device="cpu",
            threads=1,
        )
        self.world = LoopbackWorld(world_size, timeout_s=60.0, poison=True)
        self.ranks = [Rank(rank, spec) for rank in range(world_size)]
        self.each(lambda rank: rank.start(self.world))
        self.prefill(layout)

    def each(self, do: Any) -> list[Any]:
        return self.world.run([functools.partial(do, rank) for rank in self.ranks])

    def prefill(self, layout: str) -> None:
        facts = single(self.model).facts
        page_tokens = page_tokens_for(facts.head_dim)
        plan = PrefillPlan(
            context_id="c",
            num_tokens=CONTEXT,
            page_tokens=page_tokens,
            chunk_tokens=2 * page_tokens,
            layout=layout,
            scheme="ring",
            codec="raw",
        )
        ids = np.array(text(self.model, CONTEXT), dtype=np.int32)
        self.each(lambda rank: rank.begin_prefill(plan, ids))
        for index in range(len(plan.chunks)):
            self.each(lambda rank, index=index: rank.prefill_chunk("c", index))

    def ask(
        self, session: str, ids: Sequence[int], max_tokens: int = 1, **options: Any
    ) -> tuple[list[int], LongTurn | None]:
        request = AnswerRequest(
            session_id=session,
            context_id="c",
            token_ids=tuple(ids),
            max_tokens=max_tokens,
            **options,
        )
        answered = self.each(lambda rank: list(rank.generate(request)))
        tokens = [[chunk.token_id for chunk in chunks] for chunks in answered]
        assert all(one == tokens[0] for one in tokens)
        assert all(chunk.long_turn is None for chunks in answered for chunk in chunks[1:])
        return tokens[0], answered[0][0].long_turn

    def tails(self, session: str) -> list[tuple[Span, ...]]:
        return [rank.answers._sessions[session].tail.spans for rank in self.ranks]


@functools.cache
def ranks_of(model: str, world_size: int) -> Ranks:
    return Ranks(model, world_size)


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


def assert_close(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """As many rows, each within float error; so greedy tokens are equal or a tie."""
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() <= RELATIVE * theirs.abs().max()


def keys_seen(model: str, start: int, stop: int) -> int:
    """By positions start..stop, over all heads and layers, each layer with its window."""
    facts = single(model).facts
    return sum(
        facts.num_q_heads * sum(min(p + 1, window or p + 1) for p in range(start, stop))
        for window in facts.windows
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_question_of_any_length_equals_one_process(
    world_size: int, heard: list[torch.Tensor]
) -> None:
    ranks = ranks_of(LLAMA, world_size)
    for length in LENGTHS:
        ids = text(LLAMA, CONTEXT + length)
        heard.clear()
        _, turn = ranks.ask(f"of {length}", ids[CONTEXT:], max_tokens=3)
        assert_close(heard, wanted(LLAMA, ids, 3))
        assert (turn is not None) == (world_size > 1 and length >= 256)
        if turn is not None:
            assert (turn.num_tokens, turn.num_chunks) == (length, 1)
            assert turn.seen_keys == keys_seen(LLAMA, CONTEXT, CONTEXT + length)
            assert turn.audited_rows > 0
            assert turn.audit_error <= RELATIVE
        assert ranks.tails(f"of {length}") == [
            owned(Span(CONTEXT, CONTEXT + length + 2), rank, world_size, 128)
            for rank in range(world_size)
        ]
        ranks.each(lambda rank, length=length: rank.end_session(f"of {length}"))


def test_a_rank_without_a_page_of_the_question_serves_the_others(
    heard: list[torch.Tensor],
) -> None:
    ranks = ranks_of(LLAMA, 4)
    ids = text(LLAMA, CONTEXT + 256)
    for scheme in ("ring", "pass-q", "gather-q"):
        heard.clear()
        ranks.ask(scheme, ids[CONTEXT:], scheme=scheme)
        assert_close(heard, wanted(LLAMA, ids, 1))
        assert ranks.tails(scheme)[1] == ()  # pages 2, 3 and 4 are of ranks 2, 3 and 0
        assert all(ranks.tails(scheme)[rank] for rank in (0, 2, 3))


@pytest.mark.parametrize(
    "scheme", ["ring", "ring-direct", "all-gather", "pass-q", "gather-q", "ulysses"]
)
def test_every_scheme_and_several_steps_give_the_same(
    scheme: str, heard: list[torch.Tensor]
) -> None:
    ranks = ranks_of(LLAMA, 2)
    ids = text(LLAMA, CONTEXT + 700)
    _, turn = ranks.ask(f"by {scheme}", ids[CONTEXT:], scheme=scheme, chunk_tokens=256)
    assert_close(heard, wanted(LLAMA, ids, 1))
    assert turn is not None
    assert (turn.scheme, turn.num_chunks) == (scheme, 3)  # up to 512, 768 and 1000
    assert turn.seen_keys == keys_seen(LLAMA, CONTEXT, CONTEXT + 700)


def test_one_rank_takes_a_question_in_steps_when_memory_asks(heard: list[torch.Tensor]) -> None:
    ids = text(LLAMA, CONTEXT + 700)
    _, turn = ranks_of(LLAMA, 1).ask("steps", ids[CONTEXT:], chunk_tokens=256)
    assert_close(heard, wanted(LLAMA, ids, 1))
    assert turn is not None
    assert turn.num_chunks == 3
    assert "more than one step of 256" in turn.reason


@pytest.mark.parametrize("model", ["random:tiny-gemma2", "random:tiny-mistral"])
def test_windows_hold_across_context_tail_and_question(
    model: str, heard: list[torch.Tensor]
) -> None:
    ranks = ranks_of(model, 3)
    assert any(single(model).facts.windows)
    ids = text(model, CONTEXT + 700)
    _, turn = ranks.ask("w", ids[CONTEXT:], max_tokens=3, chunk_tokens=384)
    assert_close(heard, wanted(model, ids, 3))
    assert turn is not None
    assert turn.num_chunks == 2
    assert turn.seen_keys == keys_seen(model, CONTEXT, CONTEXT + 700)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_however_the_context_lies(layout: str, heard: list[torch.Tensor]) -> None:
    ids = text(LLAMA, CONTEXT + 260)
    Ranks(LLAMA, 3, layout).ask("s", ids[CONTEXT:])
    assert_close(heard, wanted(LLAMA, ids, 1))


def test_turns_long_and_short_equal_one_long_prompt(heard: list[torch.Tensor]) -> None:
    ranks, ids = ranks_of(LLAMA, 3), text(LLAMA, CONTEXT + 1400)
    said, at = ids[:CONTEXT], CONTEXT
    for length, more, dealt in ((300, 5, True), (10, 3, False), (700, 4, True), (390, 2, True)):
        question = ids[at : at + length]
        heard.clear()
        tokens, turn = ranks.ask("talk", question, max_tokens=more)
        said, at = (*said, *question), at + length
        assert_close(heard, wanted(LLAMA, said, more))
        assert (turn is not None) == dealt
        if dealt and turn is not None and length != 300:
            assert turn.num_tokens == length + 1  # the last token of the answer before
        said = (*said, *tokens)


def test_smollm2_equals_one_process(heard: list[torch.Tensor]) -> None:
    ids = text("smollm2", CONTEXT + 270)
    _, turn = ranks_of("smollm2", 2).ask("s", ids[CONTEXT:], max_tokens=3)
    assert_close(heard, wanted("smollm2", ids, 3))
    assert turn is not None
    ranks_of.cache_clear()


def test_an_encoded_context_gives_what_one_rank_gives(
    tmp_path: Path, heard: list[torch.Tensor]
) -> None:
    """The same int8 pages, opened by one rank and by three; a question long enough to be dealt."""
    store = Store(tmp_path / "store")
    context = np.array(text("random:tiny", 1000), dtype=np.int32)
    question = text("random:tiny", 1400)[1000:]
    spoken: list[list[torch.Tensor]] = []
    for world_size in (1, 3):
        spec = GangSpec(
            world_size=world_size, model=ModelSpec(name="random:tiny"), device="cpu", threads=1
        )
        with LocalGang(spec) as gang:
            front = Controller(gang, store)
            options = PrefillOptions(codec="int8", chunk_tokens=512)
            name = front.prefill(context, options).context_id  # computed once, by one rank
            front.open(name)
            heard.clear()
            session = front.begin_session(name)
            first, *_ = front.ask(session, name, question, max_tokens=2)
            assert (first.long_turn is not None) == (world_size > 1)
            spoken.append(list(heard))
    assert_close(spoken[1], spoken[0])


def test_a_question_that_fails_halfway_leaves_the_session_as_it_was(
    heard: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, ids = ranks_of(LLAMA, 2), text(LLAMA, CONTEXT + 900)
    first, _ = ranks.ask("f", ids[CONTEXT : CONTEXT + 200], max_tokens=2)
    prove, calls = PrefillStep.prove, []

    def short_of_memory(step: PrefillStep, device: torch.device) -> Proof:
        calls.append(step)
        if len(calls) > 2:  # the second step
            raise torch.OutOfMemoryError("out of memory\nand many lines more")
        return prove(step, device)

    monkeypatch.setattr(PrefillStep, "prove", short_of_memory)
    long = ids[CONTEXT + 200 :]
    with pytest.raises(
        TooLarge, match=r"a step of 256 tokens of a question does not fit .*memory\)"
    ):
        ranks.ask("f", long, chunk_tokens=256)
    monkeypatch.setattr(PrefillStep, "prove", prove)
    heard.clear()
    ranks.ask("f", long, chunk_tokens=256)
    said = (*ids[: CONTEXT + 200], *first, *long)
    assert_close(heard, wanted(LLAMA, said, 1))


@pytest.mark.parametrize(("start", "tokens"), [(300, 1), (300, 256), (384, 1024), (511, 2000)])
def test_steps_tile_the_turn_and_end_where_pages_do(start: int, tokens: int) -> None:
    turn = Span(start, start + tokens)
    chunks = list(turn_chunks(turn, 512, 128))
    assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
    assert (chunks[0].start, chunks[-1].stop) == (turn.start, turn.stop)
    assert all(chunk.stop % 128 == 0 for chunk in chunks[:-1])
    assert all(0 < chunk.tokens <= 512 for chunk in chunks)


def test_a_step_smaller_than_a_page_is_a_page() -> None:
    assert list(turn_chunks(Span(100, 300), 1, 128)) == [
        Span(100, 128),
        Span(128, 256),
        Span(256, 300),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_turn_is_dealt_evenly_to_within_two_pages(world_size: int) -> None:
    deal = tail_deal(Span(300, 5000), world_size, 128)
    shares = [total_tokens(spans) for spans in deal]
    assert sum(shares) == 4700
    assert max(shares) - min(shares) < 2 * 128


def test_a_turn_is_dealt_for_a_reason() -> None:
    assert why_dealt(255, 8, 4096) is None
    assert why_dealt(256, 8, 4096) == "256 new tokens are dealt to 8 ranks"
    assert why_dealt(4096, 1, 4096) is None
    assert "more than one step of 4096" in str(why_dealt(4097, 1, 4096))


def test_keys_go_to_queries_only_where_that_is_hidden() -> None:
    hidden = round(8 * 8 / 32 * FLOPS_PER_BYTE)  # on 8 ranks, GQA 4:1
    assert turn_scheme(hidden, 32, 8, 8) == "ring"
    assert turn_scheme(hidden - 1, 32, 8, 8) == "gather-q"
    assert turn_scheme(GATHER_ROWS, 32, 32, 8) == "gather-q"
    assert turn_scheme(GATHER_ROWS + 1, 32, 32, 8) == "pass-q"


def test_a_gang_that_knows_its_speeds_takes_the_scheme_predicted_to_be_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int, int, str]] = []

    def predicted(
        facts: ModelFacts,
        speeds: str,
        link: str,
        new_tokens: int,
        cached_tokens: int,
        world_size: int,
        codec_name: str,
    ) -> list[tuple[str, float]]:
        assert (speeds, link) == ("speeds", "link")
        asked.append((new_tokens, cached_tokens, world_size, codec_name))
        return [("ulysses", 1.0), ("ring", 2.0)]

    monkeypatch.setattr(scheme_choices, "known_speeds", lambda ready: ("speeds", "link"))
    monkeypatch.setattr(scheme_choices, "choose_scheme", predicted)
    spec = GangSpec(world_size=2, model=ModelSpec(name="random:tiny"), device="cpu", threads=1)
    with LocalGang(spec) as gang:
        front = Controller(gang)
        options = PrefillOptions(chunk_tokens=512)
        ids = np.array(text("random:tiny", 900), dtype=np.int32)
        name = front.prefill(ids[:600], options).context_id
        session = front.begin_session(name)
        schemes = []
        for length in (300, 310, 20):
            [first] = front.ask(session, name, text("random:tiny", length), max_tokens=1)
            schemes.append(first.long_turn and first.long_turn.scheme)
        longer = front.prefill(ids, options)
    assert schemes == ["ulysses", "ulysses", None]
    assert (longer.plan.scheme, longer.plan.reused_tokens) == ("ulysses", 512)
    # rounded up to powers of two, and asked for once
    assert asked == [(512, 1024, 2, "raw"), (512, 512, 2, "raw")]
