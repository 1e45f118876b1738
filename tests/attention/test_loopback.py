import threading

import pytest
import torch

from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.transport import Message
from ringspan.errors import PeerTimeout

CPU = torch.device("cpu")


def run(world_size, body, timeout_s=20.0, poison=True):
    world = LoopbackWorld(world_size, timeout_s, poison)
    ends = [world.transport(rank, CPU) for rank in range(world_size)]
    return world.run([lambda end=end: body(end) for end in ends])


def test_a_receive_buffer_is_poison_until_it_was_waited_for():
    def body(end):
        x, y = torch.ones(4), torch.zeros(4)
        pending = end.start([Message(x, 1 - end.rank)], [Message(y, 1 - end.rank)])
        early = y.clone()
        pending.wait()
        return bool(early.isnan().all()), y.tolist()

    assert run(2, body) == [(True, [1.0] * 4)] * 2


def test_a_sent_tensor_may_be_overwritten_after_the_wait():
    def body(end):
        y = torch.zeros(3)
        x = torch.full((3,), float(end.rank))
        end.start([Message(x, 1 - end.rank)], [Message(y, 1 - end.rank)]).wait()
        x.fill_(99.0)
        return y.tolist()

    assert run(2, body) == [[1.0] * 3, [0.0] * 3]


def test_collectives_agree():
    def body(end):
        gathered = end.all_gather(torch.tensor([end.rank, 10 * end.rank]))
        x = torch.tensor([end.rank])
        end.broadcast(x, 2)
        return gathered.tolist(), x.item()

    assert run(3, body) == [([[0, 0], [1, 10], [2, 20]], 2)] * 3


def test_the_first_error_is_raised_and_the_others_are_released():
    def body(end):
        if end.rank == 1:
            raise ValueError("rank 1 had enough")
        end.all_gather(torch.ones(1))

    with pytest.raises(ValueError, match="rank 1 had enough"):
        run(3, body)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank-")]


def test_a_silent_peer_is_named_within_the_timeout():
    def body(end):
        if end.rank == 0:
            end.start([], [Message(torch.empty(1), 1)]).wait()

    with pytest.raises(PeerTimeout, match=r"rank 0 waited 0.2 s for rank 1"):
        run(2, body, timeout_s=0.2)


def test_a_message_of_another_size_is_refused():
    def body(end):
        if end.rank == 0:
            end.start([Message(torch.ones(2), 1)], []).wait()
        else:
            end.start([], [Message(torch.empty(3), 0)]).wait()

    with pytest.raises(ValueError, match="rank 1 expected 12 bytes of rank 0, which sent 8"):
        run(2, body)
