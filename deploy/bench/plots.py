"""Plots of what `ringspan bench` wrote: time over tokens, efficiency over ranks, exposed exchanges.

    ringspan bench plot rows.jsonl --to plots/

Reads the JSON rows of `bench attention` and `bench prefill` and writes PNG files. matplotlib is an
extra of the package: pip install ringspan[plots].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ringspan.errors import BadInput

WIDTH, HEIGHT, DPI = 10.0, 5.0, 130
MARKS = "osD^vPX*"
SHORTEST_S = 1e-9
"""For axes in powers of ten."""


class Point(NamedTuple):
    """One row, as a plot sees it."""

    benchmark: str
    series: str
    """The scheme and how its ranks talk."""
    setting: str
    """What else sets the row apart: the cached tokens."""
    tokens: int
    ranks: int
    seconds: float
    ideal_s: float | None
    """What perfect distribution would take; None where the row has nothing to compare with."""
    devices: int
    exposed_s: tuple[float, ...]
    machine: str


class Plot(NamedTuple):
    name: str
    draw: Callable[[Any, Sequence[Point]], bool]
    """Onto axes; False if the points have nothing of the kind."""


def draw_plots(points: Sequence[Point], folder: Path) -> list[Path]:
    """One file for each benchmark and kind of plot that the points have something for, in `folder`,
    which is made. Raises BadInput where matplotlib is missing."""
    figure_class = _figure_class()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for benchmark in dict.fromkeys(point.benchmark for point in points):
        own = [point for point in points if point.benchmark == benchmark]
        for plot in PLOTS:
            figure = figure_class(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
            axes = figure.add_subplot()
            if plot.draw(axes, own):
                machines = " | ".join(dict.fromkeys(point.machine for point in own))
                axes.set_title(machines, fontsize=9, wrap=True)
                figure.legend(loc="outside right upper", fontsize=8)
                path = folder / f"{benchmark}_{plot.name}.png"
                figure.savefig(path)
                written.append(path)
    return written


def check_matplotlib() -> None:
    """BadInput, before anything is measured, where plots could not be drawn."""
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401 - no display
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput(
            f"plots want matplotlib, which cannot be imported ({error}): pip install "
            "'ringspan[plots]', or leave the plots out"
        ) from None
    return Figure


def _time_over_tokens(axes: Any, points: Sequence[Point]) -> bool:
    """The measured time of each scheme and number of ranks, over the ideal in grey."""
    for line in _lines(points, lambda p: (p.series + p.setting, p.ranks), lambda p: p.tokens):
        axes.plot(
            [p.tokens for p in line.points],
            [max(p.seconds, SHORTEST_S) for p in line.points],
            marker=line.mark,
            color=line.color,
            label=f"{line.name}, {line.number} rank{'s' * (line.number != 1)}",
        )
    label: str | None = "one kernel / devices"
    for devices, setting in sorted({(p.devices, p.setting) for p in points}):
        of_both = [p for p in points if (p.devices, p.setting) == (devices, setting)]
        best = {p.tokens: p.ideal_s for p in of_both if p.ideal_s}
        if best:
            axes.plot(*zip(*sorted(best.items()), strict=True), "--", color="0.6", label=label)
            label = None
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time (s), median")
    _token_ticks(axes, sorted({p.tokens for p in points}))
    axes.grid(True, which="both", alpha=0.25)
    return True


def _efficiency_over_ranks(axes: Any, points: Sequence[Point]) -> bool:
    """The ideal over the time; where rows have no ideal, the smallest number of ranks is it."""
    drawn = False
    for line in _lines(points, lambda p: (p.series + p.setting, p.tokens), lambda p: p.ranks):
        first = line.points[0]
        shares = []
        for point in line.points:
            ideal_s = point.ideal_s or first.seconds * first.devices / point.devices
            shares.append(100 * ideal_s / point.seconds)
        if len(line.points) > 1 or first.ideal_s is not None:
            label = f"{line.name}, {_short(line.number)}"
            ranks = [p.ranks for p in line.points]
            axes.plot(ranks, shares, marker=line.mark, color=line.color, label=label)
            drawn = True
    axes.axhline(100, color="0.6", linestyle="--")
    axes.set(xlabel="ranks", ylabel="ideal time / time (%)")
    axes.set_xscale("log", base=2)
    _rank_ticks(axes, sorted({p.ranks for p in points}))
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.25)
    return drawn


def _exposed_by_step(axes: Any, points: Sequence[Point]) -> bool:
    """For each scheme at the largest case it has: the wait before each of its steps."""
    largest: dict[str, Point] = {}
    for point in points:
        if any(point.exposed_s):
            name = point.series + point.setting
            known = largest.get(name)
            if known is None or (point.ranks, point.tokens) > (known.ranks, known.tokens):
                largest[name] = point
    width = 0.8 / max(1, len(largest))
    for index, (name, point) in enumerate(largest.items()):
        offset = (index - (len(largest) - 1) / 2) * width
        share = 100 * sum(point.exposed_s) / point.seconds
        axes.bar(
            [step + offset for step in range(len(point.exposed_s))],
            [1e3 * seconds for seconds in point.exposed_s],
            width,
            label=f"{name}, {_short(point.tokens)}, {point.ranks} ranks: {share:.1f} % of time",
        )
    steps = max((len(point.exposed_s) for point in largest.values()), default=0)
    axes.set(xlabel="step of the scheme", ylabel="exposed exchange (ms)")
    axes.set_xticks(range(steps))
    axes.grid(True, axis="y", alpha=0.25)
    return bool(largest)


PLOTS = (
    Plot("time_over_tokens", _time_over_tokens),
    Plot("efficiency_over_ranks", _efficiency_over_ranks),
    Plot("exposed_by_step", _exposed_by_step),
)


class _Line(NamedTuple):
    """Points of one series at one number of ranks or tokens: a colour a series, a mark a number."""

    name: str
    number: int
    color: str
    mark: str
    points: list[Point]


def _lines(
    points: Iterable[Point],
    line: Callable[[Point], tuple[str, int]],
    order: Callable[[Point], int],
) -> list[_Line]:
    found: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        found.setdefault(line(point), []).append(point)
    names = sorted({name for name, _ in found})
    numbers = sorted({number for _, number in found})
    return [
        _Line(
            name,
            number,
            f"C{names.index(name) % 10}",
            MARKS[numbers.index(number) % len(MARKS)],
            sorted(found[name, number], key=order),
        )
        for name, number in sorted(found)
    ]


def _token_ticks(axes: Any, tokens: Sequence[int]) -> None:
    axes.set_xticks([], minor=True)
    axes.set_xticks(tokens, [_short(count) for count in tokens])


def _rank_ticks(axes: Any, ranks: Sequence[int]) -> None:
    axes.set_xticks(ranks, [str(count) for count in ranks])


def _short(tokens: int) -> str:
    for size, name in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size} {name}"
    return f"{tokens:,}"
