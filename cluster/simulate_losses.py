"""What a simulated cluster does when devices go, and what must hold whatever happens."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING

from ringspan.cluster.placing_blocks import Holding
from ringspan.cluster.placing_types import Request
from ringspan.cluster.simulate_faults import Fault
from ringspan.cluster.simulate_work import Decoding, Prefill

if TYPE_CHECKING:
    from ringspan.cluster.simulate import Simulation

DETECT_S = 5.0
"""From a death to the decision about it."""
RESUME_S = 2.4
"""A group formed anew."""


def fail(simulation: Simulation, fault: Fault) -> None:
    """Devices go; what they did is placed again after it was noticed, from what is left."""
    state = simulation.state
    lost = [number for number in fault.devices(state) if number not in simulation.down]
    simulation.down.update(lost)
    simulation.score.faults += bool(lost)
    prefills = {id(p): p for number in lost for p in simulation.committed[number].values()}
    sessions = {
        key: simulation.decoding[key]
        for number in lost
        for key in state.devices[number].sessions
        if key in simulation.decoding
    }
    kept_for = [
        p
        for number in lost
        for key in list(state.devices[number].sessions)
        for p in _promised(simulation, key)
    ]
    for number in lost:
        for holding in state.lose(number):
            if (
                not fault.whole_node
                and holding.prefix_id[:1] != "#"
                and (holding.ready_s <= simulation.now_s)
            ):  # its host has what was written behind
                state.hold_on_host(
                    Holding(holding.prefix_id, holding.tokens, holding.block,
                            holding.bytes_per_device, simulation.now_s)
                )  # fmt: skip
    if fault.whole_node and lost:
        state.lose_host(state.node_of[lost[0]])
    for prefill in (*prefills.values(), *kept_for):
        if not prefill.over:
            place_anew(simulation, prefill, fault)
    for one in sessions.values():
        _restore(simulation, one)
    if lost:
        simulation.at(
            simulation.now_s + fault.repair_s, lambda back: _repair(simulation, back), lost
        )


def place_anew(simulation: Simulation, prefill: Prefill, fault: Fault | None) -> None:
    """Given up here and placed anew; of one that ran, sealed chunks are not computed again."""
    request, chosen = prefill.request, prefill.chosen
    sealed = 0
    if prefill.started and fault is not None:
        ends = prefill.chunk_ends_s
        chunks = bisect_right(ends, simulation.now_s)
        if simulation.resumes and not (fault.whole_node and len(chosen.block.nodes) == 1):
            sealed = chunks * chosen.cost.chunk_tokens
        began = ends[chunks - 1] if chunks else prefill.start_s
        into = (simulation.now_s - began) / max(ends[min(chunks, len(ends) - 1)] - began, 1e-9)
        chunk = min(chosen.cost.chunk_tokens, request.tokens - chosen.cached_tokens)
        done = chunks * chosen.cost.chunk_tokens + min(max(into, 0.0), 1.0) * chunk
        lost_tokens = int(done - sealed)
        prefill.outcome.recomputed_tokens += lost_tokens
        prefill.outcome.device_s += chosen.block.size * (simulation.now_s - prefill.start_s)
        if sealed and lost_tokens > chunk:
            simulation.score.broken.append(
                f"{lost_tokens} tokens computed again, a chunk has {chunk}"
            )
    simulation.end(prefill)
    simulation.give_back(prefill.pages, whole=False)
    if prefill.kept is not None:
        simulation.state.leave(prefill.decode.block, request.request_id)
    simulation.give_back(prefill.sent, whole=False)
    if sealed:
        tokens = min(chosen.cached_tokens + sealed, request.tokens - 1)
        bytes_each = simulation.costs.kv_bytes(tokens) / chosen.block.size
        part = f"={request.request_id}" if not request.prefix_id else request.prefix_id
        simulation.state.hold_on_host(
            Holding(part, tokens, chosen.block, bytes_each, simulation.now_s)
        )
        request = _behind(request, part, tokens)
    wait = DETECT_S + RESUME_S if fault is not None else 0.0
    simulation.at(simulation.now_s + wait, simulation.place_again, (request, prefill.outcome))


def verify(simulation: Simulation) -> None:
    """What must hold after every event; what does not is written down."""
    broken = simulation.score.broken
    for number, device in enumerate(simulation.state.devices):
        if device.pinned_bytes > device.capacity_bytes * (1 + 1e-9):
            broken.append(f"device {number} pins {device.pinned_bytes:.4g} bytes")
        spans = sorted(
            (p.start_s, p.end_s, p.request.request_id)
            for p in simulation.committed[number].values()
            if not (p.started and len(p.chunk_ends_s) > 2)
        )
        for (_, end, a), (start, _, b) in pairwise(spans):
            if start < end - 1e-6:
                broken.append(f"device {number}: prefills {a} and {b} overlap")
        if number in simulation.down and (simulation.committed[number] or device.sessions):
            broken.append(f"device {number} is gone and has work")
    if any(page.lost for one in simulation.decoding.values() for page in one.pages):
        broken.append("a session decodes over pages that are gone")


def _promised(simulation: Simulation, key: int) -> list[Prefill]:
    """Prefills that were to hand over to a session's place."""
    for committed in simulation.committed:
        if key in committed:
            return [committed[key]]
    return []


def _restore(simulation: Simulation, one: Decoding) -> None:
    """A session whose devices went: its pages are fetched or computed again, and it goes on."""
    request = one.request
    simulation.leave(one)
    simulation.give_back(one.pages)
    elapsed = max(0.0, simulation.now_s - one.began_s) / max(one.ends_s - one.began_s, 1e-9)
    said = min(int(elapsed * request.output_tokens), request.output_tokens - 1)
    left = _continued(request, said)
    simulation.at(
        simulation.now_s + DETECT_S + RESUME_S, simulation.place_again, (left, one.outcome)
    )


def _repair(simulation: Simulation, devices: list[int]) -> None:
    for number in devices:
        simulation.down.discard(number)
        simulation.state.regain(number)


def _behind(request: Request, part: str, tokens: int) -> Request:
    """The same request, of whose tokens so many are sealed under `part`."""
    return Request(
        request_id=request.request_id,
        arrival_s=request.arrival_s,
        new_tokens=request.tokens - tokens,
        output_tokens=request.output_tokens,
        ttft_s=request.ttft_s,
        tpot_s=request.tpot_s,
        prefix_id=part,
        prefix_tokens=tokens,
        keeps=request.keeps,
        priority=request.priority + 1,
        lowest_bits=request.lowest_bits,
    )


def _continued(request: Request, said: int) -> Request:
    """What is left of an answer of which `said` tokens were given: they are part of the prompt."""
    return Request(
        request_id=request.request_id,
        arrival_s=request.arrival_s,
        new_tokens=request.new_tokens + said,
        output_tokens=request.output_tokens - said,
        ttft_s=request.ttft_s,
        tpot_s=request.tpot_s,
        prefix_id=request.prefix_id,
        prefix_tokens=request.prefix_tokens,
        keeps=request.keeps,
        priority=request.priority + 1,
        lowest_bits=request.lowest_bits,
    )
