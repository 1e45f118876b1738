"""How each range of lost pages is best had again: by which road, in how many seconds. Pure.

    fetch       bytes / the road's rate
    parity      bytes * pages of the stripe / the rate that these are read by
    recompute   FLOP of the range / the gang's rate, and once the survivors' bytes / their rate

Ranges are pages that follow each other and can be had by the same roads. The survivors are read
once, whatever is recomputed; so ranges go to recomputation together, if that is faster in all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ringspan.types import Span

RECOMPUTE = "recompute"


class LostRange(NamedTuple):
    """Pages that are damaged where they lie."""

    span: Span
    payload_bytes: int
    copies: tuple[str, ...]
    """Roads that have a copy, `disk` or `remote` say."""
    stripe_pages: int = 0
    """Of the stripes that bring it back, parity counted; 0: none does."""


class RepairRates(NamedTuple):
    """What is known of speeds; a road that is not here is as fast as `read_bytes_s`."""

    read_bytes_s: float
    roads: Mapping[str, float] = {}
    flops_s: float | None = None
    """Of the gang; None: not known, so recomputation comes last."""


class Choice(NamedTuple):
    """What is to be done about a range."""

    span: Span
    road: str
    """Of `kvstore.supply`, or RECOMPUTE."""
    seconds: float | None
    """None where the rate is not known."""
    others: tuple[tuple[str, float | None], ...]
    """(road, seconds) of what could be done instead, the best first."""


def plan_repairs(
    lost: Sequence[LostRange],
    rates: RepairRates,
    flops: Callable[[Span], float],
    survivors_bytes: int,
    parity_road: str = "parity",
) -> tuple[Choice, ...]:
    """For each range the road of fewest predicted seconds. flops: of computing a range again."""
    read = [_by_reading(one, rates, parity_road) for one in lost]
    computed = [flops(one.span) / rates.flops_s if rates.flops_s else None for one in lost]
    gain = _gain(read, computed)
    pays = gain > survivors_bytes / rates.read_bytes_s
    choices = []
    for one, roads, seconds in zip(lost, read, computed, strict=True):
        best = roads[0][1] if roads else None
        first = best is None or (pays and seconds is not None and seconds < best)
        again: tuple[str, float | None] = (RECOMPUTE, seconds)
        ranked = (again, *roads) if first else (*roads, again)
        road, taken = ranked[0]
        choices.append(Choice(one.span, road, taken, tuple(ranked[1:])))
    return tuple(choices)


def explain(choices: Sequence[Choice]) -> str:
    """One line a range, for a person."""
    return "\n".join(
        f"pages [{choice.span.start}, {choice.span.stop}): {choice.road}, {_words(choice.seconds)}"
        + "".join(f"; {road} {_words(seconds)}" for road, seconds in choice.others)
        for choice in choices
    )


def joined(lost: Sequence[LostRange]) -> list[LostRange]:
    """Pages in position order -> ranges."""
    found: list[LostRange] = []
    for one in lost:
        last = found[-1] if found else None
        alike = last is not None and (last.copies, last.stripe_pages) == one[2:]
        if last is not None and alike and last.span.stop == one.span.start:
            found[-1] = last._replace(
                span=Span(last.span.start, one.span.stop),
                payload_bytes=last.payload_bytes + one.payload_bytes,
            )
        else:
            found.append(one)
    return found


def _by_reading(
    one: LostRange, rates: RepairRates, parity_road: str
) -> list[tuple[str, float | None]]:
    """(road, seconds), the fastest first."""
    ways = [
        (road, one.payload_bytes / rates.roads.get(road, rates.read_bytes_s)) for road in one.copies
    ]
    if one.stripe_pages:
        rate = rates.roads.get(parity_road, rates.read_bytes_s)
        ways.append((parity_road, one.payload_bytes * one.stripe_pages / rate))
    return [(road, seconds) for road, seconds in sorted(ways, key=lambda way: way[1])]


def _gain(
    read: Sequence[Sequence[tuple[str, float | None]]], computed: Sequence[float | None]
) -> float:
    """Seconds that recomputing saves over reading, where it saves any; endless where something must
    be recomputed anyway, so that the survivors are read in any case."""
    gain = 0.0
    for roads, seconds in zip(read, computed, strict=True):
        if not roads:
            return float("inf")
        best = roads[0][1]
        if seconds is not None and best is not None:
            gain += max(0.0, best - seconds)
    return gain


def _words(seconds: float | None) -> str:
    return "not predicted" if seconds is None else f"{seconds:.3g} s"
