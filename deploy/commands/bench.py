"""`ringspan bench …`: one question a benchmark, JSON rows, correctness before any time."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ringspan.cluster.messages import ModelSpec
from ringspan.deploy.checks import check_gang, check_model, check_plan_names, check_size
from ringspan.deploy.commands import options
from ringspan.errors import BadInput

app = typer.Typer(
    help="Measure, beside what it is measured against.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Tokens = Annotated[int, typer.Option("--tokens", help="Length of the context.")]
Repeats = Annotated[int, typer.Option("--repeats", help="Timed runs, after one to warm up.")]
NoBaseline = Annotated[bool, typer.Option("--no-baseline", help="Without transformers beside it.")]
Rows = Annotated[Path | None, typer.Option("--json", help="Append a JSON row to this file.")]


@app.callback()
def bench() -> None:
    """Measure, beside what it is measured against."""


@app.command("prefill")
def prefill(
    model: options.Model = "smollm2",
    tokens: Tokens = 8192,
    repeats: Repeats = 3,
    no_baseline: NoBaseline = False,
    ranks: options.Ranks = None,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    scheme: options.Scheme = "auto",
    layout: options.Layout = "auto",
    codec: options.Codec = "raw",
    chunk_tokens: options.ChunkTokens = None,
    rope_scaling: options.RopeScaling = None,
    dtype: options.Dtype = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    local: options.Local = False,
    timeout: options.Timeout = 60.0,
    json: Rows = None,
) -> None:
    """Time of a prefill beside the transformers model in one process."""
    from ringspan.cluster.planner import PrefillOptions
    from ringspan.deploy.bench.prefill import append_row, bench_prefill

    spec = options.gang_spec(
        ModelSpec(name=model, dtype=dtype, rope_scaling=rope_scaling),
        ranks=ranks,
        transport=transport,
        device=device,
        backend=backend,
        threads=threads,
        timeout_s=timeout,
    )
    if tokens < 1 or repeats < 1:
        raise BadInput(f"--tokens {tokens} --repeats {repeats}: wanted at least 1 of each")
    check_plan_names(codec, scheme, layout)
    check_gang(spec, local)
    facts = check_model(spec)
    check_size(facts, tokens + 1, chunk_tokens)
    row = bench_prefill(
        spec,
        PrefillOptions(layout=layout, scheme=scheme, codec=codec, chunk_tokens=chunk_tokens),
        _token_ids(spec.model, tokens + 1),
        repeats=repeats,
        baseline=not no_baseline,
        local=local,
        command=shlex.join(["ringspan", *sys.argv[1:]]),
    )
    print(
        f"prefill of {row.tokens:,} tokens, {model}, {len(row.ranks)} ranks, {row.plan.scheme}, "
        f"{row.plan.layout}: median {row.median_s:.2f} s ({row.min_s:.2f} to {row.max_s:.2f}), "
        f"{row.tokens_per_s:,.0f} tokens/s, {row.tflops_per_s:.3g} TFLOP/s"
    )
    if row.median_ratio is not None:
        print(
            f"transformers in one process: {sorted(row.baseline_s)[len(row.baseline_s) // 2]:.2f} "
            f"s; ringspan takes {row.median_ratio:.2f} times that"
        )
    if json is not None:
        append_row(row, json)


def _token_ids(model: ModelSpec, count: int) -> np.ndarray:
    """Real text where the model has a tokenizer (Python's own sources), else random ids."""
    import inspect

    from ringspan.attention.models.tokenizer import load_tokenizer, tokenize_documents

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, 1000, count).astype(np.int32)
    folder = Path(inspect.__file__).parent
    text = "\n".join(path.read_text() for path in sorted(folder.glob("*.py"))[:200])
    ids = tokenize_documents(tokenizer, [text[: 8 * count]], None)
    return ids[:count]
