"""Every scheme, any number of ranks, odd lengths, each rule of attention: equal to one process.

Ranks are loopback ranks with poisoned receive buffers; what they give is put together and compared
with the definition over the whole sequence in fp64.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from ringspan.attention.audit import Audit
from ringspan.attention.buffers import Buffers
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.kv import PLAIN, Codec, cut_units
from ringspan.attention.layer import Layer
from ringspan.attention.layout import deal, positions
from ringspan.attention.ledger import Ledger
from ringspan.attention.loopback import LoopbackTransport, LoopbackWorld
from ringspan.attention.problem import Problem, Source
from ringspan.attention.schemes.table import SCHEMES, why_not
from ringspan.attention.tail import tail_deal
from ringspan.attention.transport import Message, Pending
from ringspan.errors import BadInput, WrongAttention
from ringspan.kernels.flash import flash_ref
from ringspan.kvstore.codecs.bf16 import Bf16Codec
from ringspan.kvstore.codecs.fp8 import Fp8Codec
from ringspan.kvstore.codecs.int4 import Int4Codec
from ringspan.kvstore.codecs.int8 import Int8Codec
from ringspan.types import Part, Span, coalesce

CPU = torch.device("cpu")
PAGE = 16


class Case(NamedTuple):
    """cached and new tokens of each sequence; what attention asks for."""

    name: str
    lengths: tuple[tuple[int, int], ...] = ((0, 203),)
    causal: bool = True
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    heads: tuple[int, int] = (8, 4)
    layout: str = "zigzag"


CASES = (
    Case("causal"),
    Case("prefix", ((160, 77),)),
    Case("short-prefix-one-new", ((48, 1),)),
    Case("full", causal=False),
    Case("window", ((96, 131),), window=50),
    Case("softcap", softcap=3.0),
    Case("sinks", ((64, 61),), sinks=True),
    Case("sinks-window-softcap", ((64, 90),), window=33, softcap=4.0, sinks=True),
    Case("batch", ((0, 70), (32, 19), (64, 90))),
    Case("batch-window", ((0, 70), (32, 19), (64, 90)), window=21),
    Case("mha", heads=(4, 4)),
    Case("mqa", heads=(8, 1)),
    Case("striped", ((80, 101),), layout="striped"),
    Case("short-page", ((149, 41),)),
    Case("short-page-window-softcap", ((149, 41),), window=60, softcap=4.0),
    Case("contiguous", ((80, 101),), layout="contiguous"),
)
BY_NAME = {case.name: case for case in CASES}


class Setting(NamedTuple):
    problem: Problem
    rules: Rules
    q: list[torch.Tensor]
    own: list[tuple[torch.Tensor, ...]]
    kv_shape: tuple[int, int]
    exact: list[Part]


def setting(case: Case, world_size: int, cached_codec: Codec = PLAIN) -> Setting:
    """Random tensors of a case dealt to ranks, and what each rank's rows must give."""
    generator = torch.Generator().manual_seed(len(case.name))
    (hq, hkv), dim = case.heads, 16
    rand = lambda n, h: torch.randn(n, h, dim, generator=generator)  # noqa: E731
    queries, sources, per_rank_q, per_rank_own = [], [], [], []
    exact_rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(world_size)]
    sinks = torch.randn(hq, generator=generator) if case.sinks else None
    own: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    q_rows: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    for sequence, (cached, new) in enumerate(case.lengths):
        n = cached + new
        q, k, v = rand(n, hq), rand(n, hkv), rand(n, hkv)
        # earlier chunks were dealt in another way than the new tokens: as they happened to come
        held = deal("striped", Span(0, cached), world_size, PAGE)
        if cached % PAGE:  # a turn of a session, behind a context's short last page
            dealt = tail_deal(Span(cached, n), world_size, PAGE)
        else:
            dealt = deal(case.layout, Span(cached, n), world_size, PAGE)
        queries.append(dealt)
        if cached:
            sources.append(Source(held, cached_codec, (sequence,)))
            for rank in range(world_size):
                at = positions(held[rank])
                specs = cached_codec.specs(hkv, dim, torch.float32)
                into = tuple(
                    torch.empty((s.units(len(at)), *s.shape), dtype=s.dtype) for s in specs
                )
                cached_codec.encode(k[at], v[at], into)
                own[rank] += into
                cached_codec.decode(
                    into, *(kv := (torch.empty_like(k[at]), torch.empty_like(k[at])))
                )
                k[at], v[at] = kv
        sources.append(Source(dealt, PLAIN, (sequence,)))
        whole = flash_ref(
            q.double(), k.double(), v.double(), causal=case.causal, offset=0, scale=0.3,
            window=case.window, softcap=case.softcap,
        )  # fmt: skip
        out, lse = whole.out, whole.lse.double()
        if sinks is not None:
            with_sink = torch.logaddexp(lse, sinks.double().expand_as(lse))
            out, lse = out * (lse - with_sink).exp()[..., None], with_sink
        for rank in range(world_size):
            at = positions(dealt[rank])
            q_rows[rank].append(q[at])
            own[rank] += (k[at], v[at])
            exact_rows[rank].append((out[at], lse[at]))
    per_rank_q = [torch.cat(rows) for rows in q_rows]
    per_rank_own = [tuple(tensors) for tensors in own]
    exact = [
        Part(torch.cat([o for o, _ in rows]), torch.cat([one for _, one in rows]))
        for rows in exact_rows
    ]
    rules = Rules(0, 0.3, case.window, case.softcap, sinks)
    return Setting(
        Problem(queries, sources, case.causal), rules, per_rank_q, per_rank_own, (hkv, dim), exact
    )


