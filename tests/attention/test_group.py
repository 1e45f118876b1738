"""The gloo transport between real processes: what arrives, and who is named when nothing does."""

import os
import re
import time

import pytest
import torch

from ringspan.attention.buffers import Buffers
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.kv import PLAIN
from ringspan.attention.layer import Layer
from ringspan.attention.layout import deal
from ringspan.attention.problem import Problem, Source
from ringspan.attention.schemes.table import SCHEMES
from ringspan.attention.transport import Message
from ringspan.errors import PeerTimeout
from ringspan.testing import spawn_ranks
from ringspan.types import Span

TIMEOUT_S = 2.0
SLACK_S = 2.0
"""A survivor raises within its timeout and this."""


def _messages_and_collectives(transport, rank, folder):
    world_size = transport.world_size

    def block(src):
        # Lengths and dtypes differ from rank to rank, and rank 1 has nothing at all.
        n = 0 if src == 1 else 5 + 3 * src
        codes = torch.arange(n * 2, dtype=torch.int8).reshape(n, 2) + src
        return codes, torch.full((n, 3), 1.5 * src, dtype=torch.bfloat16)

    others = [(rank + i) % world_size for i in range(1, world_size)]
    for _ in range(3):
        into = {src: [torch.empty_like(t) for t in block(src)] for src in others}
        pending = transport.start(
            [Message(t, peer) for peer in others for t in block(rank)],
            [Message(t, src) for src in others for t in into[src]],
        )
        pending.wait()
        for src in others:
            assert all(torch.equal(a, b) for a, b in zip(into[src], block(src), strict=True))
    gathered = transport.all_gather(torch.full((3, 2), float(rank)))
    assert gathered[:, 0, 0].tolist() == list(range(world_size))
    x = torch.tensor([rank])
    transport.broadcast(x, 1)
    assert x.item() == 1
    transport.synchronize()
    assert transport.name == "gloo"
    assert transport.watch._told is None, "short waits are told to nobody"


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_and_collectives_between_processes(world_size, tmp_path):
    spawn_ranks(_messages_and_collectives, world_size, tmp_path)


def _ring_layer(transport, rank):
    world_size = transport.world_size
    spans = deal("zigzag", Span(0, 96), world_size, 16)
    problem = Problem([spans], [Source(spans, PLAIN)], True)
    q = torch.randn(problem.rows(rank), 4, 16)
    k, v = torch.randn(2, problem.rows(rank), 2, 16)
    return Layer(
        transport, Buffers(q.device), Compute(), problem, Rules(0, 0.3), q, (k, v), (2, 16)
    )


def _must_name(transport, rank, folder, failing, names):
    """`failing` raises PeerTimeout in time, with a text that matches `names`."""
    began = time.monotonic()
    with pytest.raises(PeerTimeout) as caught:
        failing()
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    assert re.search(names, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    (folder / f"named-{rank}").touch()


def _stay_silent(folder, survivors):
    """Alive, but sends nothing, until all the others have given up."""
    deadline = time.monotonic() + 30
    while not all((folder / f"named-{rank}").exists() for rank in survivors):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _in_the_middle_of_a_ring(transport, rank, folder, fate):
    transport.watch.timeout_s = TIMEOUT_S
    layer = _ring_layer(transport, rank)
    SCHEMES["ring"](layer)  # once without a fault: connections are made
    if rank == 2:
        start, hops = transport.start, []

        def once(sends, recvs, step=0):
            hops.append(step)
            if len(hops) == 2:
                fate()
            return start(sends, recvs, step)

        transport.start = once
        with pytest.raises(PeerTimeout):  # a stalled rank finds the others gone
            SCHEMES["ring"](layer)
        return

    def several():
        for _ in range(3):
            SCHEMES["ring"](layer)

    # rank 0 receives of rank 2; rank 1 sends to it, and receives of rank 0, which has given up
    names = (r"^rank 0 lost rank 2 in", r"^rank 1 lost rank (2|0( \(which waits for rank 2\))?) in")
    _must_name(transport, rank, folder, several, names[rank])


def _dies_in_a_ring(transport, rank, folder):
    _in_the_middle_of_a_ring(transport, rank, folder, lambda: os._exit(0))


def _stalls_in_a_ring(transport, rank, folder):
    _in_the_middle_of_a_ring(transport, rank, folder, lambda: _stay_silent(folder, (0, 1)))


@pytest.mark.parametrize("body", [_dies_in_a_ring, _stalls_in_a_ring], ids=["dies", "stalls"])
def test_in_a_ring_every_survivor_names_the_peer_it_waited_for(body, tmp_path):
    spawn_ranks(body, 3, tmp_path)
    assert (tmp_path / "named-0").exists()
    assert (tmp_path / "named-1").exists()


def _in_a_collective(transport, rank, folder, fate):
    transport.watch.timeout_s = TIMEOUT_S
    x = torch.full((1000,), float(rank))
    transport.all_gather(x)
    if rank == 1:
        fate()
        return
    # one that comes late finds two connections closed: of the dead one and of the first to notice
    _must_name(
        transport, rank, folder, lambda: transport.all_gather(x),
        rf"^rank {rank} lost rank (1|0 or 1|1 or 2) in a collective: ",
    )  # fmt: skip


def _dies_before_a_collective(transport, rank, folder):
    _in_a_collective(transport, rank, folder, lambda: os._exit(0))


def _stalls_before_a_collective(transport, rank, folder):
    _in_a_collective(transport, rank, folder, lambda: _stay_silent(folder, (0, 2)))


@pytest.mark.parametrize(
    "body", [_dies_before_a_collective, _stalls_before_a_collective], ids=["dies", "stalls"]
)
def test_a_collective_names_the_one_that_is_silent(body, tmp_path):
    spawn_ranks(body, 3, tmp_path)
    assert (tmp_path / "named-0").exists()
    assert (tmp_path / "named-2").exists()
