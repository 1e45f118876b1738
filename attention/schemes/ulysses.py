"""Ulysses: an all-to-all gives each rank all rows and a share of the heads, and takes them back.

`ulysses` alone attends to everything after one exchange. 2-D (`ulysses-ring`) splits the ranks into
groups of neighbours: heads are exchanged within a group, and the groups are a ring whose ranks are
the members with the same share of heads. It is composed: exchange, any inner scheme, exchange.

    ranks 0 1 2 3, groups of 2:   heads within {0 1} and {2 3};   rings {0 2} and {1 3}

Heads: with U ranks in a group each takes Hkv / U KV heads and their q heads; where U is a multiple
of Hkv, KV heads are repeated and their q heads shared out. What divides neither way is refused.

Bytes sent per rank, one share of them exposed: (U - 1) / U of (q + out) rows here and of the keys
here; the ring then moves 1 / U of what it would.

Sources: DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509; USP, https://arxiv.org/abs/2405.07719.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ringspan.attention.buffers import Shape
from ringspan.attention.layer import Block, Layer
from ringspan.attention.problem import Grouped
from ringspan.attention.schemes.order import order_of
from ringspan.attention.schemes.ring import ring
from ringspan.attention.transport import Message, SubTransport
from ringspan.errors import BadInput
from ringspan.types import Part


class Heads(NamedTuple):
    """What one member of a group takes: q heads [q0, q1) and the KV heads [kv0, kv1) they use."""

    q0: int
    q1: int
    kv0: int
    kv1: int


def head_shares(num_q_heads: int, num_kv_heads: int, group_size: int) -> list[Heads]:
    """The heads of each member. Raises BadInput where they cannot be dealt evenly."""
    per_kv = num_q_heads // num_kv_heads
    if num_kv_heads % group_size == 0:
        share = num_kv_heads // group_size
        return [
            Heads(m * share * per_kv, (m + 1) * share * per_kv, m * share, (m + 1) * share)
            for m in range(group_size)
        ]
    repeats = group_size // num_kv_heads
    if group_size % num_kv_heads == 0 and per_kv % repeats == 0:
        share = per_kv // repeats
        return [
            Heads(m * share, (m + 1) * share, m // repeats, m // repeats + 1)
            for m in range(group_size)
        ]
    raise BadInput(
        f"scheme ulysses over {group_size} ranks: {num_q_heads} q and {num_kv_heads} kv heads "
        "cannot be dealt evenly to them; use another scheme, or a number of ranks that divides "
        f"{num_kv_heads} or is a multiple of it that divides {num_q_heads}"
    )


def ulysses(layer: Layer) -> Part:
    return exchange_heads(layer, layer.world_size)


def ulysses_ring(layer: Layer) -> Part:
    return exchange_heads(
        layer, group_size_for(layer.q.shape[1], *layer.kv_shape[:1], layer.world_size)
    )


def group_size_for(num_q_heads: int, num_kv_heads: int, world_size: int) -> int:
    """The largest proper divisor of world_size whose groups can share the heads; 1 if none can."""
    for size in range(world_size - 1, 1, -1):
        if world_size % size == 0:
            try:
                head_shares(num_q_heads, num_kv_heads, size)
            except BadInput:
                continue
            return size
    return 1


def exchange_heads(layer: Layer, group_size: int) -> Part:
    """Heads within groups of `group_size` neighbours, a ring among the groups."""
    if group_size == 1:
        return ring(layer)
    shares = head_shares(layer.q.shape[1], layer.kv_shape[0], group_size)
    group, me = divmod(layer.rank, group_size)
    members = [group * group_size + m for m in range(group_size)]
    grouped = layer.problem.grouped(group_size)
    q, own = _gather(layer, grouped, group, me, members, shares)
    mine = shares[me]
    sinks = layer.rules.sinks
    inner = layer.within(
        transport=SubTransport(layer.transport, range(me, layer.world_size, group_size), 1),
        problem=grouped.problem,
        rules=layer.rules._replace(sinks=None if sinks is None else sinks[mine.q0 : mine.q1]),
        q=q,
        own=own,
        kv_shape=(mine.kv1 - mine.kv0, layer.kv_shape[1]),
        ledger=None if layer.ledger is None else layer.ledger.grouped(grouped),
        scope=layer.scope + "ulysses-",
    )
    return _return(layer, ring(inner), grouped, group, me, members, shares)


def _gather(
    layer: Layer,
    grouped: Grouped,
    group: int,
    me: int,
    members: Sequence[int],
    shares: Sequence[Heads],
) -> tuple[torch.Tensor, Block]:
    """All members' rows and keys, with my heads only, in ascending positions."""
    mine = shares[me]
    specs = [
        (at, spec)
        for at, source in enumerate(layer.problem.sources)
        for spec in source.codec.specs(*layer.kv_shape, layer.q.dtype)
    ]
    # what goes to and comes from each member: q with its heads, then the block's tensors
    packed: list[tuple[torch.Tensor, ...]] = []
    arrived: list[tuple[torch.Tensor, ...]] = []
    wanted: list[Shape] = []
    counts: list[list[int]] = []
    dim = layer.q.shape[2]
    num_heads = mine.kv1 - mine.kv0
    tensors = (layer.q, *layer.own)
    rows_of = [[layer.problem.rows(m) for m in members]]
    rows_of += [[spec.units(layer.problem.keys(at, m)) for m in members] for at, spec in specs]
    counts = rows_of
    wanted.append(Shape((sum(counts[0]), mine.q1 - mine.q0, dim), layer.q.dtype))
    for (_, spec), count in zip(specs, counts[1:], strict=True):
        wanted.append(Shape((sum(count), num_heads, *spec.shape[1:]), spec.dtype))
    full = layer.lease("heads-in", wanted)
    for m, member in enumerate(members):
        heads = [slice(shares[m].q0, shares[m].q1)]
        heads += [slice(shares[m].kv0, shares[m].kv1)] * len(specs)
        views = tuple(
            t[sum(count[:m]) : sum(count[: m + 1])] for t, count in zip(full, counts, strict=True)
        )
        arrived.append(views)
        if m == me:
            for view, tensor, head in zip(views, tensors, heads, strict=True):
                view.copy_(tensor[:, head])
            packed.append(())
            continue
        shapes = [
            Shape((tensor.shape[0], head.stop - head.start, *tensor.shape[2:]), tensor.dtype)
            for tensor, head in zip(tensors, heads, strict=True)
        ]
        out = layer.lease(f"heads-out-{member}", shapes)
        for to, tensor, head in zip(out, tensors, heads, strict=True):
            to.copy_(tensor[:, head])
        packed.append(out)
    others = [m for m in range(len(members)) if m != me]
    layer.wait(
        layer.start(
            [Message(t, members[m]) for m in others for t in packed[m]],
            [Message(t, members[m]) for m in others for t in arrived[m]],
            0,
        )
    )
    names = [("rows", 1)] + [(str(at), spec.tokens) for at, spec in specs]
    placed = []
    for number, (tensor, (name, unit_tokens)) in enumerate(zip(full, names, strict=True)):
        order = order_of(grouped, name, group, tensor.device, unit_tokens)
        if order.sorted_already:
            placed.append(tensor)
        else:
            shape = Shape(tuple(tensor.shape), tensor.dtype)
            (to,) = layer.lease(f"heads-placed-{number}", [shape])
            torch.index_select(tensor, 0, order.index, out=to)
            placed.append(to)
    return placed[0], tuple(placed[1:])


