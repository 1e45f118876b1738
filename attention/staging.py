"""Two places for decoded keys: one is filled while the dense kernels read the other.

On a GPU decoding has a stream of its own, so that stretch i + 1 is decoded while the pieces over
stretch i are computed: what memory bandwidth does hides under what tensor cores do. The order that
keeps the bytes right, by events alone:

    fill(place)    behind the current stream, which has the encoded keys, and behind the pieces that
                   read this place last
    filled(place)  the current stream, and so every piece from now on, goes on behind its filling
    read(place)    the pieces enqueued so far are the last to read it before its next filling

Every filled place must be `filled` before an exchange may overwrite what it was decoded from; then
whatever waits for the current stream waits for the decoding too. On a CPU all of this is done when
the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

PLACES = 2


class _Place:
    """Events of one place; `free` by the stream that read it. Events are used again: a wait takes
    the event as it stands when it is enqueued."""

    def __init__(self) -> None:
        self.ready = torch.cuda.Event()
        self.free: dict[int, torch.cuda.Event] = {}


class Staging:
    """Of one device; the memory itself is the caller's."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._places: tuple[_Place, ...] = ()
        self._next = 0

    def take(self) -> int:
        """The place whose turn it is."""
        place = self._next
        self._next = (place + 1) % PLACES
        return place

    def fill(self, place: int, device: torch.device, work: Callable[[], None]) -> None:
        """`work` decodes into the memory of `place`."""
        if device.type != "cuda":
            work()
            return
        if self._stream is None:
            self._stream, self._here = torch.cuda.Stream(device), torch.cuda.Event()
            self._places = tuple(_Place() for _ in range(PLACES))
        self._here.record()
        self._stream.wait_event(self._here)
        for event in self._places[place].free.values():
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            work()
            self._places[place].ready.record()

    def filled(self, place: int) -> None:
        if self._places:
            torch.cuda.current_stream().wait_event(self._places[place].ready)

    def read(self, place: int, streams: Sequence[torch.cuda.Stream]) -> None:
        """streams: those that pieces run on, beside the current one."""
        if not self._places:
            return
        for stream in (torch.cuda.current_stream(), *streams):
            free = self._places[place].free
            if stream.cuda_stream not in free:
                free[stream.cuda_stream] = torch.cuda.Event()
            free[stream.cuda_stream].record(stream)
