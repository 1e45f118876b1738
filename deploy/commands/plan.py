"""`ringspan plan`: how a prefill would be done, what every other way would cost, and what fits.

Without a GPU, a Ray or weights: the model's config says what there is to do, a table of machines
(`--device-name`) or this machine's own measured speeds say how fast. stdout has the table.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ringspan.attention.cost import Link, Speeds, assumed_speeds, machine
from ringspan.cluster.messages import GangSpec, ModelFacts, ModelSpec
from ringspan.deploy.checks import check_model, check_model_name, check_plan_names, check_scheme
from ringspan.deploy.commands import options
from ringspan.deploy.record import check_writable
from ringspan.errors import BadInput, StoreError, TooLarge

if TYPE_CHECKING:  # torch takes seconds to import: only a run that passed its checks does
    from ringspan.cluster.planner import Candidate

Tokens = Annotated[int, typer.Option("--tokens", "-n", help="New tokens to prefill.")]
PlanRanks = Annotated[int, typer.Option("--ranks", "-p", help="Ranks, one device each.")]
Cached = Annotated[int, typer.Option("--cached", help="Tokens that the ranks hold already.")]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device-name",
        help="a100, h100 or h200 by the built-in table; default: this machine, if its speeds were "
        "measured (by `ringspan prefill`).",
    ),
]
LinkGbs = Annotated[
    float | None, typer.Option("--link-gbs", help="GB/s that a rank sends, and receives, at once.")
]
LinkLatency = Annotated[
    float | None, typer.Option("--link-latency-us", help="Microseconds of an empty exchange.")
]
MemoryGib = Annotated[
    float | None,
    typer.Option(
        "--memory-gib", help="Of a device; default: the named one's, else this machine's."
    ),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        help="Also place it on so many idle nodes of eight --device-name, as the controller would.",
    ),
]
Ttft = Annotated[float, typer.Option("--ttft", help="Seconds to the first token; for --nodes.")]
RESERVE_SHARE = 0.05
"""Of a device's memory is the context's, the driver's and the allocator's."""
PLANNED_DTYPES = {"auto": "bfloat16"}


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    scheme: str
    layout: str
    chunk_tokens: int
    predicted_s: float
    tflops_per_device: float
    exposed_s: float
    sent_bytes: int
    """By the rank that sends most."""
    memory_bytes: int
    """On the fullest rank, weights included."""
    fits: bool
    predicted_chunk_s: tuple[float, ...]


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes."""

    model: str
    tokens: int
    cached_tokens: int
    ranks: int
    codec: str
    flops: float
    speeds: Speeds
    link: Link
    memory_bytes: int
    """Of one device, free for all of it."""
    chosen: Shown | None
    """None where nothing fits."""
    candidates: tuple[Shown, ...]
    """The fastest first."""


