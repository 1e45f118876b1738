"""One more token of each of B sessions, in fixed shapes: what a CUDA graph can replay.

Where the sessions stand lies on the device (`Cursor`), so that a step is the same launches for
every token. Row b of the step is session b's last token. Rows of one context are neighbours: its
keys are swept once for all of them, encoded ones in place where their codec can. A session's own
tail is a range of rows of one shared tensor (cluster/tails.py) and is attended up to where the
device says that it ends.

Consecutive tokens of one session, a short question, may be rows as well: a step's keys are all
written before any row looks, and each row sees its session's keys up to its own.

The tail of a session on a context of C tokens holds positions C, C + 1, ..; page number
p = position // page_tokens belongs to rank p mod P (attention/tail.py). Of the positions before x,

    before(x) = x // (P * page) * page + clamp(x mod (P * page) - rank * page, 0, page)

lie on this rank, so position x of a session is row base + before(x) - before(C) of the tensor.

q [B, Hq, D], k and v [B, Hkv, D] in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.compute import Rules
from ringspan.attention.kv import AttendsInPlace, Codec, KVShard
from ringspan.attention.layer import STAGING_TOKENS
from ringspan.attention.local import attend
from ringspan.attention.step import Step
from ringspan.kernels.decode import attend_pages
from ringspan.kernels.merge import merge_many
from ringspan.types import Part, Span

MAX_SWEEPS = 4
"""Of encoded keys, as they lie, for the rows of one step; for more rows they are decoded once."""


class Collectives(Protocol):
    """What a step asks of a transport."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] of every rank, equal shapes -> [P, ...] in rank order."""

    def broadcast(self, x: torch.Tensor, src: int) -> None:
        """x of rank `src` into x of all."""


class Shared(NamedTuple):
    """A context, and the rows of the step that stand on it: [begin, stop)."""

    shard: KVShard
    begin: int
    stop: int


class TailRows(NamedTuple):
    """Where the sessions' own keys lie: session b's rows begin at `bases[b]`."""

    tensors: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    """k and v [rows + 1, Hkv, D] of a layer; the last row takes what no session keeps."""
    num_rows: int
    bases: tuple[int, ...]
    starts: tuple[int, ...]
    """The first position of each tail: its context's length."""
    page_tokens: int


