"""Where an answer is decoded: over the shards where they lie, or by a gang that decodes. Pure.

Device seconds decide. A session on a gang with nothing else on it takes all of it, since its
devices decode and long prefills stay away. Among other sessions it takes only what its own keys add
to every step, since the weights are read once for all. Against that stands the move of its pages,
of which only what the prefill does not hide delays the first token.
"""

from __future__ import annotations

from ringspan.cluster.placing_blocks import Block, Holding
from ringspan.cluster.placing_costs import Costs
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Candidate, Decode, Request, Rules

TPOT_SHARE = 0.7
"""Of the limit per token that a gang is filled to: sessions also wait for prefills."""
MOST_TRIED = 4
MOST_SESSIONS = 128


def choose_decode(
    request: Request, chosen: Candidate, state: ClusterState, costs: Costs, rules: Rules
) -> Decode | None:
    """None where no gang has room."""
    if not request.output_tokens:
        return Decode(chosen.block, True, None, "raw", 0.0, 0.0, 0.0, 0.0)
    limit = TPOT_SHARE * request.tpot_s
    here = _in_place(request, chosen, state, costs)
    if rules.decode == "in place":
        return here
    best: Decode | None = None
    if rules.decode == "best" and here.step_s <= limit:
        best = here
    sizes = rules.sizes or state.sizes(rules.decode_pool)
    for size in sizes:
        if size > costs.node_devices:
            break
        found = _handed(size, limit, request, chosen, state, costs, rules)
        if found is not None:
            if best is None or found.device_s < best.device_s:
                best = found
            break
    if best is None and rules.decode == "remote":
        return _last_resort(request, chosen, state, costs, rules)
    return best or here


def _in_place(request: Request, chosen: Candidate, state: ClusterState, costs: Costs) -> Decode:
    block = chosen.block
    own = costs.kv_bytes(request.tokens + request.output_tokens) / block.size
    step = costs.step_s(block.size, state.read_bytes(block) + own)
    taken = _taken(block, own, step, costs)
    return Decode(
        block, True, None, "raw", 0.0, 0.0, step, block.size * request.output_tokens * taken
    )


def _handed(
    size: int,
    limit: float,
    request: Request,
    chosen: Candidate,
    state: ClusterState,
    costs: Costs,
    rules: Rules,
) -> Decode | None:
    """A gang of this size: one with the prefix, one that decodes, or one with nothing on it."""
    pool = rules.decode_pool
    tried: list[tuple[Block, Holding | None]] = []
    if request.prefix_tokens:
        for held in state.holders.get(request.prefix_id, ())[-MOST_TRIED:]:
            block = held.block
            if (
                block.size == size and block.pool == pool and block.sessions and not held.on_host
                and not block.lost and not block.prefills
            ):  # fmt: skip
                tried.append((block, held))
    tried += [(block, None) for block in state.decoding(pool, size, MOST_TRIED)]
    quiet = state.quiet(pool, size)
    if quiet is not None:
        tried.append((quiet, None))
    for block, holding in tried:
        if _overlap(block, chosen.block):
            continue
        one = _on(block, holding, limit, request, chosen, state, costs)
        if one is not None:
            return one
    return None


def _on(
    block: Block,
    holding: Holding | None,
    limit: float,
    request: Request,
    chosen: Candidate,
    state: ClusterState,
    costs: Costs,
) -> Decode | None:
    if len(state.devices[block.first].sessions) >= MOST_SESSIONS:
        return None
    size, tokens, there = block.size, request.tokens, 0
    own = (tokens + request.output_tokens) * costs.raw_bytes / size
    step = costs.step_s(size, state.read_bytes(block) + own)
    if step > limit:
        return None
    needed = own
    if holding is not None:
        there = min(holding.tokens, request.prefix_tokens)
        if not request.keeps:
            needed -= costs.kv_bytes(there) / size
        needed += state.would_pin(holding, block)
    if chosen.holding is not None and chosen.holding is not holding:
        needed += state.would_pin(chosen.holding, block)
    if needed > state.room(block):
        return None
    moved_tokens = tokens - there
    near = block.nodes[0] in chosen.block.nodes
    lossy = request.lowest_bits <= 8
    move_s, wire, moved = costs.move(moved_tokens, chosen.block.size, size, near, lossy)
    last = min(moved_tokens, chosen.cost.chunk_tokens)
    last_s = move_s * last / max(moved_tokens, 1)
    exposed = max(last_s, move_s - (chosen.end_s - chosen.start_s) + last_s)
    taken = _taken(block, own, step, costs)
    cost = size * request.output_tokens * taken
    return Decode(block, False, holding, wire, moved, exposed, step, cost)


def _last_resort(
    request: Request, chosen: Candidate, state: ClusterState, costs: Costs, rules: Rules
) -> Decode | None:
    """Over the limit per token, but an answer: the gang among a few that is least so."""
    pool = rules.decode_pool
    found: list[Decode] = []
    for size in rules.sizes or state.sizes(pool):
        for block in state.decoding(pool, size, MOST_TRIED):
            one = _on(block, None, float("inf"), request, chosen, state, costs)
            if one is not None:
                found.append(one)
    return min(found, key=lambda one: one.step_s, default=None)


def _taken(block: Block, own: float, step: float, costs: Costs) -> float:
    """Seconds of each device that a token takes from others: among sessions, what its own keys add;
    alone, the whole step."""
    return own / costs.speeds.scan_bytes_per_s if block.sessions else step


def _overlap(a: Block, b: Block) -> bool:
    return a.first < b.first + b.size and b.first < a.first + a.size
