"""Memory that the GPUs of one host share: counters and slots for every peer, and how a stream waits
for a counter and writes one.

Source: stream memory operations of the CUDA driver,
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ringspan.attention.lanes import CYCLE, NUM_SLOTS, SLOT_BYTES

_LINE = 64
"""Bytes from one counter to the next."""


class Island(NamedTuple):
    """Ranks of one host, each with a GPU of its own, and the name of their process group."""

    ranks: tuple[int, ...]
    group_name: str


class Arena:
    """Symmetric memory of the ranks of one host: counters, then slots for each peer.

    Counters of a rank, one each _LINE bytes: what each peer has freed of our puts, what has arrived
    of each peer, and last who gave up (rank + 1, or 0).
    """

    owned: tuple[object, ...] = ()
    """What must live as long as the arena."""

    def __init__(
        self,
        rank: int,
        memory: Mapping[int, torch.Tensor],
        num_slots: int = NUM_SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        """memory: by rank, uint8 [arena_bytes], as this rank sees it; its counters are zero."""
        self.rank, self._memory = rank, memory
        self._members = sorted(memory)
        self._num_slots, self._slot_bytes = num_slots, slot_bytes
        self.peers = tuple(member for member in self._members if member != rank)
        self._head = _head_bytes(len(memory))

    def slot(self, owner: int, source: int, slot: int) -> torch.Tensor:
        """uint8 [slot_bytes] at `owner`, for what `source` puts there."""
        place = self._members.index(source) - (source > owner)
        start = self._head + (place * self._num_slots + slot) * self._slot_bytes
        return self._memory[owner][start : start + self._slot_bytes]

    def index(self, freed: bool, peer: int) -> int:
        """Of the counter that `peer` writes: what it freed, or what of it arrived."""
        return self._members.index(peer) + (0 if freed else len(self._members))

    def counter(self, owner: int, freed: bool, peer: int) -> int:
        """Its address, at `owner`."""
        return int(self._memory[owner].data_ptr()) + _LINE * self.index(freed, peer)

    def quitter(self, owner: int) -> int:
        """Address of owner's word for who gave up."""
        return int(self._memory[owner].data_ptr()) + _LINE * 2 * len(self._members)

    def counters(self, stream: torch.cuda.Stream) -> list[int]:
        """Our own, as they are now; the last one is who gave up."""
        with torch.cuda.stream(stream):
            words = self._memory[self.rank][: self._head].view(torch.int32).cpu()
        every = words[:: _LINE // 4][: 2 * len(self._members) + 1].tolist()
        return [int(word) % CYCLE for word in every]


def arena_bytes(num_members: int, num_slots: int = NUM_SLOTS, slot_bytes: int = SLOT_BYTES) -> int:
    """Of each rank."""
    return _head_bytes(num_members) + (num_members - 1) * num_slots * slot_bytes


def shared_arena(rank: int, island: Island, device: torch.device) -> Arena:
    """All ranks of the island call it. Raises RuntimeError where they cannot share memory."""
    from torch.distributed import _symmetric_memory as symmetric

    # torch's own switches, read when memory is shared. Multicast objects would be made for
    # nothing. Each rank may see its GPU as number 0, as Ray's workers do; that they are
    # different ones was found out before.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    num_bytes = arena_bytes(len(island.ranks))
    own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
    own[: _head_bytes(len(island.ranks))].zero_()
    torch.cuda.synchronize(device)  # zero before any peer can write
    handle = symmetric.rendezvous(own, island.group_name)
    arena = Arena(
        rank,
        {
            member: handle.get_buffer(at, (num_bytes,), torch.uint8)
            for at, member in enumerate(island.ranks)
        },
    )
    arena.owned = (own, handle)
    return arena


def _head_bytes(num_members: int) -> int:
    """Counters, in whole pages of memory."""
    return -(-_LINE * (2 * num_members + 1) // 4096) * 4096


class StreamMemory:
    """The CUDA driver's stream memory operations, on 32-bit words of device memory."""

    def __init__(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        self._wait, self._write = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for call in (self._wait, self._write):
            call.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
            call.restype = ctypes.c_int

    def wait(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        """What follows in the stream waits until the word has reached the value, cyclically."""
        _succeeded(self._wait(stream.cuda_stream, address, value, 0), "cuStreamWaitValue32")

    def write(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        """After all before it in the stream is visible to every device."""
        _succeeded(self._write(stream.cuda_stream, address, value, 0), "cuStreamWriteValue32")


def _succeeded(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call} failed with CUresult {status}")
