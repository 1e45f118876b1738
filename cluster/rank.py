"""One rank of a gang: a model on a device, shards of contexts, tails of sessions.

A plain class without Ray. The controller calls each method on every rank of the gang with the same
arguments (SPMD); inside, ranks meet in exchanges of the same order. Who may be repeated is said at
each method.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ringspan.attention.buffers import Buffers
from ringspan.attention.engine import PrefillStep, Step, TailStep
from ringspan.attention.group import join_group
from ringspan.attention.hook import bind
from ringspan.attention.layout import Deal, deal, positions
from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.models.load import load_model
from ringspan.attention.tail import owned, rows_of
from ringspan.attention.transport import Transport
from ringspan.cluster.messages import (
    AnswerRequest,
    ChunkDone,
    GangSpec,
    PrefillPlan,
    RankReady,
    ShardOpened,
    ShardSaved,
    TokenChunk,
)
from ringspan.cluster.sampling import Sampler
from ringspan.errors import BadInput, TooLarge
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.folder import segment_path
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, namespace_digest, page_keys
from ringspan.kvstore.manifest import assign_pages
from ringspan.kvstore.page import EXACT, Origin
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.transfer import load_shard, save_shard
from ringspan.types import Span, coalesce, page_tokens_for, total_tokens

if TYPE_CHECKING:
    from ringspan.kvstore.manifest import Manifest

Rendezvous = tuple[str, int] | LoopbackWorld
"""Address and port of rank 0's store, or the world of loopback ranks."""

START_TIMEOUT_S = 300.0
"""For all ranks to load their weights and meet."""
GPU_EXCHANGE_TIMEOUT_S = 1800.0
"""NCCL counts an exchange's time from when the host enqueued it, which can be a whole chunk ahead
of the GPU; a dead rank is noticed by the controller long before."""


@dataclass
class _Context:
    """A context on this rank: what it holds, and what the others hold."""

    shard: ContextShard
    num_tokens: int
    plan: PrefillPlan | None = None
    token_ids: np.ndarray | None = None
    cached: Deal = ()
    chunks_done: int = 0


@dataclass
class _Session:
    context_id: str
    tail: ContextShard
    next_position: int
    unseen: tuple[int, ...] = field(default=())
    """Generated last, not yet taken through the model."""


