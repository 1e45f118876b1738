"""A codec's run on the protocol of `bench codecs`, through the classes that serve users.

The first tokens are a context, prefilled chunk by chunk in the codec, so that every chunk but the
first attends over decoded pages; the tokens behind them are forced through in blocks, each a turn
of a session on that context. Two variants:

    raw      the session's tail stays raw, as the product keeps it
    sealed   tail pages are encoded too as soon as they are full, into a second shard of the codec:
             the harder case, where what is exact is never more than one open page
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from ringspan.attention.compute import Rules
from ringspan.attention.kv import KVShard
from ringspan.attention.layout import positions
from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.step import Step
from ringspan.attention.tail_step import TailStep
from ringspan.cluster.messages import GangSpec, ModelSpec, PrefillPlan
from ringspan.cluster.prefills import Contexts
from ringspan.cluster.runtime import Runtime
from ringspan.deploy.bench.codec_loss import Queries
from ringspan.errors import BadInput
from ringspan.kvstore.codecs.registry import bits_per_element, codec
from ringspan.kvstore.shard import ContextShard
from ringspan.types import Span, page_tokens_for

MODEL_BITS = 16.0
"""What an element that is not encoded counts: models are served in 16 bits, though they are
measured in fp32."""

_CONTEXT = "bench codecs"


class Protocol(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens go through, the same for every codec and every peer."""

    tokens: int
    prefill: int
    """Of them, in whole pages; the rest is forced."""
    block: int
    chunk_tokens: int
    """Of ringspan's prefill; the peers prefill in one call."""

    def check(self, page_tokens: int) -> None:
        """Raises BadInput."""
        if self.prefill < page_tokens or self.prefill % page_tokens:
            raise BadInput(
                f"--prefill {self.prefill}: wanted whole pages of {page_tokens} tokens, so that "
                "every page is full"
            )
        if self.tokens < self.prefill + 2:
            raise BadInput(
                f"--tokens {self.tokens} with --prefill {self.prefill}: wanted at least 2 tokens "
                "more than are prefilled"
            )
        if self.block < 1 or page_tokens % self.block:
            raise BadInput(f"--block {self.block}: wanted a divisor of a page's {page_tokens}")
        if self.chunk_tokens < page_tokens or self.chunk_tokens % page_tokens:
            raise BadInput(
                f"--chunk-tokens {self.chunk_tokens}: wanted whole pages of {page_tokens}"
            )

    @property
    def blocks(self) -> list[Span]:
        starts = range(self.prefill, self.tokens, self.block)
        return [Span(start, min(start + self.block, self.tokens)) for start in starts]


class Bits(msgspec.Struct, frozen=True, kw_only=True):
    """Per element of K and V, side data, residual and tail counted."""

    prefill: float
    end: float
    mean: float
    """Over the calls: after the prefill and after each block."""


class Forced(NamedTuple):
    """What a run gave."""

    hidden: torch.Tensor
    """fp32 [T, hidden] on the CPU: of the forced tokens, behind the last norm."""
    bits: Bits
    seconds: float


class Exact(NamedTuple):
    """The run that the others are measured against."""

    forced: Forced
    kv: list[tuple[torch.Tensor, torch.Tensor]]
    """Of each layer: K and V [prefill, Hkv, D] of the context."""
    queries: list[Queries]
    """Of each layer, the first block's."""


class Model:
    """One rank with the model, in this process. `close` it."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        spec = GangSpec(
            world_size=1,
            model=ModelSpec(name=name, dtype="float32"),
            transport="loopback",
            device=device,
            threads=threads,
            measure=False,
        )
        world = LoopbackWorld(1)
        self.runtime = Runtime(0, spec)
        self.runtime.start(world)
        self.transformer = world.shared["model"].model
        self.head = _head(self.transformer)

    @property
    def page_tokens(self) -> int:
        return page_tokens_for(self.runtime.facts.head_dim)

    def close(self) -> None:
        self.runtime.stop()


def exact_run(model: Model, protocol: Protocol, token_ids: np.ndarray) -> Exact:
    """Codec raw, tail raw: no bit is lost."""
    queries: list[Queries] = []
    run = _Run(model, protocol, token_ids, "raw", sealed=False)
    try:
        forced = run.forced(queries)
        return Exact(forced, [run.context_kv(layer) for layer in range(run.num_layers)], queries)
    finally:
        run.close()


def codec_run(
    model: Model, protocol: Protocol, token_ids: np.ndarray, name: str, *, sealed: bool
) -> Forced:
    """token_ids int32 [protocol.tokens]."""
    run = _Run(model, protocol, token_ids, name, sealed=sealed)
    try:
        return run.forced()
    finally:
        run.close()


def round_trip(
    model: Model, exact: Exact, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer: the exact context's K and V encoded into pages and decoded."""
    chosen, page_tokens = codec(name), model.page_tokens
    for k, v in exact.kv:
        tokens, heads, dim = k.shape
        shard = ContextShard(chosen, 1, heads, dim, k.dtype, k.device, tokens, page_tokens)
        shard.reserve((Span(0, tokens),))
        shard.write(0, k, v)
        k_back, v_back = torch.empty_like(k), torch.empty_like(v)
        chosen.decode(shard.tensors(0), k_back, v_back)
        yield k_back, v_back


