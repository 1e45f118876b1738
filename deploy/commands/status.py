"""`ringspan status`: what runs on a cluster now."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ringspan.deploy.progress import bytes_words, clock_words
from ringspan.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringspan.cluster.board import Report, Seen

BAR_CHARS = 24

Once = Annotated[bool, typer.Option("--once", help="Print once and end.")]
Json = Annotated[bool, typer.Option("--json", help="Print once, as JSON, and end.")]
Every = Annotated[float, typer.Option("--every", help="Seconds between two looks.")]


def status(once: Once = False, json: Json = False, every: Every = 1.0) -> None:
    """Gangs, contexts, running prefills with pace and time left, tiers and faults of the Ray
    cluster that RAY_ADDRESS names (or that this job runs on)."""
    import os

    if every <= 0:
        raise BadInput(f"--every {every:g}: wanted a number of seconds above 0")
    if not os.environ.get("RAY_ADDRESS"):
        raise BadInput(
            "status wants a running Ray cluster: set RAY_ADDRESS to it (a run without one ends "
            "with its own private Ray, and shows its progress itself)"
        )
    from ringspan.cluster.board_actor import look
    from ringspan.cluster.ray_cluster import connect

    with connect():
        if json:
            print(msgspec.json.format(msgspec.json.encode(look()), indent=2).decode(), flush=True)
        elif once or not sys.stdout.isatty():
            Console(file=sys.stdout).print(drawn(look()))
        else:
            _live(every)


def _live(every_s: float) -> None:
    from ringspan.cluster.board_actor import look

    with Live(drawn(look()), refresh_per_second=4) as live:
        while True:
            time.sleep(every_s)
            live.update(drawn(look()))


def drawn(seen: Sequence[Seen]) -> Group | Text:
    """One block a controller."""
    if not seen:
        return Text("nothing of ringspan runs on this cluster")
    return Group(*(_block(one) for one in seen))


def _block(seen: Seen) -> Group:
    report = seen.report
    old = f", heard {clock_words(seen.age_s)} ago" if seen.age_s > 5 else ""
    lines: list[Text | Table] = [
        Text(f"{report.command}  ({report.source}{old})", style="bold"),
        Text(f"  gang      {_gang(report)}"),
    ]
    if report.prefill is not None:
        lines.append(Text(f"  prefill   {prefill_words(report)}"))
    if report.waiting:
        lines.append(Text(f"  waiting   {report.waiting} requests"))
    if report.tiers:
        tiers = ", ".join(f"{tier} {bytes_words(size)}" for tier, size in report.tiers.items())
        lines.append(Text(f"  tiers     {tiers}"))
    bad = {fate: roads for fate, roads in report.pages.items() if fate != "verified" and roads}
    if bad:
        words = ", ".join(f"{sum(roads.values())} {fate}" for fate, roads in bad.items())
        lines.append(Text(f"  pages     {words}"))
    if report.faults:
        lines.append(Text(f"  faults    {report.faults}, the last: {report.last_fault}"))
    if report.contexts:
        lines.append(_contexts(report))
    return Group(*lines, Text(""))


def prefill_words(report: Report) -> str:
    """`[######----] 8,192 of 12,288 tokens, chunk 2 of 3, 402 tokens/s, 0:21 left, KV 377 MB`."""
    prefill = report.prefill
    assert prefill is not None
    share = prefill.tokens_done / max(prefill.num_tokens, 1)
    full = round(BAR_CHARS * share)
    words = (
        f"{'#' * full}{'-' * (BAR_CHARS - full)}  {prefill.tokens_done:,} of "
        f"{prefill.num_tokens:,} tokens, chunk {prefill.chunk_index + 1} of {prefill.num_chunks}, "
        f"{prefill.tokens_per_s:,.0f} tokens/s, {clock_words(prefill.left_s)} left, KV "
        f"{bytes_words(prefill.kv_bytes)}, context {prefill.context_id}"
    )
    return f"{words}, paused: {prefill.paused}" if prefill.paused else words


def _gang(report: Report) -> str:
    ranks = len(report.ranks)
    places = ", ".join(dict.fromkeys(report.ranks))
    return f"{ranks} rank{'s' * (ranks != 1)} of {report.model} by {report.transport} on {places}"


def _contexts(report: Report) -> Table:
    table = Table("context", "tokens", "codec", "fidelity", "KV", box=None, pad_edge=True)
    for held in report.contexts:
        size = bytes_words(held.kv_bytes)
        table.add_row(held.context_id, f"{held.num_tokens:,}", held.codec, held.fidelity, size)
    return table
