"""`ringspan bench codecs`: what every codec loses, beside transformers' quantised caches."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringspan.deploy.bench.peers_environment import (
    MakePeers,
    PeersPython,
    check_environment,
    make_environment,
)
from ringspan.deploy.commands import options
from ringspan.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

    from ringspan.deploy.bench.codecs import CodecRow

TEXT = "Python's own language reference"


def codecs(
    model: options.Model = "smollm2",
    tokens: Annotated[int, typer.Option("--tokens", help="Of the text.")] = 8192,
    prefill: Annotated[
        int | None, typer.Option("--prefill", help="Of them; default: half. The rest is forced.")
    ] = None,
    block: Annotated[int, typer.Option("--block", help="Tokens forced at once.")] = 64,
    chunk_tokens: Annotated[
        int, typer.Option("--chunk-tokens", help="Of one step of our prefill; whole pages.")
    ] = 1024,
    names: Annotated[str, typer.Option("--codecs", help="all, or names: int8,fp8.")] = "all",
    margins: Annotated[
        str, typer.Option("--margins", help="Of the needles; empty: no needles.")
    ] = "1,0.25,0.0625,0.03125,0.015625,0.00390625",
    text: Annotated[
        Path | None, typer.Option("--text", help=f"A text file; default: {TEXT}.")
    ] = None,
    peers_python: PeersPython = None,
    make_peers: MakePeers = None,
    device: options.Device = "auto",
    threads: options.Threads = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Append a JSON row a codec to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables to this file.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Draw KL over bits into this folder.")
    ] = None,
) -> None:
    """What a codec loses at which bits: KL, perplexity, SQNR, attention, hidden state, needles.

    Every codec through the engine, once with the session's tail raw and once with its pages encoded
    too; with --peers-python transformers' quantised caches on the same tokens.
    """
    from ringspan.cluster.messages import ModelSpec
    from ringspan.deploy.bench import codec_peers, codec_report
    from ringspan.deploy.bench.codec_runs import Protocol
    from ringspan.deploy.bench.codecs import Asked, append, bench_codecs
    from ringspan.deploy.bench.plots import check_matplotlib
    from ringspan.deploy.checks import DEVICES, check_model_name, check_name
    from ringspan.kvstore.codecs.registry import CODECS

    check_name("device", device, DEVICES)
    check_model_name(ModelSpec(name=model))
    chosen = tuple(CODECS) if names == "all" else tuple(names.split(","))
    for name in chosen:
        check_name("codec", name, tuple(CODECS))
    if plots is not None:
        check_matplotlib()
    if make_peers is not None:
        peers_python = make_environment(make_peers, codec_peers.PACKAGES)
    if peers_python is not None:
        check_environment(peers_python, codec_peers.MODULES)
    asked = Asked(
        model=model,
        protocol=Protocol(
            tokens=tokens,
            prefill=tokens // 2 if prefill is None else prefill,
            block=block,
            chunk_tokens=chunk_tokens,
        ),
        codecs=chosen,
        margins=_margins(margins),
        peers_python=peers_python,
        device=device,
        threads=threads,
        text=str(text) if text else TEXT,
        command=shlex.join(["ringspan", *sys.argv[1:]]),
    )
    rows: list[CodecRow] = []
    for row in bench_codecs(asked, _token_ids(model, tokens, text)):
        rows.append(row)
        if json is not None:
            append(row, json)
        print(codec_report.line(row), flush=True)
    print(f"\n{codec_report.plain(rows)}\n\n{codec_report.described(rows)}", flush=True)
    if markdown is not None:
        markdown.write_text(codec_report.markdown(rows))
    if plots is not None:
        print(codec_report.draw(rows, plots))


def _margins(text: str) -> tuple[float, ...]:
    try:
        margins = tuple(float(word) for word in filter(None, text.split(",")))
    except ValueError:
        raise BadInput(f"--margins {text}: wanted numbers, such as 1,0.5,0.25") from None
    if not all(0 < margin <= 1 for margin in margins):
        raise BadInput(f"--margins {text}: wanted numbers in (0, 1]")
    return margins


def _token_ids(model: str, count: int, text: Path | None) -> np.ndarray:
    """int32 [count] of real text; random ids for a model without a tokenizer."""
    import numpy as np

    from ringspan.attention.models.tokenizer import load_tokenizer, tokenize_documents
    from ringspan.cluster.messages import ModelSpec

    tokenizer = load_tokenizer(ModelSpec(name=model))
    if tokenizer is None:
        if text is not None:
            raise BadInput(f"--text with model {model!r}, which has no tokenizer: leave it out")
        return np.random.default_rng(0).integers(0, 1000, count, dtype=np.int32)
    try:
        words = language_reference() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--text {text}: {error}; wanted a text in UTF-8") from None
    ids = tokenize_documents(tokenizer, [words[: 16 * count]])
    if len(ids) < count:
        raise BadInput(f"{text or TEXT} has {len(ids)} tokens, --tokens wants {count}: ask fewer")
    return ids[:count]


def language_reference() -> str:
    """Prose and code that is on every machine: what `help("assert")` reads."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))
