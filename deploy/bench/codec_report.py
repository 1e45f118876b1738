"""Rows of `bench codecs` as Markdown tables and as a plot: KL over bits per element."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ringspan.deploy.bench.codec_needles import NeedleCount
from ringspan.deploy.bench.codecs import CodecRow, at_equal_bits
from ringspan.deploy.bench.plots import DPI, HEIGHT, WIDTH, check_matplotlib

HEAD = (
    "system", "codec", "tail", "bits", "bits at end", "KL mean", "KL p99", "KL max", "perplexity",
    "same best", "hidden", "K dB", "V dB", "attention", "needles", "s",
)  # fmt: skip
EQUAL_HEAD = (
    "peer", "bits", "ours", "bits", "KL", "perplexity", "K dB", "V dB", "attention", "hidden",
    "needles", "better on",
)  # fmt: skip
KINDS = (
    ("ringspan", "sealed", "o", "C0"),
    ("ringspan", "raw", "^", "C2"),
    ("transformers", "", "X", "C3"),
)
"""System, tail (any where empty), mark and colour."""
LEFT = {"system", "codec", "tail", "peer", "ours", "needles", "better on"}


def line(row: CodecRow) -> str:
    """One row as it comes."""
    loss = row.loss
    return (
        f"{row.system} {row.codec} ({row.tail}): {row.bits.mean:.2f} bits; KL mean "
        f"{loss.kl_mean:.2e}, p99 {loss.kl_p99:.2e}, max {loss.kl_max:.2e}; perplexity "
        f"{loss.perplexity:.4f} (exact {loss.exact_perplexity:.4f}); hidden "
        f"{loss.hidden_error:.1e}; needles {_needles(row.needles) or 'none'}; {row.seconds:.0f} s"
    )


def plain(rows: Sequence[CodecRow]) -> str:
    """For a terminal."""
    return "\n\n".join(_columns(head, lines) for head, lines in _tables(rows) if lines)


def markdown(rows: Sequence[CodecRow]) -> str:
    """Both tables, what their columns mean, the machine and the command. rows: at least one."""
    texts = [_markdown(head, lines) for head, lines in _tables(rows) if lines]
    return "\n\n".join((*texts, described(rows), f"`{rows[0].command}`")) + "\n"


def described(rows: Sequence[CodecRow]) -> str:
    """The protocol and where it ran, in a few sentences."""
    first = rows[0]
    protocol, machine = first.protocol, first.hardware
    wanted = ("ringspan", "commit", "torch", "transformers", "python")
    known = ", ".join(f"{name} {first.versions[name]}" for name in wanted if name in first.versions)
    margins = ", ".join(f"{needle.margin:g}" for needle in first.needles)
    needles = (
        f" Needles: of {first.needles[0].planted} planted in {protocol.prefill:,} tokens, found at "
        f"margins {margins}."
        if first.needles
        else ""
    )
    forced, exact = protocol.tokens - protocol.prefill, first.loss.exact_perplexity
    return (
        f"{first.model} in fp32, {first.text}: {protocol.prefill:,} tokens prefilled (ours in "
        f"chunks of {protocol.chunk_tokens:,}, the peers' in one call), {forced:,} forced in "
        f"blocks of {protocol.block}. Bits per element of K and V are those of a 16-bit model, "
        "side data and what is not encoded counted, as the mean over the run. KL in nats of the "
        f"next token against the exact run, whose perplexity is {exact:.4f}; same best: share of "
        "tokens with the same likeliest next one; hidden: relative error of the final hidden "
        "state; dB: SQNR of K and V; attention: relative error of a layer's attention output, "
        f"median over layers.{needles} {machine.cpu}, {machine.cores} cores, {first.device}; "
        f"{known}."
    )


def draw(rows: Sequence[CodecRow], folder: Path) -> Path:
    """KL over bits, one mark a row. Raises BadInput where matplotlib is missing."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    folder.mkdir(parents=True, exist_ok=True)
    axes = figure.add_subplot()
    for system, tail, mark, color in KINDS:
        chosen = [
            row
            for row in rows
            if row.system == system and (not tail or row.tail == tail) and _lossy(row)
        ]
        name = f"{system}, tail {tail}" if tail else f"{system}' quantised caches"
        bits = [row.bits.mean for row in chosen]
        kls = [row.loss.kl_mean for row in chosen]
        axes.plot(bits, kls, mark, color=color, label=name, markersize=8)
        for row in chosen:
            axes.annotate(
                row.codec,
                (row.bits.mean, row.loss.kl_mean),
                textcoords="offset points",
                xytext=(7, 4),
                fontsize=8,
            )
    axes.set_yscale("log")
    axes.set(
        xlabel="bits per element of K and V, side data and tail counted (mean over the run)",
        ylabel="KL of the next token (nats, mean)",
    )
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    axes.set_title(
        f"{rows[0].model}, {rows[0].protocol.tokens:,} tokens; {rows[0].hardware.cpu}", fontsize=9
    )
    path = folder / "codecs_kl_over_bits.png"
    figure.savefig(path)
    return path


