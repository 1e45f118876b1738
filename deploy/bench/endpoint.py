"""What the endpoint adds to its engine: milliseconds a request, and milliseconds a token.

The real HTTP application in a process of its own, over an engine that emits at a fixed pace
(`endpoint_server`); streaming clients in this process. Both note times of one clock:

    request  sent -> service asked, and first token handed over -> read by the client
    token    (last read - first read) over the tokens between, less the pace asked for: what an
             answer falls behind, an engine that the endpoint holds up included
    lag      each token: handed over -> read

The clients' own work is in all of them, so they are upper bounds.
"""

from __future__ import annotations

import http.client
import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles
from typing import NamedTuple

import msgspec

from ringspan.deploy.bench.endpoint_server import MODEL, Emitted, Told, serve_paced
from ringspan.deploy.machine import Hardware, hardware, versions
from ringspan.errors import RingspanError

REQUEST_TARGET_MS = 30.0
TOKEN_TARGET_MS = 1.0
START_TIMEOUT_S = 120.0
TIMEOUT_S = 120.0


class Read(NamedTuple):
    """One answer, as its client saw it."""

    request_id: str
    sent_s: float
    tokens_s: list[float]


class Times(msgspec.Struct, frozen=True):
    """Milliseconds, over all requests or tokens."""

    median: float
    p99: float
    max: float


class EndpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    benchmark: str = "endpoint"
    streams: int
    """At once."""
    requests: int
    tokens: int
    """Of one answer."""
    prompt_tokens: int
    pace_ms: float
    """Between two steps of the engine."""
    request_ms: Times
    token_ms: Times
    lag_ms: Times
    cpu_ms_a_token: float
    """Of the server's process, requests' parsing included."""
    command: str
    versions: dict[str, str]
    hardware: Hardware

    @property
    def met(self) -> bool:
        return (
            self.request_ms.median <= REQUEST_TARGET_MS and self.token_ms.median <= TOKEN_TARGET_MS
        )


def bench_endpoint(
    streams: int, tokens: int, prompt_tokens: int, pace_s: float, rounds: int, command: str
) -> EndpointRow:
    """rounds of so many streams at once, after one that is not counted. RingspanError where the
    server does not start, or an answer is not whole."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve_paced, args=(pace_s, there), name="paced-server")
    server.start()
    there.close()
    try:
        if not here.poll(START_TIMEOUT_S):
            raise RingspanError(f"the server does not listen after {START_TIMEOUT_S:.0f} s")
        try:
            port = here.recv()
            _round(port, streams, tokens, prompt_tokens)
            reads = [
                read for _ in range(rounds) for read in _round(port, streams, tokens, prompt_tokens)
            ]
            here.send("end")
            told: Told = here.recv()
        except EOFError:
            raise RingspanError("the server's process ended before it was told to") from None
        server.join(TIMEOUT_S)
    finally:
        here.close()
        if server.is_alive():
            server.terminate()
            server.join()
    pairs = [(read, told.emitted[read.request_id]) for read in reads]
    return EndpointRow(
        streams=streams,
        requests=len(reads),
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        pace_ms=pace_s * 1e3,
        request_ms=_times([_request_s(*pair) for pair in pairs]),
        token_ms=_times([_token_s(read, pace_s) for read in reads]),
        lag_ms=_times([lag for pair in pairs for lag in _lags_s(*pair)]),
        cpu_ms_a_token=told.cpu_s * 1e3 / sum(len(one.tokens_s) for one in told.emitted.values()),
        command=command,
        versions=versions(),
        hardware=hardware(),
    )


def markdown(row: EndpointRow) -> str:
    """The measures, and the targets beside them."""
    lines = [
        ("ms a request", row.request_ms, f"{REQUEST_TARGET_MS:g}"),
        ("ms a token behind the pace", row.token_ms, f"{TOKEN_TARGET_MS:g}"),
        ("ms from engine to client, a token", row.lag_ms, ""),
    ]
    table = "\n".join(
        f"| {name} | {' | '.join(map(_two_places, msgspec.structs.astuple(times)))} | {target} |"
        for name, times, target in lines
    )
    return (
        "| what the endpoint adds | median | 99th percentile | largest | target of the median |\n"
        f"| --- | ---: | ---: | ---: | ---: |\n{table}\n\n"
        f"{row.streams} streams at once, {row.requests} requests of {row.prompt_tokens} token ids, "
        f"answers of {row.tokens} tokens, a step every {row.pace_ms:g} ms; the server's process "
        f"took {row.cpu_ms_a_token:.2f} ms of CPU time a token. {row.hardware.cpu}, "
        f"{row.hardware.cores} cores.\n\n`{row.command}`\n"
    )


def _request_s(read: Read, emitted: Emitted) -> float:
    return emitted.asked_s - read.sent_s + read.tokens_s[0] - emitted.tokens_s[0]


def _token_s(read: Read, pace_s: float) -> float:
    return (read.tokens_s[-1] - read.tokens_s[0]) / (len(read.tokens_s) - 1) - pace_s


def _lags_s(read: Read, emitted: Emitted) -> list[float]:
    return [heard - handed for heard, handed in zip(read.tokens_s, emitted.tokens_s, strict=True)]


def _two_places(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # adding 0 makes 0 of -0


def _times(seconds: Sequence[float]) -> Times:
    ordered = sorted(one * 1e3 for one in seconds)
    p99 = quantiles(ordered, n=100, method="inclusive")[98] if len(ordered) > 1 else ordered[0]
    return Times(median(ordered), p99, ordered[-1])


def _round(port: int, streams: int, tokens: int, prompt_tokens: int) -> list[Read]:
    ready = threading.Barrier(streams)

    def one(number: int) -> Read:
        ready.wait(TIMEOUT_S)
        return _ask(port, tokens, prompt_tokens)

    with ThreadPoolExecutor(streams) as pool:
        return list(pool.map(one, range(streams)))


def _ask(port: int, tokens: int, prompt_tokens: int) -> Read:
    body = msgspec.json.encode(
        {
            "model": MODEL,
            "prompt": [1] * prompt_tokens,
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        sent_s = time.monotonic()
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RingspanError(f"the server answered {reply.status}: {reply.read(500)!r}")
        read = Read(reply.headers["x-request-id"], sent_s, [])
        for line in reply:
            if line.startswith(b"data: {") and b'"text"' in line:
                read.tokens_s.append(time.monotonic())
    finally:
        connection.close()
    if len(read.tokens_s) != tokens:
        raise RingspanError(
            f"an answer came in {len(read.tokens_s)} pieces, wanted {tokens}: one each token"
        )
    return read
