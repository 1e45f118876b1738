"""`ringspan bench serve`: an endpoint as its clients see it, beside others."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ringspan.errors import BadInput

KEY = "RINGSPAN_API_KEY"
DOCUMENT_CHARS = 30_000


def serve(
    url: Annotated[str, typer.Argument(help="The endpoint, such as http://127.0.0.1:8000.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="NAME=URL of another endpoint; may be repeated."),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="A text; default: a module of the standard library."),
    ] = None,
    chars: Annotated[
        int, typer.Option("--chars", help="So many characters of it.")
    ] = DOCUMENT_CHARS,
    streams: Annotated[str, typer.Option("--streams", help="Questions at once.")] = "1,4",
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", help="At most, of one answer.")
    ] = 64,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Rounds, each with a cold document.")
    ] = 3,
    json: Annotated[
        Path | None, typer.Option("--json", help="Append a JSON row an endpoint to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table to this file.")
    ] = None,
) -> None:
    """Time to the first token of a new document and of one that was asked before, tokens a second.

    Reads an API key from RINGSPAN_API_KEY, if there is one; other endpoints get none.
    """
    import msgspec

    from ringspan.deploy.bench import serve as bench

    counts = _counts(streams, len(bench.QUESTIONS))
    if answer_tokens < 1 or repeats < 1 or chars < 1:
        raise BadInput("--answer-tokens, --repeats and --chars: wanted at least 1 of each")
    text = _text(document)[:chars]
    endpoints = [bench.endpoint("ringspan", url, os.environ.get(KEY, ""))]
    for named in against or ():
        name, equals, address = named.partition("=")
        if not (name and equals and address):
            raise BadInput(f"--against {named}: wanted NAME=URL")
        endpoints.append(bench.endpoint(name, address))
    rows = []
    for asked in endpoints:
        row = bench.bench_serve(
            asked,
            text,
            streams=counts,
            answer_tokens=answer_tokens,
            rounds=repeats,
            command=shlex.join(["ringspan", *sys.argv[1:]]),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        rows.append(row)
        if json is not None:
            with json.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")
    table = bench.markdown(rows)
    print(table)
    if markdown is not None:
        markdown.write_text(table)


def _counts(given: str, most: int) -> list[int]:
    try:
        counts = [int(part) for part in given.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(1 <= count <= most for count in counts):
        raise BadInput(f"--streams {given}: wanted numbers from 1 to {most}, such as 1,4")
    return list(dict.fromkeys(counts))


def _text(path: Path | None) -> str:
    if path is None:
        import typing

        path = Path(typing.__file__)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--input {path}: {error}; wanted a text in UTF-8") from None