def mean_bits(bits: list[float]) -> Bits:
    return Bits(prefill=bits[0], end=bits[-1], mean=sum(bits) / len(bits))


class _Run:
    """One context and one session on it."""

    def __init__(
        self, model: Model, protocol: Protocol, token_ids: np.ndarray, name: str, *, sealed: bool
    ) -> None:
        self._model, self._protocol, self._name = model, protocol, name
        self._runtime = runtime = model.runtime
        self._ids = token_ids
        self.num_layers = runtime.facts.num_layers
        self._contexts = Contexts(runtime)
        self._sealed: ContextShard | None = None
        self._tails = 0
        ahead = protocol.tokens - protocol.prefill
        if sealed:
            self._sealed = self._new_shard("sealed", name, ahead)
        self._tail_capacity = model.page_tokens if sealed else ahead
        self._tail = self._new_tail()

    def forced(self, queries: list[Queries] | None = None) -> Forced:
        """queries: takes the first block's, layer by layer."""
        began = time.perf_counter()
        self._prefill()
        bits, hidden = [self._bits()], []
        for span in self._protocol.blocks:
            hidden.append(self._turn(span, queries))
            queries = None
            if self._sealed is not None and self._tail.num_tokens == self._tail_capacity:
                self._seal(self._sealed)
            bits.append(self._bits())
        return Forced(torch.cat(hidden), mean_bits(bits), time.perf_counter() - began)

    def context_kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a raw context."""
        k, v = self._context.tensors(layer)
        return k, v

    def close(self) -> None:
        self._contexts.clear()
        self._runtime.pool.free("sealed")
        self._runtime.pool.free(f"tail {self._tails}")

    @property
    def _context(self) -> KVShard:
        return self._contexts[_CONTEXT].resident

    def _prefill(self) -> None:
        protocol = self._protocol
        plan = PrefillPlan(
            context_id=_CONTEXT,
            num_tokens=protocol.prefill,
            page_tokens=self._model.page_tokens,
            chunk_tokens=protocol.chunk_tokens,
            layout="contiguous",
            scheme="ring",
            codec=self._name,
        )
        self._contexts.begin(plan, self._ids[: protocol.prefill])
        for index in range(len(plan.chunks)):
            self._contexts.run_chunk(_CONTEXT, index)

    def _turn(self, span: Span, queries: list[Queries] | None) -> torch.Tensor:
        runtime, tail = self._runtime, self._tail
        tail.reserve((span,))
        shards: list[KVShard] = [self._context]
        if self._sealed is not None and self._sealed.num_tokens:
            shards.append(self._sealed)
        step: Step = TailStep(
            runtime.transport,
            runtime.buffers,
            runtime.compute,
            shards,
            tail,
            span,
            slice(0, span.tokens),
        )
        if queries is not None:
            step = _Recording(step, queries)
        ids = torch.from_numpy(self._ids[span.start : span.stop].astype(np.int64))
        hidden = runtime.forward(ids, positions((span,)), step, logits=False, last_only=False)
        return hidden.float().cpu()

    def _seal(self, into: ContextShard) -> None:
        """The tail's page, full by now, into the codec; a new tail behind it."""
        into.reserve(self._tail.spans)
        for layer in range(self.num_layers):
            k, v = self._tail.tensors(layer)
            into.write(layer, k, v)
        self._runtime.pool.free(f"tail {self._tails}")
        self._tails += 1
        self._tail = self._new_tail()

    def _new_tail(self) -> ContextShard:
        return self._new_shard(f"tail {self._tails}", "raw", self._tail_capacity)

    def _new_shard(self, name: str, codec_name: str, tokens: int) -> ContextShard:
        return self._runtime.new_shard(name, codec_name, tokens, self._model.page_tokens)

    def _bits(self) -> float:
        facts = self._runtime.facts
        encoded = self._context.num_tokens
        encoded += self._sealed.num_tokens if self._sealed is not None else 0
        raw = self._tail.num_tokens
        each = bits_per_element(
            codec(self._name), facts.num_kv_heads, facts.head_dim, torch.bfloat16
        )
        return (encoded * each + raw * MODEL_BITS) / (encoded + raw)


class _Recording(Step):
    """Keeps the queries of the step it stands before."""

    def __init__(self, step: Step, into: list[Queries]) -> None:
        self._step, self._into = step, into

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        self._into.append(Queries(q.float().clone(), rules.scale, rules.softcap, rules.window))
        return self._step.attend(rules, q, k, v)


def _head(model: Any) -> torch.Tensor:
    """The matrix [V, hidden] that gives logits. BadInput where something follows it."""
    config = model.config.get_text_config(decoder=True)
    changed = [
        name
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        if getattr(config, name, None)
    ]
    if changed:
        raise BadInput(
            f"bench codecs reads logits as a plain product; {type(model).__name__} has "
            f"{changed[0]}: choose a model without"
        )
    head: torch.Tensor = model.get_output_embeddings().weight.detach().float().cpu()
    return head
