"""Where a request's prefill and decode go: `place(request, state, ...) -> Placed | Refused`. Pure.

One function for the controller, `ringspan plan` and `ringspan simulate`. It reads the state's
indices, so that its time does not grow with the cluster, and changes nothing; what it gives is a
value that holds the candidates it turned down.

1. Candidates: on a gang that holds the prefix; and for each gang size, on the best free block, with
   the prefix moved there or computed again, whichever is sooner. Under 8,192 new tokens one rank,
   unless the keys already lie on more.
2. Of those that give the first token within `TARGET_SHARE` of its limit, the one that takes least
   device seconds; if none does, the soonest; and if that is late, one that comes between two chunks
   of a long prefill (preemption), whose pages stay.
3. Decode: in place over the shards, or handed to a gang that decodes already, its pages sent while
   the prefill runs (placing_decode.py). Counted are the device seconds that each takes from others.
4. Refused, with numbers, is what cannot fit, what would come after the request's patience, and what
   would hold up others' sessions beyond their limits.
"""

from __future__ import annotations

from ringspan.cluster.placing_blocks import Block, Holding
from ringspan.cluster.placing_costs import FORM_S, LEAST_PARALLEL_TOKENS, Costs
from ringspan.cluster.placing_decode import choose_decode
from ringspan.cluster.placing_state import ClusterState
from ringspan.cluster.placing_types import Candidate, Decision, Placed, Refused, Request, Rules

TARGET_SHARE = 0.8
"""Of the limit of the first token: predictions err, and decode has to start."""
MOST_HOLDERS = 3
MOST_DECODING = 3
MOST_VICTIMS = 4
NEAR_MOVE_S = 0.05
"""A prefix that takes longer to come over the network is worth looking for a block near it."""
LEAST_PREEMPTED_S = 1.0
"""A prefill with less than this before it ends is waited for."""
COPY_RECOMPUTE_S = 600.0
"""Device seconds of prefill from which its pages are copied to a second node while it runs: a node
that fails would take them with it, the copy takes no device's time."""


def place(
    request: Request,
    state: ClusterState,
    costs: Costs,
    now_s: float,
    rules: Rules = Rules(),  # noqa: B008 - an immutable value
) -> Decision:
    """Nothing is changed, here or in the state. now_s: the state's time."""
    due_s = request.arrival_s + TARGET_SHARE * request.ttft_s
    found = _candidates(request, state, costs, now_s, due_s, rules)
    if not found:
        return _no_room(request, state, costs, rules)
    chosen = _choose(found, due_s, state, rules)
    preempted: int | None = None
    late = chosen.end_s > due_s or (rules.spares and _stalls(chosen, state))
    if late and rules.preempts and state.running:
        between = _between_chunks(request, state, costs, now_s, chosen)
        if between is not None:
            preempted, chosen = between
            found.append(chosen)
    decode = choose_decode(request, chosen, state, costs, rules)
    if decode is None:
        return _no_room(request, state, costs, rules)
    quoted = chosen.end_s + decode.exposed_s + decode.step_s - request.arrival_s
    if quoted > request.patience_s:
        return Refused(
            request,
            f"the first token would come after {quoted:.3g} s, patience is"
            f" {request.patience_s:.3g} s: ask again later, or with more patience",
            quoted,
        )
    if rules.spares and request.patience_s < float("inf") and _stalls(chosen, state):
        return Refused(
            request,
            f"sessions on every free gang would stand still for"
            f" {chosen.end_s - chosen.start_s:.3g} s and answer too slowly: ask again later",
            quoted,
        )
    long = chosen.block.size * chosen.cost.seconds >= COPY_RECOMPUTE_S
    copies = int(long and len(state.nodes) > len(chosen.block.nodes))
    return Placed(request, chosen, decode, quoted, preempted, copies, tuple(found))


