"""Rows of `bench store` as lines, a Markdown table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ringspan.deploy.bench.plots import DPI, HEIGHT, WIDTH, check_matplotlib
from ringspan.deploy.bench.store import SAVED, StoreRow

HEAD = (
    "what", "GB/s", "ms", "min to max", "against", "GB/s", "ratio", "min to max", "at least", "",
)  # fmt: skip
LEFT = {"what", "against", "min to max", ""}


def append(row: StoreRow, path: Path) -> None:
    """One JSON row a line."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")


def line(row: StoreRow) -> str:
    """One row as it comes."""
    text = f"{row.what}: {row.gb_per_s:.2f} GB/s, {row.seconds.median * 1e3:.1f} ms"
    if row.ratio is None or row.against_seconds is None:
        return text
    theirs = row.payload_bytes / row.against_seconds.median / 1e9
    target = f", wanted {row.target:g}" if row.target else ""
    return (
        f"{text}; {row.ratio.median:.2f} ({row.ratio.min:.2f} to {row.ratio.max:.2f}) x "
        f"{row.against} ({theirs:.2f} GB/s){target}" + (f"; {row.note}" if row.note else "")
    )


def plain(rows: Sequence[StoreRow]) -> str:
    """For a terminal. rows: at least one."""
    lines = [_cells(row) for row in rows]
    widths = [max(len(cells[i]) for cells in (HEAD, *lines)) for i in range(len(HEAD))]

    def joined(cells: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if name in LEFT else text.rjust(width)
            for text, width, name in zip(cells, widths, HEAD, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(joined(cells) for cells in (HEAD, *lines))


def markdown(rows: Sequence[StoreRow]) -> str:
    """With the machine, the versions and the command beneath. rows: at least one."""
    text = [HEAD, tuple("---" if name in LEFT else "---:" for name in HEAD), *map(_cells, rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in text)
    return f"{table}\n\n{described(rows)}\n\n`{rows[0].command}`\n"


def described(rows: Sequence[StoreRow]) -> str:
    """What was moved and where, in a few sentences."""
    first = rows[0]
    case, machine = first.case, first.hardware
    wanted = ("ringspan", "commit", "torch", "python")
    known = ", ".join(f"{name} {first.versions[name]}" for name in wanted if name in first.versions)
    devices = " and ".join(dict.fromkeys(row.device for row in rows if row.device != "cpu"))
    device = f", {devices}" if devices else ""
    return (
        f"{case.text}: {case.pages} x {first.page_bytes / 2**20:.2f} MiB. Medians of "
        f"{case.repeats}, in turn; a ratio is our rate over theirs, pair by pair. Ours with "
        f"checksums throughout. {machine.cpu}, {machine.cores} cores{device}; {known}."
    )


def draw(rows: Sequence[StoreRow], folder: Path) -> Path:
    """Rates as bars, ours above what it is compared with. Raises BadInput where matplotlib is
    missing. rows: at least one."""
    check_matplotlib()
    from matplotlib.figure import Figure

    bars: list[tuple[str, float, str]] = []
    for row in rows:
        if row.what == SAVED:
            continue  # the rate of a model, not of the store
        if not any(label == row.what for label, _, _ in bars):
            bars.append((row.what, row.gb_per_s, "C0"))
        if row.against_seconds is not None:
            rate = row.payload_bytes / row.against_seconds.median / 1e9
            bars.append((f"{row.against}  ", rate, "C7"))
    height = max(HEIGHT, 0.32 * len(bars) + 1.2)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(bars))
    drawn = axes.barh(places, [rate for _, rate, _ in bars], color=[color for _, _, color in bars])
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.set_yticks(places, [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of payload; blue: ringspan, checksums on; grey: beside it, as it comes")
    axes.grid(True, axis="x", alpha=0.25)
    machine = rows[0].hardware
    axes.set_title(f"{rows[0].case.text}; {machine.cpu}, {machine.cores} cores", fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "store_rates.png"
    figure.savefig(path)
    return path


def _cells(row: StoreRow) -> tuple[str, ...]:
    theirs = row.against_seconds
    ratio = row.ratio
    return (
        row.what,
        f"{row.gb_per_s:.2f}",
        f"{row.seconds.median * 1e3:.1f}",
        f"{row.seconds.min * 1e3:.1f} to {row.seconds.max * 1e3:.1f}",
        row.against,
        f"{row.payload_bytes / theirs.median / 1e9:.2f}" if theirs else "",
        f"{ratio.median:.2f}" if ratio else "",
        f"{ratio.min:.2f} to {ratio.max:.2f}" if ratio else "",
        f"{row.target:g}" if row.target else "",
        row.note,
    )