class Cursor:
    """Where B sessions stand, on the device. A step reads it, and moves it one token on."""

    def __init__(
        self,
        positions: Sequence[int],
        tail: TailRows,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        def on_device(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.ids = on_device([0] * len(positions))
        """int64 [B]: the tokens to be taken through the model."""
        self.where = on_device(positions)
        """int64 [B]: their positions."""
        self.active = on_device([1] * len(positions))
        """int64 [B]: 1, or 0 for a session that is done: it moves and keeps nothing."""
        self._rank, self._world_size, self._page = rank, world_size, tail.page_tokens
        self._starts, self._nowhere = on_device(tail.starts), on_device([tail.num_rows])
        self._offsets = on_device(tail.bases) - self._before(self._starts)
        self.row, self.stop = self.where, self.where.to(torch.int32)
        self._firsts: dict[int | None, torch.Tensor] = {}

    def begin(self) -> None:
        """A step's first work on the device.

        row int64 [B]: where each token's key goes; stop int32 [B]: the end of its session's rows,
        itself included.
        """
        at = self._offsets + self._before(self.where)
        keeps = self.where // self._page % self._world_size == self._rank
        keeps &= self.active > 0
        self.row = torch.where(keeps, at, self._nowhere)
        self.stop = (at + keeps).to(torch.int32)
        self._firsts = {}

    def first(self, window: int | None) -> torch.Tensor:
        """int32 [B]: the first row of each tail that its token sees."""
        if window not in self._firsts:
            floor = self._starts
            if window is not None:
                floor = torch.maximum(self.where - (window - 1), floor)
            self._firsts[window] = (self._offsets + self._before(floor)).to(torch.int32)
        return self._firsts[window]

    def advance(self, ids: torch.Tensor) -> None:
        """ids int64 [B]: the tokens that follow."""
        self.ids.copy_(ids)
        self.where.add_(self.active)

    def _before(self, positions: torch.Tensor) -> torch.Tensor:
        """How many of the positions before these are kept by this rank."""
        around = self._page * self._world_size
        within = positions % around - self._rank * self._page
        return positions // around * self._page + within.clamp(0, self._page)


class DecodeStep(Step):
    """`positions`: where the sessions stand now, on the host; they only grow, so that what lies
    before every window now may be left out for good.

    backend: of raw contexts, a name of `local.BACKENDS` or `auto`. transport may be exchanged for
    another one of the same ranks, as long as all do it alike.
    """

    def __init__(
        self,
        transport: Collectives,
        backend: str,
        contexts: Sequence[Shared],
        tail: TailRows,
        positions: Sequence[int],
        device: torch.device,
    ) -> None:
        self.transport = transport
        self.cursor = Cursor(positions, tail, transport.rank, transport.world_size, device)
        self._backend, self._tail, self._positions = backend, tail, tuple(positions)
        self._contexts = [_Swept(one, self._positions, device) for one in contexts]
        # Its own: a graph goes on reading the memory that it was captured with.
        self._buffers = Buffers(device)
        self._kv_shape = (0, 0)
        self._each = torch.arange(len(positions) + 1, dtype=torch.int32, device=device)

    def begin(self) -> None:
        """Before the first layer."""
        self.cursor.begin()
        for context in self._contexts:
            context.forget()

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        self._kv_shape = (k.shape[1], k.shape[2])
        keys, values = self._tail.tensors(rules.layer)
        keys.index_copy_(0, self.cursor.row, k)
        values.index_copy_(0, self.cursor.row, v)
        parts = self._over_contexts(rules, q)
        parts.append(
            attend_pages(
                "plain", q, (keys, values),
                scale=rules.scale, softcap=rules.softcap,
                first=self.cursor.first(rules.window), stop=self._tail.num_rows,
                cu_rows=self._each, lengths=self.cursor.stop, out_dtype=torch.float32,
            )
        )  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self.transport.world_size == 1:
            merge_many(parts, out, None, rules.sinks)
            return out
        # out and lse side by side: one small exchange a layer.
        packed = q.new_empty((*q.shape[:2], q.shape[2] + 1), dtype=torch.float32)
        merge_many(parts, packed[..., :-1], packed[..., -1])
        gathered = self.transport.all_gather(packed)
        merge_many([Part(one[..., :-1], one[..., -1]) for one in gathered], out, None, rules.sinks)
        return out

    def _over_contexts(self, rules: Rules, q: torch.Tensor) -> list[Part]:
        """Parts of all rows; contexts that no row sees are left out."""
        found = []
        for context in self._contexts:
            rows = q[context.begin : context.stop]
            over = self._whole if rules.window is None else self._windowed
            part = over(context, rules, rows)
            if part is not None:
                found.append((context, part))
        if len(found) == 1 and found[0][0].stop - found[0][0].begin == q.shape[0]:
            return [found[0][1]]
        if not found:
            return []
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
        for context, part in found:
            out[context.begin : context.stop] = part.out
            lse[context.begin : context.stop] = part.lse
        return [Part(out, lse)]

    def _whole(self, context: _Swept, rules: Rules, q: torch.Tensor) -> Part | None:
        """All of a context's keys that this rank holds: every row sees them."""
        shard, keys = context.shard, context.shard.num_tokens
        if not keys:
            return None
        tensors = shard.tensors(rules.layer)
        if shard.codec.exact:
            return self._dense(q, tensors[0], tensors[1], rules)
        part = self._in_place(shard.codec, q, tensors, keys, rules)
        if part is not None:
            return part
        return self._decoded_in_stretches(context, rules, q)

    def _in_place(
        self,
        codec: Codec,
        q: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        keys: int,
        rules: Rules,
    ) -> Part | None:
        """Attention over the codes, in as few sweeps as the codec does it in; None if it cannot."""
        if not isinstance(codec, AttendsInPlace):
            return None
        rows = q.shape[0]
        while rows and not codec.serves(q[:rows], tensors):
            rows //= 2
        if not rows or rows * MAX_SWEEPS < q.shape[0]:
            return None
        parts = [
            codec.attend(
                some, tensors, first=0, stop=keys, scale=rules.scale, softcap=rules.softcap
            )
            for some in q.split(rows)
        ]
        if len(parts) == 1:
            return parts[0]
        return Part(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))

    def _decoded_in_stretches(self, context: _Swept, rules: Rules, q: torch.Tensor) -> Part:
        """For a codec that has no attention of its own."""
        shard, parts = context.shard, []
        for first in range(0, shard.num_tokens, STAGING_TOKENS):
            stop = min(first + STAGING_TOKENS, shard.num_tokens)
            tensors = shard.tensors(rules.layer, stop, first)
            k, v = self._decoded(context, tensors, stop - first, q)
            parts.append(self._dense(q, k, v, rules))
        if len(parts) == 1:
            return parts[0]
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        merge_many(parts, out, lse)
        return Part(out, lse)

    def _windowed(self, context: _Swept, rules: Rules, q: torch.Tensor) -> Part | None:
        """The keys within each row's window, which moves on with its token."""
        assert rules.window is not None
        shard, keys = context.shard, context.shard.num_tokens
        first = context.first_row(min(context.positions) - rules.window + 1)
        first -= first % shard.codec.cut_tokens
        if first >= keys:
            return None
        tensors = shard.tensors(rules.layer, keys, first)
        if not shard.codec.exact:
            tensors = self._decoded(context, tensors, keys - first, q)
        return attend_pages(
            "plain", q, (tensors[0], tensors[1]),
            scale=rules.scale, softcap=rules.softcap,
            first=context.firsts(self.cursor.where, rules.window, first), stop=keys - first,
            cu_rows=self._each[: q.shape[0] + 1], out_dtype=torch.float32,
        )  # fmt: skip

    def _dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: Rules) -> Part:
        return attend(
            q, k, v, causal=False, offset=0,
            scale=rules.scale, softcap=rules.softcap, backend=self._backend,
        )  # fmt: skip

    def _decoded(
        self, context: _Swept, tensors: tuple[torch.Tensor, ...], keys: int, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [keys, Hkv, D], valid until the next call."""
        shape = Shape((keys, *self._kv_shape), q.dtype)
        k, v = self._buffers.lease("staging", [shape, shape])
        context.shard.codec.decode(tensors, k, v)
        return k, v


class _Swept:
    """A context as a step sweeps it."""

    def __init__(self, shared: Shared, positions: Sequence[int], device: torch.device) -> None:
        self.shard, self.begin, self.stop = shared
        self.positions = tuple(positions[self.begin : self.stop])
        spans: tuple[Span, ...] = tuple(self.shard.spans)
        self._starts = torch.tensor([s.start for s in spans], dtype=torch.int64, device=device)
        self._tokens = torch.tensor([s.tokens for s in spans], dtype=torch.int64, device=device)
        self._firsts: dict[int, torch.Tensor] = {}

    def forget(self) -> None:
        """What was found of this token's windows."""
        self._firsts = {}

    def firsts(self, where: torch.Tensor, window: int, leave_out: int) -> torch.Tensor:
        """int32 [rows]: how many of the keys behind the first `leave_out` each row does not see."""
        if window not in self._firsts:
            floor = where[self.begin : self.stop, None] - (window - 1)
            hidden = (floor - self._starts).clamp(min=0).minimum(self._tokens).sum(1)
            self._firsts[window] = (hidden - leave_out).clamp(min=0).to(torch.int32)
        return self._firsts[window]

    def first_row(self, floor: int) -> int:
        """The first row whose position is `floor` or later."""
        return sum(min(max(floor - s.start, 0), s.tokens) for s in self.shard.spans)
