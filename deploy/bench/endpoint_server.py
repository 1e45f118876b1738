"""A server whose engine costs nothing: the HTTP application of `ringspan serve` over a service that
emits one token of every running answer at a fixed pace, and notes when.

For `bench endpoint` alone, which subtracts these times from what the clients saw. Times are of
`time.monotonic`, which all processes of one machine share.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple, cast

from ringspan.cluster.metrics import Metrics
from ringspan.cluster.service_types import Event, Listener, Sampling, TokenEvent
from ringspan.specs import ModelSpec

if TYPE_CHECKING:
    from ringspan.cluster.service import Service

MODEL = "paced"
VOCABULARY = 1000
POSITIONS = 1 << 20
DRAIN_S = 5.0


class Emitted(NamedTuple):
    """One answer, as the engine saw it."""

    asked_s: float
    """When the service was asked."""
    tokens_s: list[float]
    """When each token was handed over."""


class Told(NamedTuple):
    """What the server says when it ends."""

    emitted: dict[str, Emitted]
    """By request id."""
    cpu_s: float
    """Of its process, since it listened."""


class PacedTicket:
    """A client's end of an answer, as `service_jobs.Ticket`."""

    context_id = ""
    cached_tokens = 0

    def __init__(self, sampling: Sampling, listener: Listener) -> None:
        self.request_id = secrets.token_hex(8)
        self.wanted, self.listener = sampling.max_tokens, listener
        self.emitted = Emitted(time.monotonic(), [])
        self.left = False

    def leave(self) -> None:
        self.left = True


class PacedService:
    """What the routes of plain completions use of `Service`."""

    max_model_len = POSITIONS

    def __init__(self, pace_s: float) -> None:
        """pace_s: between two steps."""
        self.metrics = Metrics()
        self.emitted: dict[str, Emitted] = {}
        self._pace_s = pace_s
        self._lock = threading.Lock()
        self._running: list[PacedTicket] = []
        threading.Thread(target=self._run, name="paced", daemon=True).start()

    def answer(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        context_id: str = "",
        tenant: str = "",
        priority: int = 0,
        listener: Listener,
    ) -> PacedTicket:
        ticket = PacedTicket(sampling, listener)
        with self._lock:
            self.emitted[ticket.request_id] = ticket.emitted
            self._running.append(ticket)
        return ticket

    def _run(self) -> None:
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + self._pace_s, time.monotonic())  # a late step is not made up for
            time.sleep(max(0.0, next_s - time.monotonic()))
            with self._lock:
                step = list(self._running)
            now = time.monotonic()
            for ticket in step:
                ticket.emitted.tokens_s.append(now)
                events: list[Event] = [_token(ticket)]
                ticket.listener(events)
            with self._lock:
                self._running = [one for one in self._running if not (one.left or _ended(one))]


def _ended(ticket: PacedTicket) -> bool:
    return len(ticket.emitted.tokens_s) >= ticket.wanted


def _token(ticket: PacedTicket) -> TokenEvent:
    index = len(ticket.emitted.tokens_s) - 1
    return TokenEvent(index % VOCABULARY, index, "length" if _ended(ticket) else None)


def serve_paced(pace_s: float, pipe: Connection) -> None:
    """The process: sends its port, serves until the pipe says so, sends `Told`."""
    from ringspan.deploy.serve.app import build_app
    from ringspan.deploy.serve.auth import ApiKeys
    from ringspan.deploy.serve.limits import HttpLimits
    from ringspan.deploy.serve.listening import BACKLOG, bound, server_for
    from ringspan.deploy.serve.state import ServeState
    from ringspan.deploy.serve.texts import Texts

    service = PacedService(pace_s)
    state = ServeState(
        service=cast("Service", service),
        texts=Texts(ModelSpec(name="random:tiny"), VOCABULARY, POSITIONS),
        model_name=MODEL,
        keys=ApiKeys(None, {}),
        limits=HttpLimits(),
    )
    with bound("127.0.0.1", 0) as listening:
        server = server_for(build_app(state), drain_s=DRAIN_S, log_level="error")

        def end() -> None:
            try:
                pipe.recv()
                pipe.send(Told(service.emitted, time.process_time() - began_s))
            except (EOFError, OSError):  # whoever measured is gone: nobody wants to know
                pass
            server.should_exit = True

        listening.listen(BACKLOG)  # clients may come before the server has started: they wait
        began_s = time.process_time()
        pipe.send(listening.getsockname()[1])
        threading.Thread(target=end, name="pipe", daemon=True).start()
        server.run(sockets=[listening])
