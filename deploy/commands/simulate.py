"""`ringspan simulate`: policies of placement on a simulated cluster. No GPU, Ray or weights."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.deploy.checks import check_model, check_model_name
from ringspan.deploy.commands import options
from ringspan.errors import BadInput, StoreError

if TYPE_CHECKING:
    from ringspan.cluster.simulate_runs import SimulateRow

Policies = Annotated[
    str, typer.Option("--policies", help="planner, fixed:N, remote:N; separated by commas.")
]
ALL = "planner,fixed:1,fixed:2,fixed:4,fixed:8,remote:1,remote:2,remote:4"


def simulate(
    model: options.Model = "random:llama-3.1-8b",
    nodes: Annotated[int, typer.Option("--nodes", help="Of the cluster.")] = 10,
    node_devices: Annotated[int, typer.Option("--node-devices", help="Of a node.")] = 8,
    device_name: Annotated[str, typer.Option("--device-name", help="a100, h100, h200.")] = "h200",
    network_gbs: Annotated[
        float, typer.Option("--network-gbs", help="GB/s of a device to other nodes, each way.")
    ] = 50.0,
    requests: Annotated[int, typer.Option("--requests", help="How many are simulated.")] = 20_000,
    rate: Annotated[float, typer.Option("--rate", help="Requests a second, in the mean.")] = 11.6,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="JSONL of requests instead of drawn ones.")
    ] = None,
    tpot_ms: Annotated[
        float, typer.Option("--tpot-ms", help="Limit per token of drawn requests.")
    ] = 50.0,
    fault_hours: Annotated[
        float, typer.Option("--fault-hours", help="Between faults of one device; 0: none.")
    ] = 0.0,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Prefills start at token 0 after a fault.")
    ] = False,
    policies: Policies = ALL,
    seed: options.Seed = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Append a JSON row a policy to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table to this file.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Draw a PNG plot into this folder.")
    ] = None,
) -> int:
    """Goodput, time to the first token, bytes moved and recompute, policy by policy."""
    from ringspan.attention.cost import machine
    from ringspan.cluster.policy import policy
    from ringspan.deploy.bench.simulate_table import draw, plain

    if nodes < 1 or node_devices < 1 or node_devices & (node_devices - 1):
        raise BadInput(
            f"--nodes {nodes}, --node-devices {node_devices}: wanted at least 1 node, and a power"
            " of two of devices"
        )
    for name, value in (("--network-gbs", network_gbs), ("--tpot-ms", tpot_ms), ("--rate", rate)):
        if not value > 0:
            raise BadInput(f"{name} {value:g}: wanted more than 0")
    if requests < 1 or fault_hours < 0:
        raise BadInput(
            f"--requests {requests}, --fault-hours {fault_hours:g}: wanted at least 1 and at least"
            " 0"
        )
    machine(device_name)
    names = [name.strip() for name in policies.split(",") if name.strip()]
    for name in names:
        if policy(name).split and nodes < 2:
            raise BadInput(f"policy {name} wants a node for prefill and one for decode; --nodes 1")
    if not names:
        raise BadInput("--policies is empty: wanted names such as planner,fixed:4")
    if plots is not None:
        from ringspan.deploy.bench.plots import check_matplotlib

        check_matplotlib()
    spec = ModelSpec(name=model, dtype="bfloat16")
    check_model_name(spec)
    facts = check_model(GangSpec(world_size=1, model=spec))

    from ringspan.cluster.simulate_runs import Setting, run_policy
    from ringspan.cluster.workload import Trace

    setting = Setting(
        nodes=nodes,
        node_devices=node_devices,
        device_name=device_name,
        network_gbs=network_gbs,
        fault_hours=fault_hours,
        resumes=not no_resume,
        trace=Trace(requests=requests, rate=rate, seed=seed, tpot_s=tpot_ms / 1e3),
        file=str(trace or ""),
    )
    command = shlex.join(["ringspan", *sys.argv[1:]])
    rows: list[SimulateRow] = []
    for name in names:
        row = run_policy(name, setting, facts, command)
        rows.append(row)
        print(f"{name}: {row.elapsed_s:.1f} s of this machine", file=sys.stderr, flush=True)
        if json is not None:
            _write(json, msgspec.json.encode(row) + b"\n", append=True)
    table = plain(rows)
    print(table)
    if markdown is not None:
        _write(markdown, (plain(rows, markdown=True) + "\n").encode())
    if plots is not None:
        print(draw(rows, plots))
    broken = [text for row in rows for text in row.broken]
    for text in broken[:5]:
        print(f"broken: {text}", file=sys.stderr)
    return 1 if broken else 0


def _write(path: Path, data: bytes, *, append: bool = False) -> None:
    try:
        with path.open("ab" if append else "wb") as file:
            file.write(data)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None
