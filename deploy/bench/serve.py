"""What an OpenAI-compatible endpoint takes for a first and for a further question on a document.

Only what a client sees: streams of `/v1/completions`, over HTTP, from this process. So ours and any
other endpoint are measured by the same code. Each round begins with a line that no round before
had, so that its first question meets no cache; the following ones differ behind the document only.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import msgspec

from ringspan.deploy.machine import Hardware, hardware, versions
from ringspan.errors import BadInput, RingspanError

TIMEOUT_S = 3600.0
QUESTIONS = (
    "What is this document about?",
    "Which name occurs most often above?",
    "Summarise the first part in one sentence.",
    "What would you ask its author?",
    "Which part is the hardest to follow?",
    "What is said at the very end?",
    "Which of its claims can be checked?",
    "Give it another title.",
)


class Endpoint(NamedTuple):
    """Where to ask. url: up to and without `/v1`; model: as its `/v1/models` says."""

    name: str
    url: SplitResult
    model: str
    key: str = ""


class Heard(NamedTuple):
    """One streamed answer. Times since the request was sent."""

    first_s: float
    """Until the first text."""
    whole_s: float
    tokens: int
    """By the endpoint's usage, or events with text where it gives none."""
    prompt_tokens: int
    cached_tokens: int


class Spread(msgspec.Struct, frozen=True):
    median: float
    min: float
    max: float


class ServeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint on one document."""

    benchmark: str = "serve"
    endpoint: str
    model: str
    prompt_tokens: int
    """0 where the endpoint does not say."""
    cached_tokens: int
    """Of a further question's prompt, by the endpoint's word."""
    answer_tokens: int
    rounds: int
    cold_first_token_s: Spread
    warm_first_token_s: Spread
    tokens_per_s: dict[str, Spread]
    """By streams at once: tokens of all answers over the time from the first request to the last
    token, on a document that was asked before."""
    token_s: Spread
    """Between two tokens of an answer alone."""
    command: str
    versions: dict[str, str]
    hardware: Hardware
    """Of the client; it is the endpoint's where the address is this machine's."""

    @property
    def warm_ratio(self) -> float:
        return self.warm_first_token_s.median / self.cold_first_token_s.median


def endpoint(name: str, url: str, key: str = "") -> Endpoint:
    """BadInput where nothing answers there, or it is no endpoint of this kind."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{url}: wanted http://HOST:PORT, without /v1")
    asked = Endpoint(name, parts, "", key)
    try:
        status, body = _get(asked, "/v1/models")
        model = msgspec.json.decode(body)["data"][0]["id"] if status == 200 else None
    except OSError as error:
        raise BadInput(f"{url} does not answer ({error}); start the endpoint first") from None
    except (msgspec.DecodeError, KeyError, IndexError, TypeError):
        model = None
    if not isinstance(model, str):
        raise BadInput(f"{url}/v1/models answered {status} and names no model; wanted 200 and one")
    return asked._replace(model=model)


def bench_serve(
    asked: Endpoint,
    document: str,
    *,
    streams: Sequence[int],
    answer_tokens: int,
    rounds: int,
    command: str,
    say: Callable[[str], None],
) -> ServeRow:
    """streams: numbers of questions at once, each at most `len(QUESTIONS)`. RingspanError when
    an answer fails or stays empty."""
    cold, warm, between = [], [], []
    rates: dict[int, list[float]] = {count: [] for count in streams}
    last: Heard | None = None
    for number in range(rounds):
        text = f"Copy {time.time_ns()} of the document.\n\n{document}"
        first = _ask(asked, text, QUESTIONS[0], answer_tokens)
        cold.append(first.first_s)
        last = _ask(asked, text, QUESTIONS[1], answer_tokens)
        warm.append(last.first_s)
        if last.tokens > 1:
            between.append((last.whole_s - last.first_s) / (last.tokens - 1))
        for count in streams:
            rates[count].append(_together(asked, text, count, answer_tokens))
        say(
            f"{asked.name}, round {number + 1} of {rounds}: first token {cold[-1]:.2f} s cold, "
            f"{warm[-1]:.3f} s warm; "
            + ", ".join(f"{rates[count][-1]:.1f} tokens/s at {count}" for count in streams)
        )
    assert last is not None
    return ServeRow(
        endpoint=asked.name,
        model=asked.model,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        answer_tokens=answer_tokens,
        rounds=rounds,
        cold_first_token_s=_spread(cold),
        warm_first_token_s=_spread(warm),
        tokens_per_s={str(count): _spread(found) for count, found in rates.items()},
        token_s=_spread(between or [0.0]),
        command=command,
        versions=versions(),
        hardware=hardware(),
    )