def run(
    scheme: str,
    given: Setting,
    world_size: int,
    transports: Sequence[Any] | None = None,
    world: LoopbackWorld | None = None,
    audit: bool = True,
    **options: Any,
) -> list[Part]:
    world = world or LoopbackWorld(world_size, timeout_s=20.0)
    ends = transports or [world.transport(rank, CPU) for rank in range(world_size)]

    def body(rank: int) -> Part:
        problem, firsts = given.problem.windowed(given.rules.window)
        own, begin = [], 0
        for at, source in enumerate(problem.sources):
            specs = source.codec.specs(*given.kv_shape, torch.float32)
            tensors = given.own[rank][begin : begin + len(specs)]
            held = given.problem.keys(at, rank)
            own += [t.contiguous() for t in cut_units(tensors, specs, firsts[at][rank], held)]
            begin += len(specs)
        ledger = Ledger(problem)
        ledger.layer(given.rules.window, given.q[rank].shape[1])
        layer = Layer(
            ends[rank], Buffers(CPU), Compute(options.get("backend", "auto")), problem, given.rules,
            given.q[rank], tuple(own), given.kv_shape, ledger, options.get("deterministic", False),
        )  # fmt: skip
        part = SCHEMES[scheme](layer)
        part = Part(part.out.clone(), part.lse.clone())
        ledger.check(ends[rank], CPU)
        if audit:
            checker = Audit(frozenset((0,)), seed=3, rows=5)
            checker.check(layer, part)
            assert checker.result().rows == min(5, len(given.q[rank])) or not len(given.q[rank])
        return part

    return world.run([lambda rank=rank: body(rank) for rank in range(world_size)])  # type: ignore[misc]


def assert_close(parts: Sequence[Part], exact: Sequence[Part], tolerance: float = 2e-5) -> None:
    for rank, (part, wanted) in enumerate(zip(parts, exact, strict=True)):
        assert part.out.shape == wanted.out.shape
        if part.out.numel():
            assert (part.out.double() - wanted.out).abs().max() <= tolerance, rank
            assert (part.lse.double() - wanted.lse).abs().max() <= tolerance, rank


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_scheme_equals_one_process(scheme: str, case: Case, world_size: int) -> None:
    given = setting(case, world_size)
    if (reason := why_not(scheme, *case.heads, world_size)) is not None:
        with pytest.raises(BadInput, match="cannot be dealt evenly"):
            run(scheme, given, world_size)
        assert "cannot be dealt evenly" in reason
        assert case.heads[1] % world_size
        return
    assert_close(run(scheme, given, world_size), given.exact)


ENCODED = {
    "bf16": Bf16Codec(),
    "int8": Int8Codec(PAGE),
    "fp8": Fp8Codec(PAGE),
    "int4": Int4Codec(PAGE),
}


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("name", ["batch", "short-page", "short-page-window-softcap"])
@pytest.mark.parametrize("codec_name", ENCODED)
def test_encoded_keys_travel_encoded_and_give_what_their_decoded_values_give(
    scheme: str, codec_name: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringspan.attention.layer.STAGING_TOKENS", 2 * PAGE)
    given = setting(BY_NAME[name], 4, ENCODED[codec_name])
    assert_close(run(scheme, given, 4), given.exact)
    monkeypatch.setattr("ringspan.kvstore.codecs.paged.SWEEP_ROWS", 0)  # all is decoded
    assert_close(run(scheme, given, 4), given.exact)


def test_few_rows_attend_to_codes_in_place_and_the_others_to_decoded_keys() -> None:
    decoded = []

    class Watched(Compute):
        def decode(self, *arguments: Any) -> None:
            decoded.append(arguments[2].shape[0])
            super().decode(*arguments)

    few, many = (Case(str(rows), ((300, rows),)) for rows in (64, 65))
    for case, wanted in ((few, []), (many, [300])):
        given = setting(case, 1, ENCODED["int8"])
        end = LoopbackWorld(1).transport(0, CPU)
        layer = Layer(
            end, Buffers(CPU), Watched(), given.problem, given.rules, given.q[0], given.own[0],
            given.kv_shape,
        )  # fmt: skip
        assert_close([SCHEMES["ring"](layer)], given.exact)
        assert decoded == wanted


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("name", ["causal", "batch-window", "sinks"])
def test_more_ranks_than_heads_or_pages(scheme: str, name: str) -> None:
    case = BY_NAME[name]
    given = setting(case, 8)
    assert_close(run(scheme, given, 8), given.exact)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_backend_that_carries_accumulators_gives_the_same(scheme: str) -> None:
    given = setting(BY_NAME["sinks"], 3 if scheme != "ulysses" else 4)
    world_size = len(given.q)
    assert_close(run(scheme, given, world_size, backend="reference"), given.exact)


class Delayed(LoopbackTransport):
    """Waits a random while around every exchange, so that ranks come in any order."""

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0) -> Pending:
        self._pause()
        pending = super().start(sends, recvs, step)
        self._pause()
        return pending

    def _pause(self) -> None:
        self.world.lock.release()
        time.sleep(random.random() * 2e-3)
        self.world.lock.acquire()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("name", ["prefix", "batch-window"])
