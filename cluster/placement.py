"""Where a gang's ranks go: pure, so that it is tested without a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringspan.errors import BadInput, TooLarge

GPU_RANK_THREADS = 4


@dataclass(frozen=True)
class NodeView:
    """A live node and all it has, free or not."""

    node_id: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class GangNeed:
    world_size: int
    device: str
    """`auto`: cuda if the cluster has any GPU."""
    threads: int
    """CPU threads of a rank; 0 deals a node's cores evenly."""
    one_process: bool
    """Loopback: all ranks in one actor on one device."""


@dataclass(frozen=True)
class Place:
    device: str
    """`cpu` or `cuda`."""
    num_bundles: int
    """Actors; one rank each, or one with all ranks."""
    bundle: dict[str, float]
    """What each reserves."""
    threads: int
    strategies: tuple[str, ...]
    """Placement strategies to try, best first."""
    text: str
    """What one rank takes, for errors."""


def place_gang(nodes: Sequence[NodeView], need: GangNeed) -> Place:
    """TooLarge when the cluster could not hold the gang even if nobody else used it.

    One rank takes one GPU and a CPU, or its threads' CPUs. All on one node if one node can hold
    them (links within a host are the fast ones), else spread over as few as Ray finds.
    """
    cpus = sum(node.num_cpus for node in nodes)
    gpus = sum(node.num_gpus for node in nodes)
    if need.device not in ("auto", "cpu", "cuda"):
        raise BadInput(f"unknown device {need.device!r}; known: auto, cpu, cuda")
    device = need.device if need.device != "auto" else ("cuda" if gpus >= 1 else "cpu")
    actors = 1 if need.one_process else need.world_size
    if device == "cuda" and gpus < actors:
        raise _too_large(need, actors, f"{gpus:g} GPU{'s' * (gpus != 1)}", int(gpus))
    if cpus < actors:
        raise _too_large(need, actors, f"{cpus:g} CPU{'s' * (cpus != 1)}", int(cpus))
    smallest = {"CPU": 1.0, **({"GPU": 1.0} if device == "cuda" else {})}
    fitting = _fits(nodes, smallest)
    if fitting < actors:
        wanted = "a GPU and a CPU of the same node" if device == "cuda" else "a CPU"
        raise _too_large(need, actors, f"{fitting} with {wanted}", fitting)
    whole = [node for node in nodes if _fits([node], smallest) >= actors]
    threads = need.threads or _even_threads(whole or nodes, actors, smallest, bool(whole))
    bundle = {**smallest, "CPU": float(threads)}
    if _fits(whole or nodes, bundle) < actors:  # more threads than CPUs is the caller's choice
        bundle = smallest
    if not whole:
        strategies: tuple[str, ...] = ("PACK",)
    else:
        strategies = ("STRICT_PACK",) if len(nodes) == 1 else ("STRICT_PACK", "PACK")
    per_rank = f"{bundle['CPU']:g} CPU" + (" and 1 GPU" if device == "cuda" else "")
    return Place(
        device=device,
        num_bundles=actors,
        bundle=bundle,
        threads=threads,
        strategies=strategies,
        text=f"{per_rank} each" if not need.one_process else f"{per_rank} for all",
    )


def _even_threads(
    nodes: Sequence[NodeView], actors: int, smallest: dict[str, float], one_node: bool
) -> int:
    """A rank's share of the cores of the smallest node that can take part."""
    hosts = [node for node in nodes if _fits([node], smallest)]
    per_node = actors if one_node else -(-actors // len(hosts))
    share = max(1, int(min(node.num_cpus for node in hosts) // per_node))
    # beside a GPU the host only launches kernels and reads and writes pages
    return min(share, GPU_RANK_THREADS) if "GPU" in smallest else share


def _fits(nodes: Sequence[NodeView], bundle: dict[str, float]) -> int:
    """How many such bundles the nodes can hold."""
    count = 0
    for node in nodes:
        fit = node.num_cpus // bundle["CPU"]
        if "GPU" in bundle:
            fit = min(fit, node.num_gpus // bundle["GPU"])
        count += int(fit)
    return count


def _too_large(need: GangNeed, actors: int, found: str, most: int) -> TooLarge:
    ranks = f"{need.world_size} rank{'s' * (need.world_size != 1)}"
    if need.one_process:
        return TooLarge(f"{ranks} in one process asked for, the cluster has {found}: add a node")
    advice = f"ask for at most {most}" if most else "add a node"
    return TooLarge(
        f"{ranks} asked for, the cluster has {found}: {advice}, or put all ranks on one device "
        "with the loopback transport"
    )
