"""`ringspan doctor`: what this machine is, what was chosen and why, how fast it is, and whether
every page of a long context arrives (`--needles`)."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ringspan.cluster.messages import ModelSpec
from ringspan.deploy.checks import (
    check_gang,
    check_model,
    check_plan_names,
    check_size,
    check_store_folder,
)
from ringspan.deploy.commands import options
from ringspan.deploy.machine import Hardware
from ringspan.deploy.progress import bytes_words
from ringspan.deploy.record import RunRecord, recording
from ringspan.errors import BadInput, RingspanError

NEEDLE_SEED = 0

NeedleTokens = Annotated[
    int | None,
    typer.Option("--needles", help="Find needles in a context of N tokens (8,192 if not said)."),
]
NeedleCount = Annotated[int, typer.Option("--needle-count", help="Needles to plant.")]
Heads = Annotated[str, typer.Option("--heads", help="The retriever's q/kv heads, such as 32/8.")]
Margin = Annotated[
    float, typer.Option("--margin", help="1 forgives 4-bit codes; less feels finer noise.")
]
NeedleStore = Annotated[
    str | None,
    typer.Option("--store", help="Save the needles' context here and open it again to ask."),
]
ReopenRanks = Annotated[
    int | None, typer.Option("--reopen-ranks", help="Ranks that open it again; default: --ranks.")
]
StoreFaults = Annotated[
    int | None,
    typer.Option("--store-faults", help="Only: N faults on purpose around a simulated KV store."),
]
Seed = Annotated[
    int, typer.Option("--seed", help="Of --store-faults: the same seed, the same run.")
]
NoSpeed = Annotated[bool, typer.Option("--no-speed", help="Measure no speeds.")]


def doctor(
    needles: NeedleTokens = None,
    needle_count: NeedleCount = 256,
    heads: Heads = "1/1",
    margin: Margin = 1.0,
    ranks: options.Ranks = None,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    scheme: options.Scheme = "auto",
    layout: options.Layout = "auto",
    codec: options.Codec = "raw",
    chunk_tokens: options.ChunkTokens = None,
    dtype: options.Dtype = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    store: NeedleStore = None,
    reopen_ranks: ReopenRanks = None,
    no_speed: NoSpeed = False,
    store_faults: StoreFaults = None,
    seed: Seed = 0,
    local: options.Local = False,
    timeout: options.Timeout = 60.0,
    json: options.Json = None,
) -> None:
    """Look at this machine; with --needles, prove that every page arrives."""
    from pathlib import Path

    asked = options.as_asked(locals())
    spec = options.gang_spec(
        ModelSpec(name=_retriever(heads, margin), dtype=dtype),
        ranks=ranks,
        transport=transport,
        device=device,
        backend=backend,
        threads=threads,
        timeout_s=timeout,
    )
    if store_faults is not None:
        with recording(json, asked):
            _break_the_store(store_faults, seed)
        return
    with recording(json, asked) as record:
        check_plan_names(codec, scheme, layout)
        check_gang(spec, local)
        if reopen_ranks is not None and (store is None or reopen_ranks < 1):
            raise BadInput(
                f"--reopen-ranks {reopen_ranks}: wanted at least 1, together with --store"
            )
        if needles is not None:
            _check_needles(needles, needle_count)
            check_size(check_model(spec), needles + 2, chunk_tokens)
            if store is not None:
                check_store_folder(Path(store))
        cuda = device != "cpu" and len(record.hardware.gpus) > 0
        _tell_machine(record.hardware, record.versions)
        _tell_backends(cuda)
        if not no_speed:
            _measure(record, cuda)
        from ringspan.cluster.planner import PrefillOptions
        from ringspan.deploy.needles import run_needles, tell_link

        if needles is None:
            if not no_speed and (ranks or 1) > 1:
                tell_link(record, spec, local)
            return

        print(
            f"needles    {needle_count} in {needles:,} tokens, {spec.model.name},"
            f" {spec.world_size} ranks, codec {codec}",
            flush=True,
        )
        began = time.monotonic()
        found = record.needles = run_needles(
            record,
            spec,
            PrefillOptions(layout=layout, scheme=scheme, codec=codec, chunk_tokens=chunk_tokens),
            num_tokens=needles,
            num_needles=needle_count,
            seed=NEEDLE_SEED,
            local=local,
            store=None if store is None else Path(store),
            reopen_ranks=reopen_ranks,
        )
        print(f"needles    {found.found} of {found.planted} in {time.monotonic() - began:.1f} s")
        if found.missed_positions:
            where = ", ".join(map(str, found.missed_positions[:8]))
            raise RingspanError(
                f"{len(found.missed_positions)} of {found.planted} needles were not found (at"
                f" positions {where}{', ...' if len(found.missed_positions) > 8 else ''});"
                " with codec raw and margin 1 this means that KV was lost or damaged"
            )


def _break_the_store(num_faults: int, seed: int) -> None:
    if num_faults < 1:
        raise BadInput(f"--store-faults {num_faults}: wanted at least 1")
    import logging

    import torch

    from ringspan.kvstore.faults.simulate import simulate

    logging.getLogger("ringspan.kvstore.journal").setLevel(logging.ERROR)  # it is cut all the time
    torch.set_num_threads(1)
    report = simulate(num_faults, seed)
    print(f"faults     {report.num_faults:,} in {report.steps:,} steps, seed {seed}")
    for kind, count in report.faults.items():
        print(f"  {kind:26} {count:10,}")
    print("became")
    for what, count in report.counts.items():
        print(f"  {what:26} {count:10,}")
    print(
        f"repairs    {report.repairs:,}, {report.repair_mean_s:.3f} s each, the longest"
        f" {report.repair_max_s:.3f} s (simulated time)"
    )
    print(f"wrong KV   {report.wrong} pages served; {report.lost} contexts lost that need not be")
    print(f"time       {report.elapsed_s:.1f} s for {report.simulated_s:,.0f} simulated s")


def _retriever(heads: str, margin: float) -> str:
    q, slash, kv = heads.partition("/")
    if not slash or not q.isdigit() or not kv.isdigit():
        raise BadInput(f"--heads {heads!r}: wanted q/kv, such as 32/8")
    return f"retriever:q={q},kv={kv},margin={margin:g}"


def _check_needles(num_tokens: int, num_needles: int) -> None:
    from ringspan.attention.models.needles import plant

    if num_tokens < 1:
        raise BadInput(f"--needles {num_tokens}: wanted the number of tokens to hide needles in")
    plant(min(num_tokens, 4 * num_needles + 1), num_needles)  # refuses what has no room


def _tell_machine(machine: Hardware, versions: dict[str, str]) -> None:
    memory = bytes_words(machine.memory_bytes)
    print(f"host       {machine.host}: {machine.cpu}, {machine.cores} cores, {memory}")
    for number, gpu in enumerate(machine.gpus):
        print(f"gpu {number}      {gpu.name}, {bytes_words(gpu.memory_bytes)}, driver {gpu.driver}")
    if not machine.gpus:
        print("gpu        none that nvidia-smi shows: ranks run on the CPU, over gloo")
    print("versions   " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def _tell_backends(cuda: bool) -> None:
    from ringspan.attention.local import explain

    chosen = False
    for name, usable, reason in explain("cuda" if cuda else "cpu"):
        first = usable and not chosen
        chosen = chosen or usable
        mark = "chosen" if first else ("usable" if usable else "no")
        print(f"attention  {name:14} {mark:7} {'' if reason == 'usable' else reason}".rstrip())


def _measure(record: RunRecord, cuda: bool) -> None:
    import torch

    from ringspan.deploy.measure import measure_device

    device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
    with record.phase("measure"):
        record.measured |= measure_device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for name, value in record.measured.items():
        print(f"speed      {name:24} {value:,.3g}  ({device.type})")