def test_random_delays_never_change_a_bit(scheme: str, name: str) -> None:
    given = setting(BY_NAME[name], 4)
    calm = run(scheme, given, 4)
    for _ in range(3):
        world = LoopbackWorld(4, timeout_s=20.0)
        hurried = run(scheme, given, 4, [Delayed(world, rank, CPU) for rank in range(4)], world)
        for a, b in zip(calm, hurried, strict=True):
            assert torch.equal(a.out, b.out)
            assert torch.equal(a.lse, b.lse)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_deterministic_is_right_and_repeats(scheme: str) -> None:
    given = setting(BY_NAME["prefix"], 4)
    first, second = (run(scheme, given, 4, deterministic=True) for _ in range(2))
    assert_close(first, given.exact)
    assert all(torch.equal(a.out, b.out) for a, b in zip(first, second, strict=True))


def test_the_ledger_finds_a_block_that_was_left_out() -> None:
    given = setting(BY_NAME["prefix"], 2)
    problem = given.problem

    def body(rank: int, world: LoopbackWorld) -> None:
        end = world.transport(rank, CPU)
        ledger = Ledger(problem)
        ledger.layer(None, 8)
        for k_rank in range(2):
            for at in range(len(problem.sources)):
                if (rank, k_rank, at) != (1, 0, 0):
                    ledger.add(rank, problem.cut(rank, k_rank, at, None), 8)
        ledger.check(end, CPU)

    world = LoopbackWorld(2)
    with pytest.raises(WrongAttention, match=r"rank 1, row 0 of .* wanted"):
        world.run([lambda r=r: body(r, world) for r in range(2)])  # type: ignore[misc]


@pytest.mark.parametrize("broken", ["one key block", "one head", "one row"])
def test_the_audit_finds_what_the_ledger_cannot(broken: str) -> None:
    given = setting(BY_NAME["causal"], 2)
    world = LoopbackWorld(2, timeout_s=10.0)

    def body(rank: int) -> None:
        end = world.transport(rank, CPU)
        layer = Layer(
            end, Buffers(CPU), Compute(), given.problem, given.rules, given.q[rank],
            given.own[rank], given.kv_shape,
        )  # fmt: skip
        part = SCHEMES["ring"](layer)
        if rank == 1:
            if broken == "one key block":
                away = given.exact[rank].out * 0.9
                part.out.copy_(away)
            elif broken == "one head":
                part.out[:, 0] = part.out[:, 1]
            else:
                part.out[-1] = float("nan")
        audit = Audit(frozenset((0,)), seed=1)
        audit.check(layer, part)
        audit.result()

    with pytest.raises(WrongAttention, match="is off by"):
        world.run([lambda r=r: body(r) for r in range(2)])  # type: ignore[misc]


def test_a_peer_that_says_nothing_is_named() -> None:
    from ringspan.errors import PeerTimeout

    given = setting(BY_NAME["causal"], 3)
    world = LoopbackWorld(3, timeout_s=0.2)

    def body(rank: int) -> None:
        if rank == 2:  # keeps still, without the turn, until the others have given up
            world.lock.release()
            time.sleep(1.0)
            world.lock.acquire()
            return
        layer = Layer(
            world.transport(rank, CPU), Buffers(CPU), Compute(), given.problem, given.rules,
            given.q[rank], given.own[rank], given.kv_shape,
        )  # fmt: skip
        SCHEMES["ring"](layer)

    with pytest.raises(PeerTimeout, match=r"rank 0 waited 0\.2 s for rank 2"):
        world.run([lambda r=r: body(r) for r in range(3)])  # type: ignore[misc]


def test_spans_of_the_groups_cover_what_the_ranks_had() -> None:
    given = setting(BY_NAME["batch"], 4)
    grouped = given.problem.grouped(2)
    for group in range(2):
        order = grouped.row_order(group)
        assert sorted(order) == list(range(len(order)))
    for deal_, joined in zip(given.problem.queries, grouped.problem.queries, strict=True):
        every = coalesce(sorted(s for spans in deal_ for s in spans))
        assert coalesce(sorted(s for spans in joined for s in spans)) == every
