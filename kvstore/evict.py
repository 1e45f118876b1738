"""What goes first when room is short: decisions only, whoever owns the copies carries them out.

A copy is worth what it costs to have it again: to fetch it from the next tier if that has one, to
compute it otherwise. Attention makes later pages dearer: page i of a context attends over all
before it, so its cost grows with its position (`recompute_s`). Copies go in the order of

    value = cost_s * 2^(-age_s / half_life_s) / size_bytes               the smallest first

the cost of a page again, less the longer nobody used it, by the room that it takes (the family of
GreedyDual-Size, Cao and Irani, USENIX 1997). What is referred to or leased is no candidate. Of one
context a later page goes before an earlier one of equal value: what is left is a prefix, which
other contexts can begin with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ringspan.errors import BadInput, TooLarge

HALF_LIFE_S = 600.0
"""After which a page is worth half: the time between two questions of a person at work."""


class Candidate(NamedTuple):
    """A copy that could go."""

    key: str
    namespace: str
    position: int
    """Of its page in its context: 0 is the first."""
    size_bytes: int
    """That going frees."""
    recompute_s: float
    refetch_s: float | None
    """From the next tier; None where no other copy is."""
    last_used_s: float
    """On the clock that `now_s` is on."""
    in_use: int = 0
    """References and leases."""

    @property
    def cost_s(self) -> float:
        """To have it again."""
        if self.refetch_s is None:
            return self.recompute_s
        return min(self.recompute_s, self.refetch_s)


class Quota(NamedTuple):
    """What a namespace may have in a tier."""

    namespace: str
    limit_bytes: int


def recompute_s(
    position: int,
    page_tokens: int,
    *,
    linear_flops_per_token: float,
    attention_flops_per_pair: float,
    flops_per_s: float,
) -> float:
    """Seconds to compute page `position` again against the pages before it.

    tokens * linear + (tokens * past + tokens * (tokens + 1) / 2) * pair, past = position * tokens:
    each token of the page attends over all pages before its own and, on average, half of its own.
    linear_flops_per_token: `ModelFacts.flops_per_token`; attention_flops_per_pair: over all layers
    and heads of one query and one key, 4 * D * Hq * L; flops_per_s: achieved, of the whole gang.
    """
    if flops_per_s <= 0:
        raise ValueError(f"flops_per_s {flops_per_s}: wanted more than 0")
    tokens = page_tokens
    pairs = tokens * tokens * position + tokens * (tokens + 1) // 2
    return (tokens * linear_flops_per_token + pairs * attention_flops_per_pair) / flops_per_s


def value(candidate: Candidate, now_s: float, half_life_s: float = HALF_LIFE_S) -> float:
    """Seconds per byte that a copy is worth now; see the module."""
    age_s = max(now_s - candidate.last_used_s, 0.0)
    worth_s = candidate.cost_s * 2.0 ** -min(age_s / half_life_s, 1000.0)
    return worth_s / max(candidate.size_bytes, 1)


def log2_value(candidate: Candidate, now_s: float, half_life_s: float = HALF_LIFE_S) -> float:
    """Of `value`, which is 0 for whatever nobody used for a week: here it is still told apart."""
    if candidate.cost_s <= 0:
        return -math.inf
    age_s = max(now_s - candidate.last_used_s, 0.0)
    return (
        math.log2(candidate.cost_s) - math.log2(max(candidate.size_bytes, 1)) - age_s / half_life_s
    )


def eviction_order(
    candidates: Iterable[Candidate], now_s: float, half_life_s: float = HALF_LIFE_S
) -> list[Candidate]:
    """Those that may go, the first to go first. The same candidates in any order give one list."""
    free = [candidate for candidate in candidates if not candidate.in_use]
    return sorted(free, key=lambda c: (log2_value(c, now_s, half_life_s), -c.position, c.key))


def victims(
    candidates: Iterable[Candidate],
    need_bytes: int,
    now_s: float,
    half_life_s: float = HALF_LIFE_S,
) -> list[Candidate]:
    """The first of `eviction_order` that free `need_bytes`; none if nothing is needed. TooLarge
    when all together do not, and then nothing goes."""
    if need_bytes <= 0:
        return []
    candidates = list(candidates)
    going: list[Candidate] = []
    freed = 0
    for candidate in eviction_order(candidates, now_s, half_life_s):
        going.append(candidate)
        freed += candidate.size_bytes
        if freed >= need_bytes:
            return going
    kept = sum(candidate.size_bytes for candidate in candidates if candidate.in_use)
    raise TooLarge(
        f"{need_bytes} bytes are to be freed, {freed} can be: {kept} bytes are in use; end "
        "sessions, drop contexts or give the tier more room"
    )


def over_quota(
    used_bytes: Mapping[str, int], quotas: Iterable[Quota], coming: Mapping[str, int] | None = None
) -> dict[str, int]:
    """By namespace, the bytes that it must free of its own to stay within its quota once `coming`
    bytes of it have come. A namespace without a quota is bounded by the tier alone. BadInput where
    what comes is more than the whole quota: nothing that goes would make room for it."""
    coming = coming or {}
    over: dict[str, int] = {}
    for namespace, limit_bytes in quotas:
        new = coming.get(namespace, 0)
        if new > limit_bytes:
            raise BadInput(
                f"{new} bytes are more than the quota of {limit_bytes} bytes: ask for a larger "
                "one, or for a codec with fewer bits"
            )
        excess = used_bytes.get(namespace, 0) + new - limit_bytes
        if excess > 0:
            over[namespace] = excess
    return over


def quota_victims(
    candidates: Iterable[Candidate],
    over: Mapping[str, int],
    now_s: float,
    half_life_s: float = HALF_LIFE_S,
) -> list[Candidate]:
    """For each namespace that must free bytes (`over_quota`) its own first to go: one tenant never
    pushes another's pages out by his own excess."""
    candidates = list(candidates)
    return [
        victim
        for namespace in sorted(over)
        for victim in victims(
            (c for c in candidates if c.namespace == namespace), over[namespace], now_s, half_life_s
        )
    ]