def plan(
    model: options.Model,
    tokens: Tokens,
    ranks: PlanRanks,
    cached: Cached = 0,
    codec: options.Codec = "raw",
    scheme: options.Scheme = "auto",
    layout: options.Layout = "auto",
    chunk_tokens: options.ChunkTokens = None,
    device_name: DeviceName = None,
    link_gbs: LinkGbs = None,
    link_latency_us: LinkLatency = None,
    memory_gib: MemoryGib = None,
    rope_scaling: options.RopeScaling = None,
    dtype: options.Dtype = "auto",
    backend: options.Backend = "auto",
    nodes: Nodes = None,
    ttft: Ttft = 60.0,
    json: options.Json = None,
) -> None:
    """Predict every way to prefill, and choose; without weights, Ray or a GPU."""
    if tokens < 1 or cached < 0 or ranks < 1:
        raise BadInput(
            f"--tokens {tokens}, --cached {cached}, --ranks {ranks}: wanted at least 1, 0 and 1"
        )
    if device_name is None and ranks > 1 and link_gbs is None:
        raise BadInput(
            f"--ranks {ranks}: wanted the link between them too, --link-gbs and --link-latency-us,"
            " or a known machine, --device-name"
        )
    if nodes is not None and (nodes < 1 or device_name is None or not ttft > 0):
        raise BadInput(
            f"--nodes {nodes}, --ttft {ttft:g}: wanted at least 1 node of a known machine"
            " (--device-name), and more than 0 s"
        )
    for name, value in (("--link-gbs", link_gbs), ("--memory-gib", memory_gib)):
        if value is not None and not value > 0:
            raise BadInput(f"{name} {value:g}: wanted more than 0")
    if link_latency_us is not None and not link_latency_us >= 0:
        raise BadInput(f"--link-latency-us {link_latency_us:g}: wanted 0 or more")
    if json is not None:
        check_writable(json)
    check_plan_names(codec, scheme, layout)
    named = device_name is not None
    if device_name is not None:
        machine(device_name)  # refuses an unknown one before the model is read
    spec = GangSpec(
        world_size=ranks,
        model=ModelSpec(
            name=model,
            dtype=PLANNED_DTYPES.get(dtype, dtype) if named else dtype,
            rope_scaling=rope_scaling,
        ),
        backend=backend,
    )
    check_model_name(spec.model)
    facts = check_model(spec)
    check_scheme(scheme, facts, ranks)
    made = _planned(
        facts,
        tokens,
        cached,
        ranks,
        codec=codec,
        scheme=scheme,
        layout=layout,
        chunk_tokens=chunk_tokens,
        device_name=device_name,
        backend=backend,
        link_gbs=link_gbs,
        link_latency_us=link_latency_us,
        memory_gib=memory_gib,
    )
    for line in _told(made, facts):
        print(line)
    if json is not None:
        try:
            json.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
        except OSError as error:
            raise StoreError(f"cannot write the record {json}: {error.strerror}") from None
    if nodes is not None and device_name is not None:
        from ringspan.cluster.simulate_runs import explained

        print(f"\n{explained(facts, device_name, nodes, tokens, cached, ttft)}")
    if made.chosen is None:
        from ringspan.kvstore.codecs.registry import or_smaller

        least = min(made.candidates, key=lambda one: one.memory_bytes)
        raise TooLarge(
            f"nothing fits {_gib(made.memory_bytes)} a device; the least is"
            f" {_gib(least.memory_bytes)} ({least.scheme}, chunks of {least.chunk_tokens:,}): use"
            f" fewer tokens, more ranks{or_smaller(codec)}"
        )


def _planned(
    facts: ModelFacts,
    tokens: int,
    cached: int,
    ranks: int,
    *,
    codec: str,
    scheme: str,
    layout: str,
    chunk_tokens: int | None,
    device_name: str | None,
    backend: str,
    link_gbs: float | None,
    link_latency_us: float | None,
    memory_gib: float | None,
) -> PlanRecord:
    from ringspan.attention.models.facts import check_positions, prefill_flops
    from ringspan.cluster.planner import PrefillOptions, candidates, check_options, choose
    from ringspan.cluster.runtime import TILE_ROWS
    from ringspan.types import page_tokens_for

    check_positions(facts, cached + tokens)
    asked = PrefillOptions(layout=layout, scheme=scheme, codec=codec, chunk_tokens=chunk_tokens)
    page_tokens = page_tokens_for(facts.head_dim)
    check_options(asked, facts, ranks, page_tokens)
    if cached % page_tokens:
        raise BadInput(
            f"--cached {cached}: wanted whole pages of {page_tokens} tokens; the nearest is"
            f" {cached // page_tokens * page_tokens}"
        )
    speeds, link, memory_bytes = _machine(facts, ranks, device_name, backend)
    if memory_gib is not None:
        memory_bytes = int(memory_gib * 2**30)
    if link_gbs is not None:
        link = msgspec.structs.replace(link, bytes_per_s=link_gbs * 1e9)
    if link_latency_us is not None:
        link = msgspec.structs.replace(link, latency_s=link_latency_us / 1e6)
    width = 4 if facts.dtype == "float32" else 2
    weights_bytes = facts.num_params * width
    free_bytes = int(memory_bytes * (1 - RESERVE_SHARE)) - weights_bytes
    if free_bytes <= 0:
        raise TooLarge(
            f"the weights of {facts.name} take {_gib(weights_bytes)} of every device, which has"
            f" {_gib(memory_bytes)}: use a larger device, or a smaller model"
        )
    flops = prefill_flops(facts, tokens, cached)
    every = candidates(
        facts,
        speeds,
        link,
        tokens,
        ranks,
        asked,
        free_bytes,
        cached_tokens=cached,
        tile_rows=TILE_ROWS,
        fused=speeds.attend_call_s > 0,
    )
    best = choose(every)

    def shown(one: Candidate) -> Shown:
        return Shown(
            scheme=one.scheme,
            layout=one.layout,
            chunk_tokens=one.chunk_tokens,
            predicted_s=one.seconds,
            tflops_per_device=flops / one.seconds / ranks / 1e12,
            exposed_s=one.predicted.exposed_s,
            sent_bytes=one.predicted.sent_bytes,
            memory_bytes=one.need.total_bytes + weights_bytes,
            fits=one.fits,
            predicted_chunk_s=one.predicted.chunk_s,
        )

    return PlanRecord(
        model=facts.name,
        tokens=tokens,
        cached_tokens=cached,
        ranks=ranks,
        codec=codec,
        flops=flops,
        speeds=speeds,
        link=link,
        memory_bytes=free_bytes + weights_bytes,
        chosen=None if best is None else shown(best),
        candidates=tuple(shown(one) for one in every),
    )