def _return(
    layer: Layer,
    part: Part,
    grouped: Grouped,
    group: int,
    me: int,
    members: Sequence[int],
    shares: Sequence[Heads],
) -> Part:
    """Each member's rows go back to it; mine come with all heads."""
    inverse = order_of(grouped, "rows", group, part.out.device).inverse
    _, _heads, dim = layer.q.shape
    rows = [layer.problem.rows(m) for m in members]
    mine = shares[me]
    out = torch.empty(layer.q.shape, dtype=part.out.dtype, device=part.out.device)
    lse = torch.empty(layer.q.shape[:2], dtype=torch.float32, device=part.out.device)
    num = mine.q1 - mine.q0
    back = layer.lease(
        "heads-back",
        [Shape((sum(rows), num, dim), part.out.dtype), Shape((sum(rows), num), torch.float32)],
    )
    torch.index_select(part.out, 0, inverse, out=back[0])
    torch.index_select(part.lse, 0, inverse, out=back[1])
    sends, recvs, arrived = [], [], []
    for m, member in enumerate(members):
        of = slice(sum(rows[:m]), sum(rows[: m + 1]))
        if m == me:
            arrived.append((back[0][of], back[1][of]))
            continue
        width = shares[m].q1 - shares[m].q0
        shapes = [
            Shape((rows[me], width, dim), part.out.dtype),
            Shape((rows[me], width), torch.float32),
        ]
        into = layer.lease(f"heads-home-{member}", shapes)
        arrived.append((into[0], into[1]))
        sends += [Message(t[of], member) for t in back]
        recvs += [Message(t, member) for t in into]
    layer.wait(layer.start(sends, recvs, 1 + layer.world_size // len(members)))
    for share, (part_out, part_lse) in zip(shares, arrived, strict=True):
        out[:, share.q0 : share.q1] = part_out
        lse[:, share.q0 : share.q1] = part_lse
    return Part(out, lse)