class Rank:
    def __init__(self, rank: int, spec: GangSpec) -> None:
        self._rank, self._spec = rank, spec
        self._device = _device(spec.device)
        self._contexts: dict[str, _Context] = {}
        self._sessions: dict[str, _Session] = {}
        self._transport: Transport
        self._model: Any = None

    # life

    def host_store(self) -> tuple[str, int]:
        """Controller, on rank 0 only, before `start`: opens the gang's meeting point."""
        address = socket.gethostbyname(socket.gethostname())
        self._store = torch.distributed.TCPStore(
            address, 0, self._spec.world_size, is_master=True, wait_for_workers=False
        )
        return address, self._store.port

    def start(self, rendezvous: Rendezvous) -> RankReady:
        """Controller, once: loads the weights, joins the group."""
        began = time.perf_counter()
        spec = self._spec
        with self._on_device():
            torch.set_num_threads(spec.threads or max(1, (os.cpu_count() or 1) // spec.world_size))
            loopback = isinstance(rendezvous, LoopbackWorld)
            self._buffers = Buffers(self._device)
            if isinstance(rendezvous, LoopbackWorld):
                # Ranks of one process share the weights: nothing writes to them.
                if "model" not in rendezvous.shared:
                    rendezvous.shared["model"] = load_model(spec.model, self._device)
                loaded = rendezvous.shared["model"]
                self._transport = rendezvous.transport(self._rank, self._device)
            else:
                loaded = load_model(spec.model, self._device)
                self._transport = self._join(rendezvous)
            self._model, self._facts = loaded.model, loaded.facts
            self._dtype = getattr(torch, loaded.facts.dtype)
            bind(self._model)
            return RankReady(
                rank=self._rank,
                device=str(self._device),
                device_name=_device_name(self._device),
                host=socket.gethostname(),
                pid=os.getpid(),
                transport="loopback" if loopback else self._backend(),
                facts=loaded.facts,
                weights_bytes=loaded.weights_bytes,
                free_bytes=_free_bytes(self._device) // (spec.world_size if self._shares() else 1),
                elapsed_s=time.perf_counter() - began,
            )

    def _join(self, rendezvous: tuple[str, int]) -> Transport:
        if self._spec.world_size == 1:
            return LoopbackWorld(1, self._spec.timeout_s).transport(0, self._device)
        address, port = rendezvous
        if self._rank == 0:
            store = self._store
        else:
            store = torch.distributed.TCPStore(
                address,
                port,
                self._spec.world_size,
                is_master=False,
                timeout=timedelta(seconds=START_TIMEOUT_S),
            )
        store.set_timeout(timedelta(seconds=START_TIMEOUT_S))
        gpu = self._device.type == "cuda"
        return join_group(
            self._backend(),
            store,
            self._rank,
            self._spec.world_size,
            self._device,
            GPU_EXCHANGE_TIMEOUT_S if gpu else self._spec.timeout_s,
        )

    def _backend(self) -> str:
        if self._spec.transport in ("gloo", "nccl"):
            return self._spec.transport
        return "nccl" if self._device.type == "cuda" else "gloo"

    def _shares(self) -> bool:
        """Several ranks live on this device."""
        return self._device.type == "cpu" or self._spec.transport == "loopback"

    def stop(self) -> None:
        """Controller, last. May be repeated."""
        self._contexts.clear()
        self._sessions.clear()
        if self._model is not None:
            self._transport.close()
            self._model = None

    # prefill

    def begin_prefill(self, plan: PrefillPlan, token_ids: np.ndarray) -> None:
        """Controller: takes memory for this rank's whole shard of the context.

        token_ids: int32 [n], all of the context's. Repeating it starts over.
        """
        if len(token_ids) != plan.num_tokens:
            raise BadInput(f"the plan is for {plan.num_tokens} tokens, {len(token_ids)} came")
        self.drop(plan.context_id)
        mine = sum(total_tokens(self._deal(plan, chunk)[self._rank]) for chunk in plan.chunks)
        self._contexts[plan.context_id] = _Context(
            shard=self._shard(plan.codec, mine, plan.page_tokens),
            num_tokens=plan.num_tokens,
            plan=plan,
            token_ids=token_ids,
            cached=((),) * self._spec.world_size,
        )

    def prefill_chunk(self, context_id: str, chunk_index: int) -> ChunkDone:
        """Controller, for each chunk in order: takes it through the model."""
        began = time.perf_counter()
        waited, sent = self._transport.exchange_s, self._transport.sent_bytes
        context, plan = self._prefilling(context_id)
        self._run_chunk(context, plan, chunk_index, logits=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        span = plan.chunks[chunk_index]
        return ChunkDone(
            context_id=context_id,
            rank=self._rank,
            chunk_index=chunk_index,
            span=span,
            rank_tokens=total_tokens(self._deal(plan, span)[self._rank]),
            elapsed_s=time.perf_counter() - began,
            exchange_s=self._transport.exchange_s - waited,
            sent_bytes=self._transport.sent_bytes - sent,
            kv_bytes=context.shard.kv_bytes,
        )

    def chunk_logits(
        self, context_id: str, chunk_index: int
    ) -> tuple[tuple[Span, ...], np.ndarray]:
        """As prefill_chunk; gives this rank's spans and their logits, fp32 [T, vocabulary]."""
        context, plan = self._prefilling(context_id)
        logits = self._run_chunk(context, plan, chunk_index, logits=True)
        spans = self._deal(plan, plan.chunks[chunk_index])[self._rank]
        return spans, logits[: total_tokens(spans)].float().cpu().numpy()

    def _run_chunk(
        self, context: _Context, plan: PrefillPlan, chunk_index: int, logits: bool
    ) -> torch.Tensor:
        if chunk_index != context.chunks_done or context.token_ids is None:
            raise BadInput(
                f"chunk {chunk_index} of context {plan.context_id} came, "
                f"{context.chunks_done} is next"
            )
        dealt = self._deal(plan, plan.chunks[chunk_index])
        spans = dealt[self._rank]
        context.shard.reserve(spans)
        step = PrefillStep(
            self._transport,
            self._buffers,
            plan.scheme,
            self._spec.backend,
            context.shard,
            dealt,
            context.cached,
        )
        # A rank that got no tokens still serves every hop: it takes one that counts for nothing.
        where = positions(spans) if spans else torch.zeros(1, dtype=torch.int64)
        ids = torch.from_numpy(context.token_ids[where.numpy()].astype(np.int64))
        try:
            out = self._forward(ids, where, step, logits=logits, last_only=False)
        except torch.OutOfMemoryError as error:
            context.shard.cancel()
            raise TooLarge(
                f"chunk {chunk_index} of {plan.chunk_tokens} tokens does not fit beside the KV on "
                f"{self._device} ({_first_line(error)}); use a smaller --chunk-tokens"
            ) from None
        except BaseException:
            context.shard.cancel()
            raise
        context.cached = tuple(
            coalesce((*held, *new)) for held, new in zip(context.cached, dealt, strict=True)
        )
        context.chunks_done += 1
        return out

    # the store

    def save(self, context_id: str, staging: str) -> ShardSaved:
        """Controller, after the last chunk: writes this rank's pages into the staging folder."""
        began = time.perf_counter()
        context, plan = self._prefilling(context_id)
        if context.chunks_done != len(plan.chunks) or context.token_ids is None:
            raise BadInput(
                f"context {context_id} has {context.chunks_done} of {len(plan.chunks)} chunks"
            )
        keys = page_keys(
            self._facts.fingerprint, PUBLIC_NAMESPACE, context.token_ids, plan.page_tokens
        )
        with self._on_device():
            records = save_shard(
                context.shard, self._origin(plan), keys, segment_path(staging, self._rank)
            )
        return ShardSaved(
            context_id=context_id,
            rank=self._rank,
            records=records,
            elapsed_s=time.perf_counter() - began,
        )

    def open(self, manifest: Manifest, root: str) -> ShardOpened:
        """Controller: reads this rank's share of a stored context, verified. May be repeated."""
        began = time.perf_counter()
        self.drop(manifest.context_id)
        records = assign_pages(manifest, self._spec.world_size)[self._rank]
        with self._on_device():
            shard = self._shard(
                manifest.codec, sum(r.span.tokens for r in records), manifest.page_tokens
            )
            load_shard(root, manifest, records, shard)
        self._contexts[manifest.context_id] = _Context(shard, manifest.num_tokens)
        return ShardOpened(
            context_id=manifest.context_id,
            rank=self._rank,
            num_pages=len(records),
            kv_bytes=shard.kv_bytes,
            elapsed_s=time.perf_counter() - began,
        )

    def drop(self, context_id: str) -> None:
        """Controller: forgets a context and the sessions on it. May be repeated."""
        for session_id, session in list(self._sessions.items()):
            if session.context_id == context_id:
                del self._sessions[session_id]
        self._contexts.pop(context_id, None)

    # answers

    def generate(self, request: AnswerRequest) -> Iterator[TokenChunk]:
        """Controller: extends the session's tail, then yields token after token.

        All ranks must be advanced in step; all yield the same tokens. Closing it early leaves the
        session at the last token yielded.
        """
        session = self._session(request)
        sampler = Sampler(request, self._transport, self._device)
        tokens = (*session.unseen, *request.token_ids)
        if not tokens:
            raise BadInput(f"session {request.session_id}: a question needs at least one token")
        session.unseen = ()
        for index in range(request.max_tokens):
            token = sampler.next(self._extend(session, tokens))
            session.unseen = tokens = (token,)
            reason = None
            if token in request.stop_ids:
                reason = "stop"
            elif index + 1 == request.max_tokens:
                reason = "length"
            yield TokenChunk(
                session_id=request.session_id, index=index, token_id=token, finish_reason=reason
            )
            if reason is not None:
                return

    def end_session(self, session_id: str) -> None:
        """Controller: forgets a session's tail. May be repeated."""
        self._sessions.pop(session_id, None)

    def _session(self, request: AnswerRequest) -> _Session:
        context = self._context(request.context_id)
        session = self._sessions.get(request.session_id)
        start = session.next_position if session else context.num_tokens
        unseen = len(session.unseen) if session else 0
        stop = start + unseen + len(request.token_ids) + request.max_tokens
        if stop > self._facts.max_positions:
            raise TooLarge(
                f"position {stop} is beyond the {self._facts.max_positions} of "
                f"{self._facts.name}: fewer --max-tokens, or a shorter question"
            )
        page_tokens = page_tokens_for(self._facts.head_dim)
        more = total_tokens(
            owned(Span(start, stop), self._rank, self._spec.world_size, page_tokens)
        )
        tail = self._shard("raw", (session.tail.num_tokens if session else 0) + more, page_tokens)
        if session is None:
            session = _Session(request.context_id, tail, start)
            self._sessions[request.session_id] = session
        else:
            _copy_shard(session.tail, tail, self._facts.num_layers)
            session.tail = tail
        return session

    def _extend(self, session: _Session, tokens: tuple[int, ...]) -> torch.Tensor:
        """Takes `tokens` through the model behind the session's tail; last row's logits, fp32."""
        span = Span(session.next_position, session.next_position + len(tokens))
        context = self._context(session.context_id)
        mine = owned(span, self._rank, self._spec.world_size, session.tail.page_tokens)
        session.tail.reserve(mine)
        step = TailStep(
            self._transport,
            self._buffers,
            self._spec.backend,
            (context.shard,),
            session.tail,
            span,
            rows_of(mine, span),
        )
        ids = torch.tensor(tokens, dtype=torch.int64)
        try:
            out = self._forward(ids, positions((span,)), step, logits=True, last_only=True)
        except BaseException:
            session.tail.cancel()
            raise
        session.next_position = span.stop
        session.unseen = ()
        return out[-1].float()

    # helpers

    @torch.inference_mode()
    def _forward(
        self, ids: torch.Tensor, where: torch.Tensor, step: Step, *, logits: bool, last_only: bool
    ) -> torch.Tensor:
        """ids, where int64 [T] -> hidden states [T, hidden] or logits [T or 1, vocabulary]."""
        arguments = {
            "input_ids": ids[None].to(self._device),
            "position_ids": where[None].to(self._device),
            "use_cache": False,
            "ringspan": step,
        }
        with self._on_device():
            if logits:
                return self._model(**arguments, logits_to_keep=int(last_only)).logits[0]
            return self._model.base_model(**arguments).last_hidden_state[0]

    def _shard(self, codec_name: str, capacity_tokens: int, page_tokens: int) -> ContextShard:
        facts = self._facts
        with self._on_device():
            return ContextShard(
                codec(codec_name),
                facts.num_layers,
                facts.num_kv_heads,
                facts.head_dim,
                self._dtype,
                self._device,
                capacity_tokens,
                page_tokens,
            )

    def _origin(self, plan: PrefillPlan) -> Origin:
        """With a lossy codec every chunk but the first was computed over decoded pages."""
        exact = codec(plan.codec).exact or len(plan.chunks) == 1
        return Origin(
            fingerprint=self._facts.fingerprint,
            namespace=namespace_digest(PUBLIC_NAMESPACE),
            rope=f"applied, scaling {self._spec.model.rope_scaling or 'none'}",
            provenance=EXACT if exact else (f"attended over {plan.codec} pages",),
        )

    def _deal(self, plan: PrefillPlan, chunk: Span) -> Deal:
        return deal(plan.layout, chunk, self._spec.world_size, plan.page_tokens)

    def _context(self, context_id: str) -> _Context:
        if context_id not in self._contexts:
            raise BadInput(
                f"rank {self._rank} does not hold context {context_id}: open or prefill it first"
            )
        return self._contexts[context_id]

    def _prefilling(self, context_id: str) -> tuple[_Context, PrefillPlan]:
        context = self._context(context_id)
        if context.plan is None:
            raise BadInput(f"context {context_id} was opened from a store: it is complete")
        return context, context.plan

    def _on_device(self) -> Any:
        """Loopback ranks are threads, and the current GPU is a thread's own."""
        if self._device.type == "cuda":
            return torch.cuda.device(self._device)
        return contextlib.nullcontext()


def _copy_shard(source: ContextShard, target: ContextShard, num_layers: int) -> None:
    target.reserve(source.spans)
    for layer in range(num_layers):
        k, v = source.tensors(layer)
        target.write(layer, k, v)


def _device(name: str) -> torch.device:
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise BadInput("--device cuda was asked for, but torch sees no CUDA device here")
        return torch.device("cuda", torch.cuda.current_device())
    if name not in ("auto", "cpu"):
        raise BadInput(f"unknown device {name!r}; known: auto, cpu, cuda")
    return torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