def _lossy(row: CodecRow) -> bool:
    return row.loss.kl_mean > 1e-8  # beneath it is the order of sums


def _tables(
    rows: Sequence[CodecRow],
) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    return [
        (HEAD, [_cells(row) for row in rows]),
        (EQUAL_HEAD, [_equal_cells(peer, ours) for peer, ours in at_equal_bits(rows)]),
    ]


def _cells(row: CodecRow) -> tuple[str, ...]:
    loss, pages = row.loss, row.pages
    return (
        row.system,
        row.codec,
        row.tail,
        f"{row.bits.mean:.2f}",
        f"{row.bits.end:.2f}",
        f"{loss.kl_mean:.2e}",
        f"{loss.kl_p99:.2e}",
        f"{loss.kl_max:.2e}",
        f"{loss.perplexity:.4f}",
        f"{100 * loss.same_best:.1f} %",
        f"{loss.hidden_error:.2e}",
        _db(pages.k_sqnr_db) if pages else "",
        _db(pages.v_sqnr_db) if pages else "",
        f"{pages.attention_error:.2e}" if pages else "",
        _needles(row.needles),
        f"{row.seconds:.0f}",
    )


def _equal_cells(peer: CodecRow, ours: CodecRow) -> tuple[str, ...]:
    """Ratios are the peer's error over ours, above 1 where ours is better: of perplexity the
    difference from the exact run's, of dB the amplitude of the noise."""
    compared = {
        "KL": (peer.loss.kl_mean, ours.loss.kl_mean),
        "perplexity": tuple(
            abs(row.loss.perplexity - row.loss.exact_perplexity) for row in (peer, ours)
        ),
        "hidden": (peer.loss.hidden_error, ours.loss.hidden_error),
    }
    if peer.pages and ours.pages:
        compared["attention"] = (peer.pages.attention_error, ours.pages.attention_error)
        for name in ("k", "v"):
            pair = tuple(_lost(getattr(row.pages, f"{name}_sqnr_db")) for row in (peer, ours))
            compared[f"{name.upper()} dB"] = pair
    found = [sum(needle.found for needle in row.needles) for row in (peer, ours)]
    better = [name for name, (theirs, own) in compared.items() if own < theirs]
    total = len(compared)
    if peer.needles:
        total += 1
        better += ["needles"] if found[1] >= found[0] else []
    text = {name: f"{_ratio(*pair)}" for name, pair in compared.items()}
    return (
        peer.codec,
        f"{peer.bits.mean:.2f}",
        ours.codec,
        f"{ours.bits.mean:.2f}",
        *(
            text.get(name, "")
            for name in ("KL", "perplexity", "K dB", "V dB", "attention", "hidden")
        ),
        f"{found[0]} : {found[1]}" if peer.needles else "",
        "all" if len(better) == total else f"{len(better)} of {total}: {', '.join(better)}",
    )


def _ratio(theirs: float, own: float) -> str:
    return f"{theirs / own:.2f}x" if own else "inf"


def _lost(sqnr_db: float | None) -> float:
    """The noise's share of the amplitude."""
    return 0.0 if sqnr_db is None else 10 ** (-sqnr_db / 20)


def _db(sqnr_db: float | None) -> str:
    return "exact" if sqnr_db is None else f"{sqnr_db:.1f}"


def _needles(needles: Sequence[NeedleCount]) -> str:
    """Found at each margin."""
    return "/".join(str(needle.found) for needle in needles)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if name in LEFT else "---:" for name in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in LEFT else cell.rjust(width)
            for name, cell, width in zip(head, cells, widths, strict=True)
        ).rstrip()
        for cells in (head, *lines)
    )
