"""`ringspan bench endpoint`: what HTTP, server-sent events and the routes cost."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ringspan.errors import BadInput


def endpoint(
    streams: Annotated[int, typer.Option("--streams", help="Answers at once.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", help="Of one answer.")] = 100,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Of one request.")] = 1000,
    pace_ms: Annotated[
        float, typer.Option("--pace", help="Milliseconds between two steps of the engine.")
    ] = 20.0,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds, after one to warm up.")] = 5,
    json: Annotated[
        Path | None, typer.Option("--json", help="Append a JSON row to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table to this file.")
    ] = None,
) -> None:
    """What the endpoint adds to its engine, a request and a token.

    The engine is one that emits a token of every answer at a fixed pace: no model is run. All else
    is what `ringspan serve` runs, in a process of its own. Status 1 where a target is missed.
    """
    import msgspec

    from ringspan.deploy.bench import endpoint as bench

    if streams < 1 or prompt_tokens < 1 or repeats < 1 or tokens < 2 or not pace_ms > 0:
        raise BadInput(
            "--streams, --prompt-tokens, --repeats: wanted at least 1; --tokens at least 2, "
            "--pace more than 0"
        )
    command = shlex.join(["ringspan", *sys.argv[1:]])
    row = bench.bench_endpoint(streams, tokens, prompt_tokens, pace_ms / 1e3, repeats, command)
    if json is not None:
        with json.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
    table = bench.markdown(row)
    print(table)
    if markdown is not None:
        markdown.write_text(table)
    if not row.met:
        raise typer.Exit(1)
