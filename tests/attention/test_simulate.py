"""Every scheme's schedule on a simulated clock: who sends what when, and what it costs.

The schemes themselves are run, without data. What the simulation says of bytes and buffers is
compared with the formulae of the schemes' docstrings and with real runs.
"""

from __future__ import annotations

import msgspec
import pytest
import torch

from ringspan.attention.buffers import Buffers
from ringspan.attention.clocks import Event, Simulated
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.cost import AttentionFit, Link, Speeds
from ringspan.attention.kv import PLAIN
from ringspan.attention.layer import Layer
from ringspan.attention.layout import deal
from ringspan.attention.loopback import LoopbackTransport, LoopbackWorld
from ringspan.attention.problem import Problem, Source
from ringspan.attention.schemes.table import SCHEMES, why_not
from ringspan.attention.schemes.ulysses import group_size_for, head_shares
from ringspan.attention.simulate import SimulatedWorld, leased_bytes, simulate
from ringspan.attention.transport import Message, SubTransport
from ringspan.errors import BadInput, PeerTimeout
from ringspan.kvstore.codecs.registry import codec
from ringspan.types import Span

HQ, HKV, D = 32, 8, 128
PAGE = 128
PAIR_S = 1e-12
RATE = 4 * D / PAIR_S
"""FLOP/s of a kernel that takes PAIR_S for a query, a key and a head, and nothing else."""
SPEEDS = Speeds(
    device_name="ideal",
    source="for tests",
    dtype="bfloat16",
    num_q_heads=HQ,
    num_kv_heads=HKV,
    head_dim=D,
    attention=AttentionFit(fixed_s=0.0, tile_s=0.0, pair_s=PAIR_S, causal_pair_s=PAIR_S),
    scan_bytes_per_s=1e30,
    copy_bytes_per_s=1e30,
    merge_bytes_per_s=1e30,
    gemm_flops_per_s=1e30,
    small_gemm_flops_per_s=1e30,
)
FAST = Link(latency_s=0.0, bytes_per_s=1e30)
SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 33, 64)


def problem(world_size: int, tokens: int, causal: bool = True, layout: str = "zigzag") -> Problem:
    dealt = deal(layout, Span(0, tokens), world_size, PAGE)
    return Problem([dealt], [Source(dealt, PLAIN)], causal)


def timed(scheme: str, given: Problem, link: Link = FAST, **options: object) -> Simulated:
    speeds = options.pop("speeds", SPEEDS)
    return simulate(scheme, given, speeds, link, heads=(HQ, HKV), head_dim=D, **options)  # type: ignore[arg-type]


