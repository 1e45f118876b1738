"""Rows of one benchmark as a table: plain text for a terminal, Markdown for a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ringspan.deploy.bench.attention import AttentionRow, Spread
from ringspan.deploy.bench.case import AttentionCase
from ringspan.deploy.bench.prefill import Row as PrefillRow
from ringspan.deploy.bench.rows import BenchRow

HEAD = (
    "tokens", "cached", "ranks", "scheme", "transport", "ms", "min to max", "TFLOP/s", "kernel",
    "kernel ms", "time/ideal", "min to max", "time/floor", "exposed ms", "sent MiB", "error",
    "predicted ms",
)  # fmt: skip
PREFILL_HEAD = (
    "tokens", "ranks", "scheme", "layout", "transport", "s", "min to max", "tokens/s", "TFLOP/s",
    "transformers s", "time/transformers", "predicted s", "exposed s", "error",
)  # fmt: skip
LEFT = {"scheme", "layout", "transport", "kernel", "min to max"}


def attention_cells(row: AttentionRow) -> tuple[str, ...]:
    case = row.case
    return (
        f"{case.tokens:,}",
        f"{case.cached:,}" if case.cached else "",
        str(case.ranks),
        case.scheme,
        case.transport,
        _ms(row.seconds.median),
        f"{_ms(row.seconds.min)} to {_ms(row.seconds.max)}",
        _number(row.tflops_per_s),
        row.kernel,
        _ms(row.kernel_seconds.median),
        f"{row.ratio.median:.3f}",
        _range(row.ratio),
        f"{row.over_floor.median:.3f}" if row.over_floor else "",
        _ms(sum(row.exposed_s)) if row.exposed_s else "",
        f"{row.sent_bytes / 2**20:,.1f}",
        f"{row.relative_error:.1e}",
        "" if row.predicted_s is None else _ms(row.predicted_s),
    )


def plain(rows: Sequence[BenchRow]) -> str:
    """Columns that nothing stands in are left out."""
    head, lines = _filled(rows)
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def joined(line: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if name in LEFT else text.rjust(width)
            for text, width, name in zip(line, widths, head, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(joined(line) for line in (head, *lines))


def markdown(rows: Sequence[BenchRow]) -> str:
    """With the machine, the versions and the command beneath. rows: at least one."""
    head, lines = _filled(rows)
    text = [head, tuple("---" if name in LEFT else "---:" for name in head), *lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in text)
    return f"{table}\n\n{machine(rows)}\n\n`{rows[0].command}`\n"


def machine(rows: Sequence[BenchRow]) -> str:
    """Where the rows come from, in one sentence."""
    names = " and ".join(dict.fromkeys(r.device_name for row in rows for r in row.ranks))
    devices = max(row.devices for row in rows)
    several = devices > 1 and rows[0].ranks[0].device.startswith("cuda")
    words = [f"{devices} × {names}" if several else names]
    first = rows[0]
    attention = [row for row in rows if isinstance(row, AttentionRow)]
    gpus = [row.gpu for row in attention if row.gpu is not None]
    if gpus:
        clocks = [gpu.sm_clock_mhz for gpu in gpus]
        words.append(
            f"power limit {gpus[0].power_limit_w:.0f} W, SM clock {min(clocks):.0f} to "
            f"{max(clocks):.0f} of {gpus[0].max_sm_clock_mhz:.0f} MHz while timed"
        )
    wanted = ("torch", "triton", "flash-attn-4", "cuda", "driver", "ringspan", "commit")
    known = (f"{name} {first.versions[name]}" for name in wanted if name in first.versions)
    words.append(", ".join(known))
    if attention:
        words.append(_shape(attention[0].case))
        words.append(f"medians of {attention[0].case.repeats}, in turn with the kernel")
    else:
        words.append(f"medians of {first.repeats}" if isinstance(first, PrefillRow) else "")
    return "; ".join(filter(None, words)) + "."


def _shape(case: AttentionCase) -> str:
    heads = f"{case.num_q_heads} q and {case.num_kv_heads} kv heads of {case.head_dim}"
    mask = "causal" if case.causal else "full"
    window = f", window {case.window:,}" if case.window is not None else ""
    return f"{heads}, {case.dtype}, {mask}{window}, {case.layout}"


def _filled(rows: Sequence[BenchRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    if all(isinstance(row, AttentionRow) for row in rows):
        head: tuple[str, ...] = HEAD
        lines = [attention_cells(row) for row in rows if isinstance(row, AttentionRow)]
    else:
        head = PREFILL_HEAD
        lines = [prefill_cells(row) for row in rows if isinstance(row, PrefillRow)]
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return tuple(head[i] for i in kept), [tuple(line[i] for i in kept) for line in lines]


def prefill_cells(row: PrefillRow) -> tuple[str, ...]:
    found = row.findings
    return (
        f"{row.tokens:,}",
        str(len(row.ranks)),
        row.plan.scheme,
        row.plan.layout,
        row.ranks[0].transport,
        _number(row.median_s),
        f"{_number(row.min_s)} to {_number(row.max_s)}",
        f"{row.tokens_per_s:,.0f}",
        _number(row.tflops_per_s),
        _number(statistics.median(row.baseline_s)) if row.baseline_s else "",
        "" if row.median_ratio is None else f"{row.median_ratio:.3f}",
        "" if row.predicted_s is None else _number(row.predicted_s),
        _number(sum(found.exposed_s)) if any(found.exposed_s) else "",
        f"{found.audit_error:.1e}" if found.audited_rows else "",
    )


def _ms(seconds: float) -> str:
    return _number(seconds * 1e3)


def _number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _range(spread: Spread) -> str:
    return f"{spread.min:.3f} to {spread.max:.3f}"


def attention_line(row: AttentionRow) -> str:
    """One row as it comes."""
    floor = f", {row.over_floor.median:.3f} x its floor" if row.over_floor else ""
    note = f" ({row.note})" if row.note else ""
    exposed = f"exposed {_ms(sum(row.exposed_s))} ms; " if row.exposed_s else ""
    return (
        f"{row.case.text}{note}: {_ms(row.seconds.median)} ms, {_number(row.tflops_per_s)} TFLOP/s "
        f"a device; {row.ratio.median:.3f} ({_range(row.ratio)}) x ideal by {row.kernel}{floor}; "
        f"{exposed}error {row.relative_error:.1e}"
    )


def prefill_lines(row: PrefillRow) -> str:
    """One row as it comes, and what transformers took."""
    text = (
        f"prefill of {row.tokens:,} tokens, {row.facts.name}, {len(row.ranks)} ranks, "
        f"{row.plan.scheme}, {row.plan.layout}: median {row.median_s:.2f} s ({row.min_s:.2f} to "
        f"{row.max_s:.2f}), {row.tokens_per_s:,.0f} tokens/s, {row.tflops_per_s:.3g} TFLOP/s"
    )
    if row.median_ratio is None:
        return text
    theirs = statistics.median(row.baseline_s)
    return (
        f"{text}\ntransformers in one process: {theirs:.2f} s; ringspan takes "
        f"{row.median_ratio:.2f} times that"
    )