def _machine(
    facts: ModelFacts, ranks: int, device_name: str | None, backend: str
) -> tuple[Speeds, Link, int]:
    """Speeds and link of a device, and its bytes of memory. Of this machine only the device is
    known before a gang has met: its link is the caller's to say."""
    if device_name is not None:
        found = machine(device_name)
        return assumed_speeds(device_name, facts), found.link, found.memory_bytes
    from ringspan.cluster.device import device_named
    from ringspan.cluster.speeds import cached_speeds, speeds_key
    from ringspan.deploy.machine import hardware

    device = device_named("auto")
    threads = max(1, (os.cpu_count() or 1) // ranks)  # as a gang deals them
    speeds = cached_speeds(speeds_key(device, facts, backend, threads))
    if speeds is None:
        raise BadInput(
            f"the speeds of this machine were not measured for {facts.name} ({facts.dtype}): name a"
            " device with --device-name, or run `ringspan prefill --measure` here once"
        )
    this, alone = hardware(), Link(latency_s=0.0, bytes_per_s=speeds.copy_bytes_per_s)
    if device.type == "cuda":
        return speeds, alone, this.gpus[0].memory_bytes
    return speeds, alone, this.memory_bytes // ranks  # ranks of one host share its memory


def _told(made: PlanRecord, facts: ModelFacts) -> list[str]:
    """For a person: what is planned for, the table, the choice."""
    link = made.link
    behind = f" behind {made.cached_tokens:,} cached" if made.cached_tokens else ""
    lines = [
        f"{made.tokens:,} tokens{behind} of {made.model} ({facts.dtype}, KV as {made.codec}) over"
        f" {made.ranks} x {made.speeds.device_name}, {made.flops:.3g} FLOP",
        f"speeds     {made.speeds.source}",
    ]
    if made.ranks > 1:
        lines.append(
            f"link       {link.bytes_per_s / 1e9:.4g} GB/s each way, {link.latency_s * 1e6:.3g} us"
        )
    lines.append(
        f"{'':2}{'scheme':13}{'layout':11}{'chunk':>10}{'seconds':>11}{'TFLOP/s':>9}"
        f"{'exposed s':>11}{'sent GB':>10}{'memory':>12}  fits"
    )
    for one in made.candidates:
        mark = "*" if one == made.chosen else " "
        lines.append(
            f"{mark} {one.scheme:13}{one.layout:11}{one.chunk_tokens:10,}{one.predicted_s:11.4g}"
            f"{one.tflops_per_device:9.1f}{one.exposed_s:11.3g}{one.sent_bytes / 1e9:10.3g}"
            f"{_gib(one.memory_bytes):>12}  {'yes' if one.fits else 'no'}"
        )
    if made.chosen is not None:
        lines += _choice(made, made.chosen)
    return lines


def _choice(made: PlanRecord, chosen: Shown) -> list[str]:
    from ringspan.cluster.planner import TIE

    lines = [
        f"choice     {_name(chosen)}: {chosen.predicted_s:.4g} s,"
        f" {chosen.tflops_per_device:.3g} TFLOP/s a device, {_gib(chosen.memory_bytes)} of"
        f" {_gib(made.memory_bytes)} a device"
    ]
    others = [one for one in made.candidates if one.fits and one != chosen]
    if others:
        first = others[0]
        more = first.predicted_s / chosen.predicted_s - 1
        why = f" but {_gib(first.memory_bytes)}" if more < 0 else ""
        equal = f" (less than {TIE:.0%} apart counts as equal)" if more < 0 else ""
        lines.append(
            f"runner-up  {_name(first)}: {first.predicted_s:.4g} s ({more:+.1%}){why}{equal}"
        )
        worst = others[-1]
        more = worst.predicted_s / chosen.predicted_s - 1
        lines.append(f"worst      {_name(worst)}: {worst.predicted_s:.4g} s ({more:+.1%})")
    return lines


def _name(one: Shown) -> str:
    return f"{one.scheme}, {one.layout}, chunks of {one.chunk_tokens:,}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