def markdown(rows: Sequence[ServeRow]) -> str:
    """A table, an endpoint a row, and the commands beneath. rows: at least one."""
    counts = list(dict.fromkeys(count for row in rows for count in row.tokens_per_s))
    head = ["endpoint", "prompt tokens", "first token, cold", "first token, warm", "warm / cold"]
    head += [f"tokens/s at {count}" for count in counts] + ["between tokens"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        rates = [row.tokens_per_s.get(count) for count in counts]
        lines.append(
            [
                row.endpoint,
                f"{row.prompt_tokens:,}" if row.prompt_tokens else "not told",
                f"{row.cold_first_token_s.median:.2f} s",
                f"{row.warm_first_token_s.median:.3f} s",
                f"1/{1 / row.warm_ratio:.0f}" if row.warm_ratio else "0",
                *("" if rate is None else f"{rate.median:.1f}" for rate in rates),
                f"{row.token_s.median * 1e3:.1f} ms",
            ]
        )
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    commands = "\n".join(dict.fromkeys(f"`{row.command}`" for row in rows))
    first = rows[0]
    return (
        f"{table}\n\nMedians of {first.rounds}; answers of at most {first.answer_tokens} tokens, "
        f"greedy. {first.hardware.cpu}, {first.hardware.cores} cores.\n\n{commands}\n"
    )


def _together(asked: Endpoint, text: str, count: int, answer_tokens: int) -> float:
    """Tokens a second of so many answers at once."""
    ready = threading.Barrier(count + 1)

    def one(number: int) -> Heard:
        ready.wait()
        return _ask(asked, text, QUESTIONS[(number + 2) % len(QUESTIONS)], answer_tokens)

    with ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(one, number) for number in range(count)]
        ready.wait()
        began = time.perf_counter()
        tokens = sum(answer.result().tokens for answer in answers)
        return tokens / (time.perf_counter() - began)


def _ask(asked: Endpoint, document: str, question: str, answer_tokens: int) -> Heard:
    body = {
        "model": asked.model,
        "prompt": f"{document}\n\nQuestion: {question}\nAnswer:",
        "max_tokens": answer_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,  # where it is known: then answers are of one length
    }
    began = time.perf_counter()
    first_s = whole_s = 0.0
    pieces = 0
    usage: dict[str, Any] = {}
    for event in _events(asked, "/v1/completions", body):
        if "error" in event:
            raise RingspanError(f"{asked.name} failed in its answer: {event['error']}")
        if any(choice.get("text") for choice in event.get("choices") or ()):
            whole_s = time.perf_counter() - began
            first_s = first_s or whole_s
            pieces += 1
        usage = event.get("usage") or usage
    if not pieces:
        raise RingspanError(f"{asked.name} gave an empty answer; nothing can be timed with it")
    details = usage.get("prompt_tokens_details") or {}
    return Heard(
        first_s,
        whole_s,
        usage.get("completion_tokens") or pieces,
        usage.get("prompt_tokens") or 0,
        details.get("cached_tokens") or 0,
    )


def _events(asked: Endpoint, path: str, body: object) -> Iterator[dict[str, Any]]:
    connection = _connection(asked)
    try:
        sent = msgspec.json.encode(body)
        connection.request("POST", asked.url.path.rstrip("/") + path, sent, _headers(asked))
        reply = connection.getresponse()
        if reply.status != 200:
            said = reply.read(2000).decode(errors="replace")
            raise RingspanError(f"{asked.name} answered {reply.status} to {path}: {said}")
        for line in reply:
            if line.startswith(b"data: "):
                data = line[6:].strip()
                if data == b"[DONE]":
                    return
                yield msgspec.json.decode(data)
    finally:
        connection.close()


def _get(asked: Endpoint, path: str) -> tuple[int, bytes]:
    connection = _connection(asked)
    try:
        connection.request("GET", asked.url.path.rstrip("/") + path, headers=_headers(asked))
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def _connection(asked: Endpoint) -> http.client.HTTPConnection:
    secure = asked.url.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    return kind(asked.url.hostname or "", asked.url.port, timeout=TIMEOUT_S)


def _headers(asked: Endpoint) -> dict[str, str]:
    sent = {"Content-Type": "application/json"}
    return {**sent, "Authorization": f"Bearer {asked.key}"} if asked.key else sent


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))
