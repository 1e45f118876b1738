"""`ringspan bench …`: one question a benchmark, JSON rows, correctness before any time."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.deploy.bench.asked import (
    check_attention,
    check_repeats,
    device_for,
    dtype_for,
    heads_of,
    numbers_of,
    schemes_of,
    transport_for,
)
from ringspan.deploy.checks import check_gang, check_model, check_plan_names, check_size
from ringspan.deploy.commands import options
from ringspan.deploy.commands.bench_codecs import codecs
from ringspan.deploy.commands.bench_decode import decode
from ringspan.deploy.commands.bench_endpoint import endpoint
from ringspan.deploy.commands.bench_serve import serve
from ringspan.deploy.commands.bench_store import store
from ringspan.errors import BadInput

if TYPE_CHECKING:
    from ringspan.deploy.bench.case import AttentionCase
    from ringspan.deploy.bench.rows import BenchRow

app = typer.Typer(
    help="Measure, beside what it is measured against.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Tokens = Annotated[str, typer.Option("--tokens", help="Lengths, such as 8192,32768.")]
LayerTokens = Annotated[
    str | None,
    typer.Option(
        "--tokens", help="Lengths; default: 8192,32768,131072 on a GPU, 1024,2048 on a CPU."
    ),
]
ManyRanks = Annotated[
    str | None,
    typer.Option("--ranks", "-p", help="Numbers of ranks, such as 1,2,4; default: as `prefill`."),
]
Schemes = Annotated[
    str, typer.Option("--schemes", "--scheme", help="all, or names: ring,all-gather,pass-q.")
]
Repeats = Annotated[int, typer.Option("--repeats", help="Timed runs, after one to warm up.")]
NoBaseline = Annotated[bool, typer.Option("--no-baseline", help="Without transformers beside it.")]
Rows = Annotated[Path | None, typer.Option("--json", help="Append a JSON row a case to this file.")]
Plots = Annotated[Path | None, typer.Option("--plots", help="Draw PNG plots into this folder.")]
Markdown = Annotated[
    Path | None, typer.Option("--markdown", help="Write the table to this file, as Markdown.")
]
Cached = Annotated[int, typer.Option("--cached", help="Tokens that the ranks hold already.")]
Heads = Annotated[str, typer.Option("--heads", help="q/kv heads, such as 32/8.")]
HeadDim = Annotated[int, typer.Option("--head-dim", help="Dimensions of a head.")]
DealLayout = Annotated[str, typer.Option("--layout", help="zigzag, striped, contiguous.")]
Full = Annotated[bool, typer.Option("--full", help="Every query sees every key.")]
Window = Annotated[
    int | None, typer.Option("--window", help="A query sees so many keys, its own the last.")
]
CompareTorch = Annotated[
    bool, typer.Option("--compare-torch", help="torch's context_parallel beside ours (NCCL).")
]
To = Annotated[Path, typer.Option("--to", help="Folder for the PNG files.")]

LENGTHS = {"cuda": "8192,32768,131072", "cpu": "1024,2048"}


@app.callback()
def bench() -> None:
    """Measure, beside what it is measured against."""


@app.command("attention")
def attention(
    tokens: LayerTokens = None,
    ranks: ManyRanks = None,
    schemes: Schemes = "ring",
    transport: options.Transport = "auto",
    cached: Cached = 0,
    heads: Heads = "32/8",
    head_dim: HeadDim = 128,
    layout: DealLayout = "zigzag",
    full: Full = False,
    window: Window = None,
    repeats: Repeats = 5,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    timeout: options.Timeout = 60.0,
    compare_torch: CompareTorch = False,
    json: Rows = None,
    markdown: Markdown = None,
    plots: Plots = None,
) -> int:
    """One layer's attention over the ranks, beside the best single kernel of the machine.

    Loopback ranks share one device: the sum of their work is compared with one kernel's time. With
    NCCL or gloo every rank has its own: the slowest one's is compared with one kernel's time over
    the ranks. Within a Ray job, or where RAY_ADDRESS is set, ranks are that cluster's actors.
    """
    from ringspan.deploy.bench.attention import Skipped, Wrong, bench_attention, in_order
    from ringspan.deploy.bench.case import TORCH_SCHEMES, AttentionCase
    from ringspan.deploy.bench.table import attention_line

    q_heads, kv_heads = heads_of(heads)
    device = device_for(device)
    names = schemes_of(schemes) + (list(TORCH_SCHEMES) if compare_torch else [])
    common = AttentionCase(
        tokens=1,
        cached=cached,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layout=layout,
        causal=not full,
        window=window,
        dtype=dtype_for(dtype, device),
        backend=backend,
        repeats=repeats,
        seed=seed,
    )
    spec = GangSpec(
        world_size=1,
        model=ModelSpec(name="none"),
        transport=transport,
        device=device,
        threads=threads,
        timeout_s=timeout,
    )
    counts = numbers_of("--ranks", ranks or str(options.default_ranks(device)))
    check_attention(common, spec, counts)
    _check_outputs(plots)
    cases = in_order(
        _case(common, length, count, scheme, transport_for(transport, device, count))
        for length in numbers_of("--tokens", tokens or LENGTHS[device])
        for count in counts
        for scheme in names
    )
    rows: list[BenchRow] = []
    wrong = 0
    for outcome in bench_attention(spec, cases, _command()):
        match outcome:
            case Wrong(case, text):
                wrong += 1
                print(f"WRONG, not timed: {case.text}: {text}", flush=True)
            case Skipped(case, text):
                print(f"not run: {case.text}: {text}", flush=True)
            case row:
                rows.append(row)
                _append(row, json)
                print(attention_line(row), flush=True)
    _report(rows, markdown, plots)
    return 1 if wrong or not rows else 0


@app.command("prefill")
def prefill(
    model: options.Model = "smollm2",
    tokens: Tokens = "8192",
    repeats: Repeats = 3,
    no_baseline: NoBaseline = False,
    ranks: ManyRanks = None,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    schemes: Schemes = "auto",
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
    markdown: Markdown = None,
    plots: Plots = None,
) -> None:
    """Time of a prefill beside the transformers model in one process."""
    from ringspan.cluster.planner import PrefillOptions
    from ringspan.deploy.bench.prefill import bench_prefill
    from ringspan.deploy.bench.table import prefill_lines

    lengths = numbers_of("--tokens", tokens)
    check_repeats(repeats)
    names = ["auto"] if schemes == "auto" else schemes_of(schemes)
    specs = [
        options.gang_spec(
            ModelSpec(name=model, dtype=dtype, rope_scaling=rope_scaling),
            ranks=count,
            transport=transport,
            device=device,
            backend=backend,
            threads=threads,
            timeout_s=timeout,
        )
        for count in numbers_of("--ranks", ranks or str(options.default_ranks(device)))
    ]
    check_plan_names(codec, names[0], layout)
    for spec in specs:
        check_gang(spec, local)
    facts = check_model(specs[0])
    check_size(facts, max(lengths) + 1, chunk_tokens)
    _check_outputs(plots)
    rows: list[BenchRow] = []
    for row in bench_prefill(
        specs,
        PrefillOptions(layout=layout, codec=codec, chunk_tokens=chunk_tokens),
        names,
        lengths,
        _token_ids(specs[0].model, max(lengths) + 1),
        repeats=repeats,
        baseline=not no_baseline,
        local=local,
        command=_command(),
    ):
        rows.append(row)
        _append(row, json)
        print(prefill_lines(row), flush=True)
    _report(rows, markdown, plots)


app.command("decode")(decode)
app.command("codecs")(codecs)
app.command("store")(store)
app.command("serve")(serve)
app.command("endpoint")(endpoint)


@app.command("plot")
def plot(
    files: Annotated[list[Path], typer.Argument(help="Files that --json wrote.")],
    to: To = Path("plots"),
) -> None:
    """Draw the rows of earlier runs."""
    from ringspan.deploy.bench.rows import read_rows

    _check_outputs(to)
    _draw(read_rows(files), to)


def _case(
    common: AttentionCase, tokens: int, ranks: int, scheme: str, transport: str
) -> AttentionCase:
    import msgspec

    return msgspec.structs.replace(
        common, tokens=tokens, ranks=ranks, scheme=scheme, transport=transport
    )


def _check_outputs(plots: Path | None) -> None:
    if plots is None:
        return
    from ringspan.deploy.bench.plots import check_matplotlib

    check_matplotlib()
    if plots.exists() and not plots.is_dir():
        raise BadInput(f"{plots} is a file; wanted a folder for the plots")


def _append(row: BenchRow, path: Path | None) -> None:
    from ringspan.deploy.bench.rows import append_row

    if path is not None:
        append_row(row, path)


def _report(rows: Sequence[BenchRow], markdown: Path | None, plots: Path | None) -> None:
    """The table at the end, and what was asked for beside it."""
    from ringspan.deploy.bench import table

    if not rows:
        return
    print(f"\n{table.plain(rows)}\n\n{table.machine(rows)}", flush=True)
    if markdown is not None:
        markdown.write_text(table.markdown(rows))
    if plots is not None:
        _draw(rows, plots)


def _draw(rows: Sequence[BenchRow], folder: Path) -> None:
    from ringspan.deploy.bench.plots import draw_plots
    from ringspan.deploy.bench.rows import points_of

    for path in draw_plots(points_of(rows), folder):
        print(path)


def _command() -> str:
    return shlex.join(["ringspan", *sys.argv[1:]])


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
