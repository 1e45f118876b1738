"""One simulated cluster for each policy: the same trace, the same faults, another set of rules."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from ringspan.attention.cost import Link, assumed_speeds, machine
from ringspan.cluster.placing import place
from ringspan.cluster.placing_blocks import ANY, Holding, Node
from ringspan.cluster.placing_costs import Costs
from ringspan.cluster.placing_explain import explain_placement
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Request
from ringspan.cluster.policy import DECODE, PREFILL, policy
from ringspan.cluster.simulate import Simulation
from ringspan.cluster.simulate_faults import Fault, drawn_faults
from ringspan.cluster.simulate_score import Figures
from ringspan.cluster.workload import Trace, drawn, read_trace
from ringspan.errors import TooLarge
from ringspan.specs import ModelFacts

RESERVE_SHARE = 0.05
WORKSPACE_BYTES = 10 * 2**30
"""Of a device, beside weights and KV: a chunk's activations and exchanges."""
NODES_OF_A_RACK = 16
HOURS_S = 3600.0


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is simulated, but for the policy."""

    nodes: int
    node_devices: int = 8
    device_name: str = "h200"
    network_gbs: float = 50.0
    """GB/s of each device to other nodes, each way."""
    host_gib: float = 1024.0
    """Of a node's memory, for pages that were written behind."""
    largest_nodes: int = 4
    fault_hours: float = 0.0
    """Between two faults of one device, in the mean; 0: none."""
    resumes: bool = True
    trace: Trace
    file: str = ""
    """A JSONL trace instead of the drawn one."""


class SimulateRow(msgspec.Struct, frozen=True, kw_only=True):
    """What `ringspan simulate --json` writes, one a policy."""

    benchmark: str
    policy: str
    setting: Setting
    model: str
    speeds: str
    """Where the speeds are from."""
    figures: Figures
    decision_mean_s: float
    """Processor time of one placement."""
    decision_p99_s: float
    elapsed_s: float
    """Of the simulation, on the machine's clock."""
    broken: tuple[str, ...]
    """What must never be, and was; empty."""
    command: str


def costs_of(facts: ModelFacts, device_name: str, network_gbs: float, node_devices: int) -> Costs:
    found = machine(device_name)
    network = Link(latency_s=1e-4, bytes_per_s=network_gbs * 1e9)
    return Costs(
        facts, assumed_speeds(device_name, facts), found.link, network, node_devices=node_devices
    )


def cluster_of(setting: Setting, costs: Costs, *, split: bool) -> ClusterState:
    """Empty. split: every other node is for prefill, the others decode. TooLarge where the weights
    leave no room."""
    memory = machine(setting.device_name).memory_bytes
    free = memory * (1 - RESERVE_SHARE) - WORKSPACE_BYTES - costs.weights_bytes
    if free <= 0:
        raise TooLarge(
            f"the weights of {costs.facts.name} take {costs.weights_bytes / 1e9:.3g} GB of every"
            f" {setting.device_name}, which has {memory / 1e9:.3g} GB: use a larger device, or a"
            " smaller model"
        )
    half = setting.nodes // 2
    nodes = [
        Node(
            f"n{number}",
            setting.node_devices,
            f"r{number // NODES_OF_A_RACK}",
            (PREFILL if number < setting.nodes - half else DECODE) if split else ANY,
        )
        for number in range(setting.nodes)
    ]
    host_bytes = setting.host_gib * 2**30
    return ClusterState(nodes, free, host_bytes, largest_nodes=setting.largest_nodes)


def run_policy(
    name: str, setting: Setting, facts: ModelFacts, command: str = "", *, check: bool = False
) -> SimulateRow:
    """The whole trace under one policy. UnknownName, BadInput for what is asked wrongly."""
    chosen = policy(name)
    costs = costs_of(facts, setting.device_name, setting.network_gbs, setting.node_devices)
    state = cluster_of(setting, costs, split=chosen.split)
    faults: Iterator[Fault] = iter(())
    if setting.fault_hours > 0:
        faults = drawn_faults(len(state.devices), setting.fault_hours * HOURS_S, setting.trace.seed)
    simulation = Simulation(
        state, costs, chosen.rules, faults=faults, resumes=setting.resumes, check=check
    )
    trace = setting.trace
    requests = drawn(trace)
    if setting.file:
        requests = islice(read_trace(Path(setting.file)), trace.requests)
    gc.collect()
    gc.freeze()  # the cluster lives as long as the run: no collection need look at it again
    began = time.perf_counter()
    try:
        score = simulation.run(requests)
    finally:
        gc.unfreeze()
    elapsed = time.perf_counter() - began
    decisions = sorted(simulation.decisions_s) or [0.0]
    return SimulateRow(
        benchmark="simulate",
        policy=name,
        setting=setting,
        model=facts.name,
        speeds=costs.speeds.source,
        figures=score.figures(),
        decision_mean_s=sum(decisions) / len(decisions),
        decision_p99_s=decisions[int(0.99 * (len(decisions) - 1))],
        elapsed_s=elapsed,
        broken=tuple(score.broken[:20]),
        command=command,
    )


def explained(
    facts: ModelFacts, device_name: str, nodes: int, tokens: int, cached: int, ttft_s: float
) -> str:
    """Where a request would go on idle nodes; cached tokens lie on the first gang with room."""
    setting = Setting(nodes=nodes, device_name=device_name, trace=Trace(requests=1, rate=1.0))
    costs = costs_of(facts, device_name, setting.network_gbs, setting.node_devices)
    state = cluster_of(setting, costs, split=False)
    name = "the cached tokens" if cached else ""
    if cached:
        for block in (state.near(0, size)[0] for size in (1, 2, 4, 8)):
            share = costs.kv_bytes(cached) / block.size
            if share <= state.room(block):
                state.hold(Holding(name, cached, block, share, 0.0))
                break
    request = Request(
        request_id=1,
        arrival_s=0.0,
        new_tokens=tokens,
        output_tokens=256,
        ttft_s=ttft_s,
        tpot_s=0.05,
        prefix_id=name,
        prefix_tokens=cached,
    )
    return explain_placement(place(request, state, costs, 0.0), state)
