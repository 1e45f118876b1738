"""Table and plot of what `ringspan simulate` found, a row a policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ringspan.cluster.simulate_runs import SimulateRow
from ringspan.deploy.bench.plots import DPI, HEIGHT, WIDTH, _figure_class

HEADS = (
    "policy", "goodput /s", "good", "refused", "late", "slow", "TTFT p50 s", "p99 s",
    "TPOT p50 ms", "p99 ms", "recomputed", "moved TB", "paused", "decision us", "p99 us",
)  # fmt: skip


def plain(rows: Sequence[SimulateRow], *, markdown: bool = False) -> str:
    """good: share of the requests that ended within both limits; recomputed: share of all computed
    tokens that had been computed before."""
    cells = [_cells(row) for row in rows]
    if markdown:
        lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
        return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in cells])
    widths = [max(len(line[k]) for line in (HEADS, *cells)) for k in range(len(HEADS))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in (HEADS, *cells)
    )


def draw(rows: Sequence[SimulateRow], folder: Path) -> Path:
    """Requests a second by what became of them: good, over a limit, refused. Raises BadInput where
    matplotlib is missing."""
    figure = _figure_class()(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    names = [row.policy for row in rows]
    below = [0.0] * len(rows)
    for label, color in (("good", "C2"), ("over a limit", "C1"), ("refused", "0.7")):
        values = []
        for row in rows:
            found = row.figures
            rate = found.goodput / max(found.good, 1)
            count = {"good": found.good, "refused": found.refused}.get(
                label, found.done - found.good
            )
            values.append(count * rate)
        axes.bar(names, values, bottom=below, label=label, color=color)
        below = [a + b for a, b in zip(below, values, strict=True)]
    setting = rows[0].setting
    axes.set(ylabel="requests a second")
    axes.set_title(
        f"{rows[0].model}, simulated: {setting.nodes} nodes of {setting.node_devices}"
        f" {setting.device_name}, {setting.trace.rate:g} requests a second",
        fontsize=9,
    )
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(True, axis="y", alpha=0.25)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "simulate_goodput.png"
    figure.savefig(path)
    return path


def _cells(row: SimulateRow) -> tuple[str, ...]:
    found = row.figures
    return (
        row.policy,
        f"{found.goodput:.2f}",
        f"{found.good_share:.1%}",
        f"{found.refused:,}",
        f"{found.late:,}",
        f"{found.slow:,}",
        f"{found.ttft_s[0]:.2f}",
        f"{found.ttft_s[2]:.1f}",
        f"{1e3 * found.tpot_s[0]:.1f}",
        f"{1e3 * found.tpot_s[2]:.1f}",
        f"{found.recomputed_tokens / max(found.computed_tokens, 1):.1%}",
        f"{found.moved_bytes / 1e12:.3g}",
        f"{found.preempted:,}",
        f"{1e6 * row.decision_mean_s:.0f}",
        f"{1e6 * row.decision_p99_s:.0f}",
    )
