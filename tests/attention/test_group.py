"""The gloo transport between real processes."""

import os
import signal
import time

import pytest
import torch
import torch.multiprocessing as mp
from ringspan.attention.all_gather import all_gather
from ringspan.attention.ring import ring

from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.transport import Message
from ringspan.errors import PeerTimeout
from ringspan.testing import spawn_ranks

CPU = torch.device("cpu")


def _schemes_bring_every_block(transport, rank, folder):
    # Blocks differ in length and dtype from rank to rank, and rank 1 has none at all.
    def block(src):
        n = 0 if src == 1 else 5 + 3 * src
        codes = torch.arange(n * 2, dtype=torch.int8).reshape(n, 2) + src
        return codes, torch.full((n, 3), 1.5 * src, dtype=torch.bfloat16)

    def shapes(src):
        return [Shape(tuple(t.shape), t.dtype) for t in block(src)]

    buffers = Buffers(CPU)
    for scheme in (ring, all_gather):
        for _ in range(3):
            seen = []
            for src, tensors in scheme(transport, block(rank), shapes, buffers):
                assert all(torch.equal(a, b) for a, b in zip(tensors, block(src), strict=True))
                seen.append(src)
            assert sorted(seen) == list(range(transport.world_size))
            assert seen[0] == rank


def _collectives_agree(transport, rank, folder):
    gathered = transport.all_gather(torch.full((3, 2), float(rank)))
    assert gathered[:, 0, 0].tolist() == list(range(transport.world_size))
    x = torch.tensor([rank])
    transport.broadcast(x, 1)
    assert x.item() == 1


def _schemes_and_collectives(transport, rank, folder):
    _schemes_bring_every_block(transport, rank, folder)
    _collectives_agree(transport, rank, folder)


@pytest.mark.parametrize("world_size", [2, 3])
def test_schemes_and_collectives_work_between_processes(world_size, tmp_path):
    spawn_ranks(_schemes_and_collectives, world_size, tmp_path)


def _a_dead_peer_is_named(transport, rank, folder):
    peer = 1 - rank
    x, y = torch.ones(1 << 16), torch.empty(1 << 16)
    transport.start([Message(x, peer)], [Message(y, peer)]).wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PeerTimeout, match="rank 0 lost rank 1 in an exchange"):
        transport.start([Message(x, peer)], [Message(y, peer)]).wait()
    assert time.monotonic() - began < 25.0


def test_a_dead_peer_is_named(tmp_path):
    with pytest.raises(mp.ProcessExitedException, match="signal SIGKILL"):
        spawn_ranks(_a_dead_peer_is_named, 2, tmp_path)


def _a_silent_peer_is_named(transport, rank, folder):
    transport._timeout = transport._timeout / 20  # 1 s
    if rank == 0:
        with pytest.raises(PeerTimeout, match="rank 0 lost rank 1"):
            transport.start([], [Message(torch.empty(8), 1)]).wait()
        (folder / "named").touch()
    else:
        # stays alive, says nothing, until rank 0 has given up
        deadline = time.monotonic() + 20
        while not (folder / "named").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_silent_peer_is_named_within_the_timeout(tmp_path):
    spawn_ranks(_a_silent_peer_is_named, 2, tmp_path)
    assert (tmp_path / "named").exists()
