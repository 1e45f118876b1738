"""The answers of one HTTP request: begun together, heard together, left together.

The service calls a listener on its own thread with all that is new of an answer. Here it becomes
one item of the event loop's queue, and the client's going away another, so that a route waits for
one thing only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from starlette.requests import Request

from ringspan.cluster.service_types import (
    DoneEvent,
    Event,
    FailedEvent,
    JobView,
    ProgressEvent,
    Sampling,
    TokenEvent,
)
from ringspan.deploy.serve.stops import StopStrings

if TYPE_CHECKING:
    from ringspan.cluster.service_jobs import Ticket
    from ringspan.deploy.answers import Pieces


class Ask(NamedTuple):
    """One answer that is wanted."""

    token_ids: Sequence[int]
    """What is new: a whole prompt, or what follows a context."""
    sampling: Sampling
    stops: tuple[str, ...]
    pieces: Pieces
    """Of the model: token ids to text."""


class Delta(NamedTuple):
    """What is new of one answer."""

    choice: int
    """Which of the request's answers."""
    text: str
    tokens: tuple[TokenEvent, ...]
    finish_reason: str | None


class Left(Exception):
    """The client is gone: nobody is there to answer."""


class Answer:
    """One choice, from its events."""

    def __init__(self, index: int, ask: Ask) -> None:
        self.index, self.ask = index, ask
        self.ticket: Ticket | None = None
        self.view: JobView | None = None
        """As it was told last."""
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._stops = StopStrings(ask.stops)

    def take(self, events: Sequence[Event]) -> Delta | None:
        """What the events add; None: nothing to tell. Raises what the answer failed of."""
        text, tokens = "", []
        for event in events:
            match event:
                case ProgressEvent(view=view) | DoneEvent(view=view):
                    self.view = view
                case FailedEvent(error=error):
                    if self.finish_reason is None:
                        raise error
                case TokenEvent() if self.finish_reason is None:
                    tokens.append(event)
                    text += self._token(event)
        if not tokens:
            return None
        return Delta(self.index, text, tuple(tokens), self.finish_reason)

    def _token(self, event: TokenEvent) -> str:
        self.num_tokens += 1
        pieces = self.ask.pieces
        new = "" if event.finish_reason == "stop" else pieces.push(event.token_id)
        if event.finish_reason is not None:
            new += pieces.finish()
        looked_at = self.num_tokens > self.ask.sampling.min_tokens  # else it may not end here
        text = self._stops.push(new) if looked_at else new
        if self._stops.found:
            self.finish_reason = "stop"
            assert self.ticket is not None or event.finish_reason is not None
            self.leave()
        elif event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            text += self._stops.finish()
        return text

    def leave(self) -> None:
        """Nobody wants more of it."""
        if self.ticket is not None:
            self.ticket.leave()


class Answers:
    """Enter it to be told of a client that goes away, leave it to end what is still running."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Sequence[Event]] | None] = asyncio.Queue()
        self._watch = self._loop.create_task(self._gone())
        self.all: list[Answer] = []

    async def begin(self, asks: Sequence[Ask], answer: Callable[..., Ticket]) -> None:
        """answer: `Service.answer` with what all have in common. Raises what it refuses with;
        those that were begun before are ended then."""
        for index, ask in enumerate(asks):
            one = Answer(index, ask)
            one.ticket = await asyncio.to_thread(
                answer, ask.token_ids, ask.sampling, listener=self._listener(index)
            )
            self.all.append(one)

    async def next(self, timeout_s: float) -> list[Delta] | None:
        """What is new of all answers whose news are there; None after `timeout_s` without any.
        Raises Left, or what an answer failed of."""
        deltas: list[Delta] = []
        try:
            async with asyncio.timeout(timeout_s):
                while not deltas:
                    self._take(await self._queue.get(), deltas)
        except TimeoutError:
            return None
        while not self._queue.empty():
            self._take(self._queue.get_nowait(), deltas)
        return deltas

    def _take(self, item: tuple[int, Sequence[Event]] | None, deltas: list[Delta]) -> None:
        if item is None:
            raise Left
        index, events = item
        delta = self.all[index].take(events)
        if delta is not None:
            deltas.append(delta)

    @property
    def done(self) -> bool:
        return all(one.finish_reason is not None for one in self.all)

    def view(self) -> JobView | None:
        """Of the first answer that has no token yet: how far its prefill is."""
        for one in self.all:
            if not one.num_tokens and one.view is not None:
                return one.view
        return None

    def close(self) -> None:
        self._watch.cancel()
        for one in self.all:
            if one.finish_reason is None:
                one.leave()

    def _listener(self, index: int) -> Callable[[Sequence[Event]], None]:
        def listen(events: Sequence[Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended before the answer did
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, tuple(events)))

        return listen

    async def _gone(self) -> None:
        """The body is read: all that can still come is the end of the connection."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)
