"""A placement for a person to read: the choice, every candidate, and what each loser would cost."""

from __future__ import annotations

from ringspan.cluster.placing_blocks import Block
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Candidate, Decision, Refused


def explain_placement(decision: Decision, state: ClusterState) -> str:
    """Lines: the request, the table of candidates (the chosen one with a star), the decode."""
    request = decision.request
    said = f"request {request.request_id}: {request.new_tokens:,} new tokens"
    if request.prefix_tokens:
        said += f" behind {request.prefix_tokens:,} of {request.prefix_id}"
    said += f", first token within {request.ttft_s:.3g} s, {1e3 * request.tpot_s:.3g} ms a token"
    if isinstance(decision, Refused):
        return f"{said}\nrefused: {decision.reason}"
    lines = [
        said,
        f"  {'ranks':>5}  {'where':24}{'prefix':11}{'wait s':>9}{'move s':>9}{'prefill s':>11}"
        f"{'ready s':>10}{'device s':>11}  against the choice",
    ]
    chosen = decision.chosen
    for one in sorted(decision.candidates, key=lambda one: (one is not chosen, one.device_s)):
        lines.append(_line(one, chosen, request.arrival_s, state))
    decode, cost = decision.decode, chosen.cost
    lines.append(
        f"prefill    {cost.scheme}, chunks of {cost.chunk_tokens:,}, ring"
        f" {' '.join(str(device) for device in chosen.block.ring)}"
    )
    if decode.in_place:
        where = "in place over the shards"
    else:
        where = (
            f"handed to {place_of(decode.block, state)} while the prefill runs:"
            f" {decode.moved_bytes / 1e9:.3g} GB as {decode.wire}, {decode.exposed_s:.3g} s exposed"
        )
    lines.append(f"decode     {where}; {1e3 * decode.step_s:.3g} ms a token")
    if decision.preempts is not None:
        lines.append(f"preempts   {decision.preempts} at its next chunk boundary; its pages stay")
    if decision.copies:
        lines.append(f"copies     {decision.copies} on another node, written while it runs")
    lines.append(f"quoted     first token after {decision.ttft_s:.3g} s")
    return "\n".join(lines)


def place_of(block: Block, state: ClusterState) -> str:
    """`n3 devices 2-3`, `n0..n1`."""
    names = [state.nodes[number].node_id for number in block.nodes]
    if len(names) > 1:
        return f"{names[0]}..{names[-1]}"
    first = block.first - state.first_of[block.nodes[0]]
    if block.size == 1:
        return f"{names[0]} device {first}"
    return f"{names[0]} devices {first}-{first + block.size - 1}"


def _line(one: Candidate, chosen: Candidate, arrival_s: float, state: ClusterState) -> str:
    mark, against = "*", ""
    if one is not chosen:
        mark = " "
        against = (
            f"{one.device_s - chosen.device_s:+.3g} device s, {one.end_s - chosen.end_s:+.3g} s"
        )
    return (
        f"{mark} {one.block.size:5}  {place_of(one.block, state):24}{one.source:11}"
        f"{one.start_s - arrival_s:9.3g}{one.move_s:9.3g}{one.cost.seconds:11.3g}"
        f"{one.end_s - arrival_s:10.3g}{one.device_s:11.3g}  {against}"
    ).rstrip()