def _candidates(
    request: Request,
    state: ClusterState,
    costs: Costs,
    now_s: float,
    due_s: float,
    rules: Rules,
) -> list[Candidate]:
    found: list[Candidate] = []
    pool = rules.prefill_pool
    holders = _holders(request, state)
    sizes = rules.sizes or state.sizes(pool)
    for holding in holders:
        block = holding.block
        if holding.on_host or block.lost or block.pool != pool or block.size not in sizes:
            continue
        one = _on(block, holding, request, state, costs, now_s)
        if one is not None:
            found.append(one)
    first = holders[0] if holders else None
    left = request.tokens - (min(first.tokens, request.prefix_tokens) if first is not None else 0)
    in_time = False
    for size in sizes:
        # A wider gang takes more device seconds, and wants enough to do.
        if (
            not rules.sizes
            and size > 1
            and (in_time or (found and left < LEAST_PARALLEL_TOKENS * max(1, size // 4)))
        ):
            break
        for block in _blocks(size, pool, first, request, state, costs, rules):
            one = None
            if first is not None and (first.block is not block or first.on_host):
                one = _on(block, first, request, state, costs, now_s)
                if one is not None:
                    found.append(one)
                    in_time = in_time or (one.end_s <= due_s and not block.sessions)
            if first is None or _sooner_anew(one, block, request, costs, now_s):
                one = _on(block, None, request, state, costs, now_s)
                if one is not None:
                    found.append(one)
                    in_time = in_time or (one.end_s <= due_s and not block.sessions)
    return found


def _sooner_anew(
    moved: Candidate | None, block: Block, request: Request, costs: Costs, now_s: float
) -> bool:
    """Whether the prefix is sooner computed again than moved here."""
    if moved is None:
        return True
    start = block.free_at if block.prefills and block.free_at > now_s else now_s
    if moved.move_s <= moved.cost.seconds and moved.start_s <= start:
        return False  # nothing is waited for, and there is less to compute
    return start + costs.prefill(request.tokens, 0, block.size).seconds < moved.end_s


def _holders(request: Request, state: ClusterState) -> list[Holding]:
    """The longest first; of equal ones those on devices, then those there soonest."""
    known = state.holders.get(request.prefix_id)
    if not known or not request.prefix_tokens:
        return []
    if len(known) == 1:
        return known[:]
    most = request.prefix_tokens
    recent = known[-2 * MOST_HOLDERS :]
    recent.sort(key=lambda one: (-min(one.tokens, most), one.on_host, one.ready_s))
    return recent[:MOST_HOLDERS]


def _blocks(
    size: int,
    pool: str,
    holder: Holding | None,
    request: Request,
    state: ClusterState,
    costs: Costs,
    rules: Rules,
) -> list[Block]:
    """Those of one size worth a look: near the prefix or anywhere with nothing on it; else a few
    with sessions, and the one that is free first."""
    blocks: list[Block] = []
    if holder is not None:
        far_s = costs.kv_bytes(request.prefix_tokens) / costs.network.bytes_per_s
        if far_s > NEAR_MOVE_S:
            node = holder.block.nodes[0]
            for block in state.near(node, size):
                if block.pool == pool and not (block.prefills or block.sessions or block.lost):
                    return [block]
    quiet = state.quiet(pool, size)
    if quiet is not None:
        blocks.append(quiet)
    if quiet is None or rules.soonest:
        blocks += state.decoding(pool, size, MOST_DECODING)
    if quiet is None:
        first = state.earliest(pool, size)
        if first is not None:
            blocks.append(first)
    return blocks


def _on(
    block: Block,
    holding: Holding | None,
    request: Request,
    state: ClusterState,
    costs: Costs,
    now_s: float,
) -> Candidate | None:
    """None where it has no room."""
    size = block.size
    start = block.free_at if block.prefills and block.free_at > now_s else now_s
    cached, move_s, moved, wire, source = 0, 0.0, 0.0, "raw", "none"
    whole = request.tokens
    tokens = whole + request.output_tokens
    if holding is not None:
        cached = min(holding.tokens, request.prefix_tokens)
        if holding.ready_s > start:
            start = holding.ready_s
        if holding.block is block and not holding.on_host:
            source = "in place"
            if not request.keeps:  # a conversation gets pages that are whole, for its next turn
                tokens -= cached
        elif holding.on_host:
            near = block.nodes[0] in holding.block.nodes
            source, moved = "host", costs.kv_bytes(cached)
            ends = min(size, holding.block.size)
            rate = costs.host_bytes_per_s
            if not near and costs.network.bytes_per_s < rate:
                rate = costs.network.bytes_per_s
            move_s = moved / rate / ends
        else:
            near = block.nodes[0] in holding.block.nodes
            source = "near" if near else "network"
            move_s, wire, moved = costs.move(
                cached, holding.block.size, size, near, request.lowest_bits <= 8
            )
    elif request.prefix_tokens:
        source = "recompute"
    needed = tokens * costs.raw_bytes / size
    if holding is not None:
        needed += state.would_pin(holding, block)
    if needed > state.room(block):
        return None
    new = whole - cached
    cost = costs.prefill(new if new > 1 else 1, cached, size)
    busy = cost.seconds if cost.seconds > move_s else move_s  # pages come layer by layer
    if len(block.nodes) > 1:
        busy += FORM_S
    end = start + busy
    waste = size * busy if block.sessions else 0.0  # for so long they do not decode
    for child in block.children:
        since = child.free_at if child.prefills and child.free_at > now_s else now_s
        waste += child.size * (start - since)
    return Candidate(
        block, source, holding, cached, start, end, move_s, moved, wire, cost,
        size * busy + waste,
    )  # fmt: skip


def _stalls(one: Candidate, state: ClusterState) -> bool:
    """Whether sessions on the block would stand still for longer than they may."""
    block = one.block
    return block.sessions > 0 and state.stalls(block, one.end_s - one.start_s)


def _choose(found: list[Candidate], due_s: float, state: ClusterState, rules: Rules) -> Candidate:
    """The cheapest in time, else the soonest; where sessions would be held up only if nothing else
    is left."""
    if len(found) == 1:
        return found[0]
    if not rules.soonest:
        in_time = [one for one in found if one.end_s <= due_s]
        if len(in_time) > 1:
            in_time.sort(key=_by_cost)
        for one in in_time:
            if not (rules.spares and _stalls(one, state)):
                return one
    found = sorted(found, key=_by_time)
    if rules.spares:
        for one in found:
            if not _stalls(one, state):
                return one
    return found[0]


def _by_cost(one: Candidate) -> tuple[float, float]:
    return one.device_s, one.end_s


def _by_time(one: Candidate) -> tuple[float, float]:
    return one.end_s, one.device_s


def _between_chunks(
    request: Request, state: ClusterState, costs: Costs, now_s: float, other: Candidate
) -> tuple[int, Candidate] | None:
    """On one device of a gang whose long prefill pauses at its next chunk boundary: in time, and
    the long one still is too."""
    holders = _holders(request, state)
    for tried, victim in enumerate(state.running.values()):
        if tried == MOST_VICTIMS:
            break
        if victim.priority > request.priority or victim.block.size < 2:
            continue
        if victim.chunk_ends_s[-1] - now_s < LEAST_PREEMPTED_S:
            continue
        boundary = next((end for end in victim.chunk_ends_s if end > now_s), None)
        if boundary is None or boundary == victim.chunk_ends_s[-1]:
            continue
        block = victim.block
        while block.children:
            block = block.children[0]
        one = _on(block, holders[0] if holders else None, request, state, costs, now_s)
        if one is None:
            continue
        busy = one.end_s - one.start_s
        start = victim.paused_until_s if victim.paused_until_s > now_s else boundary
        if (
            (one.holding is not None and one.holding.ready_s > start)
            or busy > victim.spare_s
            or start + busy >= other.end_s
        ):
            continue
        waiting = victim.block.size * busy
        return victim.key, one._replace(start_s=start, end_s=start + busy, device_s=waiting)
    return None


def _no_room(request: Request, state: ClusterState, costs: Costs, rules: Rules) -> Refused:
    """Says what was wanted of the largest gang, and what there is."""
    pool = rules.prefill_pool
    size = max(rules.sizes or state.sizes(pool) or (1,))
    wanted = costs.kv_bytes(request.tokens + request.output_tokens) / size
    capacity = max((device.capacity_bytes for device in state.devices), default=0.0)
    if wanted > capacity:
        advice = "a shorter prompt, larger gangs, or a smaller codec"
        quoted: float | None = None
    else:
        advice = "ask again later: sessions hold the memory"
        quoted = float("inf")
    return Refused(
        request,
        f"{request.tokens:,} tokens and {request.output_tokens:,} more want {wanted / 1e9:.3g} GB"
        f" of KV on each of {size} device{'s' * (size != 1)}, which have {capacity / 1e9:.3g} GB"
        f" each: {advice}",
        quoted,
    )
