"""Requests to simulate: drawn from documented distributions, or read from a JSONL file.

arrivals       Poisson; the rate swings over a day by `swing` around its mean
sequences      every `turns` requests a new one begins; a request goes to one of the `live` last
               ones, the k-th last 1 / k as likely (Zipf)
prefix         of a document log-normal, median 24,000, sigma 1.3, cut to 1,000 .. 900,000: a mean
               near 56,000 tokens
new tokens     exponential, the mean a ninth of the request's prefix: 90 % of all tokens are in
               shared prefixes
conversations  every other sequence: what was asked and answered is the next request's prefix
output         log-normal, median 200, sigma 0.8, cut to 1 .. 4,000: a mean near 280 tokens
first token    within 3 s up to 32,000 tokens of prompt, 10 s up to 256,000, 60 s beyond; what would
               come later is refused
fidelity       half of the requests accept 8 bits

The shape follows what llm-d published of 219 coding sessions: long prefixes that 96 % of the turns
reuse, few new tokens, some hundred tokens of output. One seed, one trace.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ringspan.cluster.placing_types import Request
from ringspan.errors import BadInput

DAY_S = 86_400.0
LIMITS_S = ((32_000, 3.0), (256_000, 10.0), (1 << 62, 60.0))
"""(tokens of the prompt up to which, limit of the first token)."""
MEDIAN_PREFIX, SIGMA_PREFIX = 24_000, 1.3
LEAST_PREFIX, MOST_PREFIX, MOST_TOKENS = 1_000, 900_000, 1_000_000
MEDIAN_OUTPUT, SIGMA_OUTPUT, MOST_OUTPUT = 200, 0.8, 4_000
PATIENCE = 1.0
"""Of the limit of the first token: what would come later is refused (early rejection)."""


class Trace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is drawn."""

    requests: int
    rate: float
    """Requests a second, in the mean."""
    seed: int = 0
    swing: float = 0.5
    new_share: float = 0.1
    turns: int = 20
    live: int = 2000
    tpot_s: float = 0.05
    page_tokens: int = 128


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a JSONL trace; what is left out takes the generated trace's rules."""

    arrival_s: float
    new_tokens: int
    output_tokens: int
    prefix_id: str = ""
    prefix_tokens: int = 0
    keeps: bool = False
    ttft_s: float | None = None
    tpot_s: float | None = None
    priority: int = 0
    lowest_bits: int = 16
    patience_s: float | None = None


def drawn(trace: Trace) -> Iterator[Request]:
    """The same requests for the same trace, in order of arrival."""
    if trace.requests < 1 or not trace.rate > 0:
        raise BadInput(
            f"--requests {trace.requests}, --rate {trace.rate:g}: wanted at least 1 and more than 0"
        )
    if not 0 < trace.new_share <= 1 or not 0 <= trace.swing < 1:
        raise BadInput(
            f"--new-share {trace.new_share:g}, --swing {trace.swing:g}: wanted 0 < share <= 1 and"
            " 0 <= swing < 1"
        )
    rng = random.Random(trace.seed)
    zipf = _Zipf(trace.live)
    lengths: dict[int, int] = {}
    now, page = 0.0, trace.page_tokens
    for number in range(trace.requests):
        rate = trace.rate * (1 + trace.swing * math.sin(2 * math.pi * now / DAY_S))
        now += rng.expovariate(rate)
        newest = number // trace.turns
        sequence = newest - min(zipf.rank(rng.random()), newest)
        if sequence not in lengths:
            drawn_tokens = rng.lognormvariate(math.log(MEDIAN_PREFIX), SIGMA_PREFIX)
            lengths[sequence] = int(min(max(drawn_tokens, LEAST_PREFIX), MOST_PREFIX))
            lengths.pop(sequence - 4 * trace.live, None)
        prefix = lengths[sequence] // page * page
        share = trace.new_share
        mean = max(prefix, LEAST_PREFIX) * share / (1 - share) if share < 1 else MEDIAN_PREFIX
        new = 1 + int(rng.expovariate(1 / mean))
        new = max(1, min(new, MOST_TOKENS - prefix))
        output = int(rng.lognormvariate(math.log(MEDIAN_OUTPUT), SIGMA_OUTPUT))
        output = max(1, min(output, MOST_OUTPUT))
        keeps = sequence % 2 == 1
        ttft_s = limit_s(prefix + new)
        yield Request(
            request_id=number,
            arrival_s=now,
            new_tokens=new,
            output_tokens=output,
            ttft_s=ttft_s,
            tpot_s=trace.tpot_s,
            prefix_id=f"s{sequence}",
            prefix_tokens=prefix,
            keeps=keeps,
            priority=0 if ttft_s > LIMITS_S[1][1] else 1,
            lowest_bits=8 if rng.random() < 0.5 else 16,
            patience_s=PATIENCE * ttft_s,
        )
        if keeps:
            grown = prefix + new + output
            lengths[sequence] = grown if grown < MOST_PREFIX else LEAST_PREFIX


def read_trace(path: Path) -> Iterator[Request]:
    """Of a JSONL file, ordered by arrival. Raises BadInput, with the line, for what is not."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; wanted a JSONL file of requests") from None
    decode = msgspec.json.Decoder(Line).decode
    before = 0.0
    for number, text in enumerate(lines):
        if not text.strip():
            continue
        try:
            line = decode(text)
        except msgspec.DecodeError as error:
            raise BadInput(f"{path}, line {number + 1} is no request: {error}") from None
        if line.arrival_s < before or line.new_tokens < 1 or line.prefix_tokens < 0:
            raise BadInput(
                f"{path}, line {number + 1}: arrival {line.arrival_s:g} s after {before:g} s,"
                f" {line.new_tokens} new and {line.prefix_tokens} prefix tokens: wanted ascending"
                " arrivals, at least 1 and at least 0"
            )
        before = line.arrival_s
        ttft_s = line.ttft_s or limit_s(line.prefix_tokens + line.new_tokens)
        yield Request(
            request_id=number,
            arrival_s=line.arrival_s,
            new_tokens=line.new_tokens,
            output_tokens=line.output_tokens,
            ttft_s=ttft_s,
            tpot_s=line.tpot_s or 0.05,
            prefix_id=line.prefix_id,
            prefix_tokens=line.prefix_tokens if line.prefix_id else 0,
            keeps=line.keeps and bool(line.prefix_id),
            priority=line.priority,
            lowest_bits=line.lowest_bits,
            patience_s=line.patience_s or PATIENCE * ttft_s,
        )


def limit_s(tokens: int) -> float:
    """Of the first token, by the prompt's length."""
    return next(limit for most, limit in LIMITS_S if tokens <= most)


class _Zipf:
    """Ranks 0 .. count - 1, the k-th 1 / (k + 1) as likely."""

    def __init__(self, count: int) -> None:
        self._sums: list[float] = []
        total = 0.0
        for rank in range(max(1, count)):
            total += 1 / (rank + 1)
            self._sums.append(total)

    def rank(self, uniform: float) -> int:
        return bisect_left(self._sums, uniform * self._sums[-1])
