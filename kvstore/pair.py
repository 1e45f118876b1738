"""The road between one rank that sends pages and one that takes them: parcels, both ways.

A parcel is a note, bytes that say what comes, and maybe a payload behind it, a tensor on the
device. Each pair of ranks has a process group of its own, apart from those that their gangs compute
in: what goes wrong on one pair leaves all other roads as they are (gloo closes every connection of
a group when one wait in it runs out, NCCL aborts a communicator as a whole).

    24 bytes   magic u32 | note bytes u32 | payload bytes u64 | xxh3-64 of the note, seeded with
               the payload's bytes    (little-endian)
    note       by gloo, on the host
    payload    by gloo from a CPU, by NCCL between GPUs

Every wait ends within `timeout_s` and then names the peer.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import xxhash

from ringspan.errors import CorruptPage, PeerTimeout

MAGIC = 0x4F485352
_PRELUDE = struct.Struct("<IIQQ")
MOST_NOTE_BYTES = 64 << 20
MOST_PAYLOAD_BYTES = 1 << 34
"""What is larger is none of ours: it is refused before memory is taken for it."""
NCCL_TIMEOUT_S = 1800.0
"""NCCL's own watchdog would end the process; ours gives up earlier, and does not."""
POLL_S = 1e-4
"""Between two looks at a device that sends or takes a payload."""

Room = Callable[[bytes], "torch.Tensor | None"]
"""A note -> where its payload goes, contiguous uint8; None where there is none. What it raises is
raised by `recv`, once the payload was thrown away."""


class Road(Protocol):
    """What a hand-off needs of a pair."""

    peer: str

    def send(self, note: bytes, payload: torch.Tensor | None = None) -> Sent:
        """Begin to send a parcel. payload: contiguous uint8, left alone until `Sent.wait`."""

    def recv(self, room: Room) -> bytes:
        """The next parcel's note, its payload in the room that was given for it."""

    def close(self) -> None: ...


class Sent(NamedTuple):
    """A parcel on its way, with what must live until it is there."""

    works: tuple[Any, ...]
    tensors: tuple[torch.Tensor, ...]
    wait_for: Callable[[Any], None]

    def wait(self) -> None:
        """Until its tensors may be overwritten. Raises PeerTimeout."""
        for work in self.works:
            self.wait_for(work)