def sends(played: Simulated, rank: int) -> list[Event]:
    return [event for event in played.trace if event.what == "send" and event.rank == rank]


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_bytes_are_those_of_the_docstrings(scheme: str, world_size: int) -> None:
    if why_not(scheme, HQ, HKV, world_size) is not None:
        with pytest.raises(BadInput, match="cannot be dealt evenly"):
            timed(scheme, problem(world_size, 2 * world_size * PAGE))
        return
    rows = 2 * PAGE
    played = timed(scheme, problem(world_size, rows * world_size))
    keys = 2 * rows * HKV * D * 2
    queries, parts = rows * HQ * D * 2, rows * HQ * (D * 2 + 4)
    others = world_size - 1
    if scheme in ("ring", "ring-direct", "all-gather"):
        wanted = others * keys
    elif scheme in ("pass-q", "gather-q"):
        wanted = others * (queries + parts)
    else:
        group = world_size if scheme == "ulysses" else group_size_for(HQ, HKV, world_size)
        shares = head_shares(HQ, HKV, group)
        width = shares[0].q1 - shares[0].q0, shares[0].kv1 - shares[0].kv0
        each = (queries + parts) * width[0] // HQ + keys * width[1] // HKV
        # a ring of the groups: each member has the group's keys, of its own KV heads
        inner = (world_size // group - 1) * group * keys * width[1] // HKV
        wanted = (group - 1) * each + inner
    assert played.sent_bytes == (wanted,) * world_size
    assert sum(event.num_bytes for event in played.trace if event.what == "send") == (
        wanted * world_size
    )


@pytest.mark.parametrize("world_size", SIZES[1:])
def test_who_sends_to_whom_in_which_step(world_size: int) -> None:
    given = problem(world_size, 2 * world_size * PAGE)
    steps = range(1, world_size)

    def told(scheme: str) -> list[set[tuple[int, int]]]:
        """Of each rank (step, how far on the receiver is)."""
        played = timed(scheme, given)
        every = [sends(played, rank) for rank in range(world_size)]
        assert all(len(one) == len({(e.step, e.peer) for e in one}) for one in every)
        return [
            {(event.step, (event.peer - rank) % world_size) for event in one}
            for rank, one in enumerate(every)
        ]

    assert told("ring") == [{(step, 1) for step in steps}] * world_size
    assert told("ring-direct") == [{(step, step) for step in steps}] * world_size
    assert told("all-gather") == [{(1, on) for on in steps}] * world_size
    assert told("gather-q") == [{(s, on) for s in (1, 2) for on in steps}] * world_size
    asked = {(step, step) for step in steps}
    returned = {(world_size + step, world_size - step) for step in steps}
    assert told("pass-q") == [asked | returned] * world_size


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_query_meets_every_key_it_sees_once(scheme: str) -> None:
    """Computing takes what the mask says, whatever the scheme: nothing is done twice."""
    given = problem(8, 64 * PAGE)
    played = timed(scheme, given)
    busy = sum(event.end_s - event.begin_s for event in played.trace if event.what == "attend")
    pairs = sum(given.pairs(rank, None) for rank in range(8))
    # ragged by what the diagonal's tiles of one row compute in vain: half a key a row
    assert busy == pytest.approx(pairs * HQ * PAIR_S, rel=2e-3)


@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
@pytest.mark.parametrize("scheme", ["ring", "ring-direct"])
def test_a_ring_is_hidden_exactly_where_its_rule_says(scheme: str, world_size: int) -> None:
    rows = 2 * PAGE
    given = problem(world_size, rows * world_size, causal=False)
    # new tokens / P >= (Hkv / Hq) * C / b
    enough = (HKV / HQ) * RATE / rows
    hidden = timed(scheme, given, Link(latency_s=0.0, bytes_per_s=1.001 * enough))
    assert hidden.total_exposed_s <= 1e-15
    exposed = timed(scheme, given, Link(latency_s=0.0, bytes_per_s=0.9 * enough))
    assert exposed.total_exposed_s > 0


@pytest.mark.parametrize("world_size", [2, 5, 8])
@pytest.mark.parametrize("scheme", ["ring", "ring-direct"])
def test_a_slow_link_exposes_what_arithmetic_says(scheme: str, world_size: int) -> None:
    rows = 2 * PAGE
    given = problem(world_size, rows * world_size, causal=False)
    link = Link(latency_s=3e-5, bytes_per_s=2e9)
    hop_s = link.seconds(4 * rows * HKV * D)
    attend_s = rows * rows * HQ * PAIR_S
    played = timed(scheme, given, link)
    assert played.total_exposed_s == pytest.approx((world_size - 1) * (hop_s - attend_s))
    assert played.seconds == pytest.approx((world_size - 1) * hop_s + attend_s)
    assert [len(steps) for steps in played.exposed_s] == [world_size] * world_size


def test_all_gather_is_bound_by_what_a_rank_sends() -> None:
    rows, link = 2 * PAGE, Link(latency_s=1e-5, bytes_per_s=1e9)
    played = timed("all-gather", problem(4, 4 * rows, causal=False), link)
    attend_s = rows * rows * HQ * PAIR_S
    arrived_s = 3 * 4 * rows * HKV * D / link.bytes_per_s + link.latency_s
    assert played.seconds == pytest.approx(arrived_s + 3 * attend_s)


def test_pass_q_hides_all_but_the_last_return() -> None:
    rows = 16 * PAGE
    link = Link(latency_s=0.0, bytes_per_s=4e11)  # queries and parts within a hop's computing
    played = timed("pass-q", problem(4, 4 * rows, causal=False), link)
    assert played.exposed_s[0][:-1] == pytest.approx((0.0,) * 7, abs=1e-15)
    assert played.exposed_s[0][7] > 0


def test_a_contiguous_layout_waits_for_its_last_rank() -> None:
    even, uneven = (timed("ring", problem(4, 64 * PAGE, layout=name)) for name in LAYOUT_PAIR)
    assert uneven.seconds > 1.5 * even.seconds
    assert max(even.rank_s) == pytest.approx(min(even.rank_s))


LAYOUT_PAIR = ("zigzag", "contiguous")


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_same_run_has_the_same_trace(scheme: str) -> None:
    link = Link(latency_s=1e-5, bytes_per_s=1e10)
    first, second = (timed(scheme, problem(4, 1000), link) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("shared", [False, True], ids=["links", "shared"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_dead_peer_is_named(scheme: str, shared: bool) -> None:
    link = msgspec.structs.replace(FAST, shared_device=shared)
    with pytest.raises(PeerTimeout, match=r"waited 5\.0 s for rank 2, which is dead"):
        timed(scheme, problem(4, 1024), link, dead=frozenset((2,)), timeout_s=5.0)


def test_a_stalled_link_is_a_timeout_that_names_the_peer() -> None:
    slow = Link(latency_s=0.0, bytes_per_s=1.0)
    with pytest.raises(PeerTimeout, match=r"rank \d waited 5\.0 s for rank \d"):
        timed("ring", problem(4, 1024), slow, timeout_s=5.0)


def test_sizes_that_do_not_match_are_found() -> None:
    world = SimulatedWorld(2, SPEEDS, FAST)
    x = torch.empty(4, device="meta")

    def body(rank: int) -> None:
        count = 4 if rank == 0 else 3
        end = world.transport(rank)
        end.start([Message(x[:count], 1 - rank)], [Message(x[:4], 1 - rank)]).wait()

    with pytest.raises(ValueError, match="rank 0 expected 16 bytes of rank 1, which sent 12"):
        world.run([lambda: body(0), lambda: body(1)])


def test_collectives_and_parts_of_a_world_are_timed_too() -> None:
    world = SimulatedWorld(4, SPEEDS, Link(latency_s=1e-3, bytes_per_s=1e30))

    def body(rank: int) -> None:
        end = world.transport(rank)
        assert end.all_gather(torch.empty(3, 2, device="meta")).shape == (4, 3, 2)
        end.broadcast(torch.empty(3, device="meta"), 1)
        pair = SubTransport(end, (rank // 2 * 2, rank // 2 * 2 + 1))
        assert pair.all_gather(torch.empty(5, device="meta")).shape == (2, 5)

    played = world.run([lambda rank=rank: body(rank) for rank in range(4)])  # type: ignore[misc]
    assert played.seconds == pytest.approx(3e-3)
    assert played.sent_bytes[0] == 3 * 24 + 20


def test_ranks_that_share_a_device_take_as_long_as_all_of_them_together() -> None:
    given = problem(4, 64 * PAGE)
    shared = msgspec.structs.replace(FAST, shared_device=True)
    together = timed("ring", given, shared)
    assert together.seconds == pytest.approx(4 * timed("ring", given).seconds)
    copying = Link(latency_s=0.0, bytes_per_s=1e9, shared_device=True, overlaps=False)
    copied_s = sum(together.sent_bytes) / 1e9
    assert timed("ring", given, copying).seconds == pytest.approx(together.seconds + copied_s)


def test_a_host_that_launches_slowly_binds_small_kernels() -> None:
    slow = msgspec.structs.replace(SPEEDS, attend_call_s=1e-3)
    given = problem(4, 8 * PAGE)
    pieces = sum(event.what == "attend" and event.rank == 0 for event in timed("ring", given).trace)
    alone = timed("ring", given, speeds=slow)
    assert alone.seconds == pytest.approx(pieces * 1e-3, rel=0.05)
    shared = msgspec.structs.replace(FAST, shared_device=True)
    assert timed("ring", given, shared, speeds=slow).seconds == pytest.approx(
        sum(alone.host_s), rel=0.05
    )
    ahead = timed("ring", given, speeds=slow, before=[(1.0, 0.0)] * 4)
    assert ahead.seconds < 1.001  # the host ran ahead under what came before


def test_encoded_keys_are_decoded_where_they_arrive() -> None:
    old, new = (deal("zigzag", Span(a, b), 4, PAGE) for a, b in ((0, 4096), (4096, 5120)))
    given = Problem([new], [Source(old, codec("int8")), Source(new, PLAIN)])
    slow = msgspec.structs.replace(SPEEDS, decode_bytes_per_s={"int8": 1e9})
    played = timed("ring", given, speeds=slow)
    decoded = [e.num_bytes for e in played.trace if e.what == "decode" and e.rank == 0]
    assert sum(decoded) == 4096 * 2 * HKV * D * 2
    assert played.seconds > sum(decoded) / 1e9


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_bytes_and_buffers_are_those_of_a_real_run(scheme: str, world_size: int) -> None:
    heads, dim, tokens = (8, 4), 16, 1500
    if why_not(scheme, *heads, world_size) is not None:
        pytest.skip("these heads cannot be dealt")
    given = problem(world_size, tokens)
    world = LoopbackWorld(world_size, timeout_s=30.0)
    cpu = torch.device("cpu")
    buffers = [Buffers(cpu) for _ in range(world_size)]
    ends: list[LoopbackTransport] = [world.transport(rank, cpu) for rank in range(world_size)]

    def body(rank: int) -> None:
        rows = given.rows(rank)
        own = tuple(torch.randn(rows, heads[1], dim) for _ in range(2))
        SCHEMES[scheme](
            Layer(
                ends[rank], buffers[rank], Compute(), given, Rules(0, 0.25),
                torch.randn(rows, heads[0], dim), own, (heads[1], dim),
            )
        )  # fmt: skip

    world.run([lambda rank=rank: body(rank) for rank in range(world_size)])  # type: ignore[misc]
    options = {"heads": heads, "head_dim": dim, "dtype": torch.float32}
    played = simulate(scheme, given, SPEEDS, FAST, **options)  # type: ignore[arg-type]
    assert played.sent_bytes == tuple(end.sent_bytes for end in ends)
    for simulated, real in zip(played.buffer_bytes, buffers, strict=True):
        # a real buffer may have been replaced by a larger one, and aligns its views
        assert simulated <= real.nbytes <= simulated * 1.01 + 256 * 64
    leased = leased_bytes(scheme, given, **options)  # type: ignore[arg-type]
    assert leased == pytest.approx(max(played.buffer_bytes), rel=0.03)  # a page here or there
