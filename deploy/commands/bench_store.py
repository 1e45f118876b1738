"""`ringspan bench store`: rates of every tier, beside Mooncake Store, fio and plain copies."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringspan.deploy.bench.asked import check_repeats, device_for
from ringspan.deploy.bench.peers_environment import (
    MakePeers,
    PeersPython,
    check_environment,
    make_environment,
)
from ringspan.deploy.commands import options
from ringspan.errors import BadInput

if TYPE_CHECKING:
    from ringspan.deploy.bench.store import StoreRow
    from ringspan.deploy.bench.store_case import StoreCase


def store(
    codec: options.Codec = "raw",
    pages: Annotated[int, typer.Option("--pages", help="Of the context that is moved.")] = 64,
    layers: Annotated[int, typer.Option("--layers", help="Of a page.")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", help="Of a layer.")] = 8,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Dimensions of a head.")] = 128,
    parts: Annotated[
        str, typer.Option("--parts", help="all, or of host,disk,remote,device,prefill.")
    ] = "all",
    folder: Annotated[
        Path | None, typer.Option("--folder", help="On the disk to measure; default: /tmp's.")
    ] = None,
    peers_python: PeersPython = None,
    make_peers: MakePeers = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Of the prefill that is saved.")
    ] = "random:tiny",
    tokens: Annotated[int, typer.Option("--tokens", help="Of that prefill.")] = 8192,
    ranks: options.Ranks = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed runs, after a first.")] = 5,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Append a JSON row a comparison to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table to this file.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Draw the rates into this folder.")
    ] = None,
) -> int:
    """Pages into every tier and back, checksums on: GB/s, beside what does the same without.

    Exits with 1 where a ratio is beneath what the project wants of it: twice Mooncake Store on
    loopback, 0.8 of fio, 0.85 of a pinned copy.
    """
    from ringspan.cluster.messages import ModelSpec
    from ringspan.deploy.bench import store_peers, store_report
    from ringspan.deploy.bench.plots import check_matplotlib
    from ringspan.deploy.bench.store import PARTS, Asked, bench_store, missed
    from ringspan.deploy.bench.store_case import StoreCase
    from ringspan.deploy.checks import check_model_name, check_name
    from ringspan.kvstore.codecs.registry import CODECS

    check_repeats(repeats)
    check_name("codec", codec, tuple(CODECS))
    check_model_name(ModelSpec(name=model))
    chosen = PARTS if parts == "all" else tuple(parts.split(","))
    for part in chosen:
        check_name("part", part, PARTS)
    case = StoreCase(
        codec=codec,
        pages=pages,
        num_layers=layers,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        repeats=repeats,
        seed=seed,
    )
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    _check_sizes(case, tokens, folder)
    if plots is not None:
        check_matplotlib()
    if make_peers is not None:
        peers_python = make_environment(make_peers, store_peers.PACKAGES)
    if peers_python is not None:
        check_environment(peers_python, store_peers.MODULES, store_peers.OF_THE_SYSTEM)
    elif "host" in chosen:
        print("without --peers-python (or --make-peers): Mooncake Store is left out", flush=True)
    device = device_for(device)
    asked = Asked(
        case=case,
        parts=chosen,
        folder=folder,
        peers_python=peers_python,
        device=device,
        model=model,
        tokens=tokens,
        ranks=options.default_ranks(device) if ranks is None else ranks,
        command=shlex.join(["ringspan", *sys.argv[1:]]),
    )
    rows: list[StoreRow] = []
    for row in bench_store(asked):
        rows.append(row)
        if json is not None:
            store_report.append(row, json)
        print(store_report.line(row), flush=True)
    print(f"\n{store_report.plain(rows)}\n\n{store_report.described(rows)}", flush=True)
    if markdown is not None:
        markdown.write_text(store_report.markdown(rows))
    if plots is not None:
        print(store_report.draw(rows, plots))
    for row in missed(rows):
        print(f"beneath what is wanted: {store_report.line(row)}", flush=True)
    return 1 if missed(rows) else 0


def _check_sizes(case: StoreCase, tokens: int, folder: Path) -> None:
    """Refuse before anything is written."""
    for name, value in (
        ("--pages", case.pages),
        ("--layers", case.num_layers),
        ("--kv-heads", case.num_kv_heads),
        ("--head-dim", case.head_dim),
        ("--tokens", tokens),
    ):
        if value < 1:
            raise BadInput(f"{name} {value}: wanted at least 1")
    if not folder.is_dir():
        raise BadInput(f"--folder {folder} is no folder; wanted one on the disk to measure")
    raw = case.pages * case.num_layers * case.num_kv_heads * case.head_dim * 128 * 4
    free = shutil.disk_usage(folder).free
    if 4 * raw > free:
        raise BadInput(
            f"--pages {case.pages} are up to {raw / 1e9:.1f} GB, of which four copies must fit "
            f"{folder}, where {free / 1e9:.1f} GB are free: ask fewer pages, or another --folder"
        )