class Pair:
    """One end, joined by `join_pair`. One thread sends and one receives, or one does both.

    peer: how the other end is named in errors, `decode rank 1`. me: this end. turn: held while a
    payload is on its way between GPUs: a rank sends to one peer at a time, so that its kernels
    never wait for each other in one queue of the device.
    """

    def __init__(
        self,
        notes: dist.ProcessGroupGloo,
        payloads: Any,
        side: int,
        me: str,
        peer: str,
        device: torch.device,
        timeout_s: float,
        turn: threading.Lock,
    ) -> None:
        self.me, self.peer, self.device, self.timeout_s = me, peer, device, timeout_s
        self._notes, self._payloads, self._other = notes, payloads, 1 - side
        self._turn = turn
        nccl = payloads is not None
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)] if nccl else []

    def send(self, note: bytes, payload: torch.Tensor | None = None) -> Sent:
        size = 0 if payload is None else payload.numel()
        digest = xxhash.xxh3_64_intdigest(note, seed=size)
        tensors = [_host(_PRELUDE.pack(MAGIC, len(note), size, digest)), _host(note)]
        if payload is None or self._payloads is None:
            return self._post([*tensors, payload] if payload is not None else tensors)
        with self._turn:
            sent = self._post(tensors)
            sent.wait()
            self._by_nccl(self._streams[0], lambda: self._payloads.send([payload], self._other, 0))
        return sent

    def recv(self, room: Room) -> bytes:
        prelude = torch.empty(_PRELUDE.size, dtype=torch.uint8)
        self._take(prelude)
        magic, size, payload_bytes, digest = _PRELUDE.unpack(prelude.numpy().tobytes())
        if magic != MAGIC or not 0 < size <= MOST_NOTE_BYTES or payload_bytes > MOST_PAYLOAD_BYTES:
            raise CorruptPage(
                f"{self.me}: what came from {self.peer} begins no parcel (0x{magic:08x}, {size} "
                f"and {payload_bytes} bytes): hand the context over again"
            )
        data = torch.empty(size, dtype=torch.uint8)
        self._take(data)
        note = data.numpy().tobytes()
        if xxhash.xxh3_64_intdigest(note, seed=payload_bytes) != digest:
            raise CorruptPage(
                f"{self.me}: a note of {size} bytes from {self.peer} differs from its checksum: "
                "hand the context over again"
            )
        refused: Exception | None = None
        payload: torch.Tensor | None = None
        try:
            payload = room(note)
            found = 0 if payload is None else payload.numel()
            if found != payload_bytes:
                raise CorruptPage(
                    f"{self.me}: {self.peer} sends {payload_bytes} bytes with pages of {found}: "
                    "hand the context over again"
                )
        except Exception as error:
            refused = error
            payload = torch.empty(payload_bytes, dtype=torch.uint8, device=self.device)
        if payload is not None and payload_bytes:
            if self._payloads is None:
                self._take(payload)
            else:
                self._by_nccl(
                    self._streams[1], lambda: self._payloads.recv([payload], self._other, 0)
                )
        if refused is not None:
            raise refused
        return note

    def close(self) -> None:
        """May be repeated. Whoever waits at the other end is told so by its connection."""
        payloads, self._payloads = self._payloads, None
        if payloads is not None:
            payloads.abort()
        self._notes.abort()

    def _post(self, tensors: list[torch.Tensor]) -> Sent:
        with self._naming("sending"):
            works = tuple(self._notes.send([t], self._other, 0) for t in tensors if t.numel())
        return Sent(works, tuple(tensors), self._wait)

    def _take(self, into: torch.Tensor) -> None:
        with self._naming("receiving"):
            work = self._notes.recv([into], self._other, 0)
            work.wait(timedelta(seconds=self.timeout_s))

    def _wait(self, work: Any) -> None:
        with self._naming("sending"):
            work.wait(timedelta(seconds=self.timeout_s))

    def _by_nccl(self, stream: torch.cuda.Stream, post: Callable[[], Any]) -> None:
        """Blocks until the payload is there. The current stream's work so far comes before."""
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        with self._naming("exchanging a payload"), torch.cuda.stream(stream):
            stream.wait_event(ready)
            post().wait()
            done = torch.cuda.Event()
            done.record(stream)
            until = time.monotonic() + self.timeout_s
            while not done.query():
                if time.monotonic() > until:
                    self._payloads.abort()  # its kernel ends
                    raise PeerTimeout(
                        f"{self.me} lost {self.peer} in a payload: it did not pass in "
                        f"{self.timeout_s:.1f} s"
                    )
                time.sleep(POLL_S)

    @contextmanager
    def _naming(self, doing: str) -> Iterator[None]:
        """torch.distributed says what broke, we say who."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            why = (
                f"no word in {self.timeout_s:.1f} s"
                if "imed out" in text
                else "its connection is closed"
            )
            raise PeerTimeout(f"{self.me} lost {self.peer} in {doing}: {why}") from error


def join_pair(
    store: dist.Store,
    name: str,
    side: int,
    me: str,
    peer: str,
    device: torch.device,
    timeout_s: float,
    turn: threading.Lock,
    join_timeout_s: float,
) -> Pair:
    """Blocks until the other end has come, at most `join_timeout_s`; PeerTimeout names it.

    store: a connection of this thread's own. name: of the pair, equal at both ends. side: 0 or 1.
    """
    store = dist.PrefixStore(name, store)
    timeout = timedelta(seconds=join_timeout_s)
    try:
        store.set(f"here-{side}", me)
        store.wait([f"here-{1 - side}"], timeout)
        notes = dist.ProcessGroupGloo(dist.PrefixStore("notes", store), side, 2, timeout)
        payloads = None
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=NCCL_TIMEOUT_S)
            # Streams of high priority have queues of their own on the device: a payload that
            # waits for its peer never stands before a kernel that the peer's gang waits for.
            options.is_high_priority_stream = True
            payloads = dist.ProcessGroupNCCL(dist.PrefixStore("payloads", store), side, 2, options)
    except RuntimeError as error:
        raise PeerTimeout(
            f"{me} lost {peer} in joining: it did not come in {join_timeout_s:.1f} s"
        ) from error
    return Pair(notes, payloads, side, me, peer, device, timeout_s, turn)


def _host(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)


def lost_peer(road: Road, error: Exception) -> bool:
    """Whether the error says that the other end of this road is gone or silent."""
    return isinstance(error, PeerTimeout) and f"lost {road.peer} " in f"{error} "


class Spare:
    """Buffers of one thread's parcels, to be used again. size: exactly; few sizes come."""

    def __init__(self, device: torch.device, most: int) -> None:
        self._device, self._most = device, most
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> torch.Tensor:
        with self._lock:
            for at, buffer in enumerate(self._free):
                if buffer.numel() == size:
                    return self._free.pop(at)
            if len(self._free) >= self._most:
                del self._free[0]
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def give_back(self, buffer: torch.Tensor) -> None:
        with self._lock:
            self._free.append(buffer)


@contextmanager
def side_stream(device: torch.device, ready: torch.cuda.Event | None) -> Iterator[None]:
    """A stream of this thread's own for the body, behind `ready`; done when the body is left. On a
    CPU nothing."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if ready is not None:
                stream.wait_event(ready)
            yield
            stream.synchronize()
