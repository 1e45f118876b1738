"""The sessions on a rank: tails behind contexts, and the tokens generated on them.

A question of few tokens is computed by every rank alike; a long one is a partial prefill onto the
tail, each rank computing its share (`attention.tail.why_dealt`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ringspan.attention.audit import Audit
from ringspan.attention.engine import HeldKeys, PrefillStep, Proof, TailStep
from ringspan.attention.layout import Deal, owner, positions
from ringspan.attention.tail import (
    STEP_TOKENS,
    owned,
    rows_of,
    tail_deal,
    turn_chunks,
    turn_scheme,
    why_dealt,
)
from ringspan.cluster.messages import AnswerRequest, LongTurn, TokenChunk
from ringspan.cluster.prefills import Contexts
from ringspan.cluster.runtime import Runtime
from ringspan.cluster.sampling import Sampler
from ringspan.errors import BadInput, TooLarge
from ringspan.kvstore.shard import ContextShard
from ringspan.types import Span, page_tokens_for, total_tokens


@dataclass
class _Session:
    context_id: str
    tail: ContextShard
    next_position: int
    """What lies behind it in the tail is of a turn that failed, and not there."""
    pool_name: str
    unseen: tuple[int, ...] = ()
    """Generated last, not yet taken through the model."""


class Answers:
    def __init__(self, runtime: Runtime, contexts: Contexts) -> None:
        self._runtime, self._contexts = runtime, contexts
        self._sessions: dict[str, _Session] = {}
        self._tails = itertools.count()

    def end(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._runtime.pool.free(session.pool_name)

    def end_all_on(self, context_id: str) -> None:
        for session_id, session in list(self._sessions.items()):
            if session.context_id == context_id:
                self.end(session_id)

    def clear(self) -> None:
        for session_id in list(self._sessions):
            self.end(session_id)

    def generate(self, request: AnswerRequest) -> Iterator[TokenChunk]:
        """Extends the session's tail by the request's tokens, then yields token after token."""
        if not request.token_ids:
            raise BadInput(f"session {request.session_id}: a question needs at least one token")
        session = self._session(request)
        sampler = Sampler(request, self._runtime.transport, self._runtime.device)
        logits, long_turn = self._question(session, request)
        for index in range(request.max_tokens):
            token = sampler.next(logits)
            reason = None
            if token in request.stop_ids:
                reason = "stop"  # the token ends the turn; a next turn brings its own
            elif index + 1 == request.max_tokens:
                reason = "length"
            session.unseen = () if reason == "stop" else (token,)
            yield TokenChunk(
                session_id=request.session_id,
                index=index,
                token_id=token,
                finish_reason=reason,
                long_turn=None if index else long_turn,
            )
            if reason is not None:
                return
            logits = self._extend(session, session.unseen)

    def _session(self, request: AnswerRequest) -> _Session:
        """The session of the request, its tail grown for all that the request may add."""
        runtime, facts = self._runtime, self._runtime.facts
        context = self._contexts[request.context_id]
        session = self._sessions.get(request.session_id)
        start = session.next_position if session else context.num_tokens
        unseen = len(session.unseen) if session else 0
        stop = start + unseen + len(request.token_ids) + request.max_tokens
        if stop > facts.max_positions:
            raise TooLarge(
                f"position {stop} is beyond the {facts.max_positions} of {facts.name}: fewer "
                "--max-tokens, or a shorter question"
            )
        page_tokens = page_tokens_for(facts.head_dim)
        world_size = runtime.spec.world_size
        more = owned(Span(start, stop), runtime.rank, world_size, page_tokens)
        held = owned(Span(context.num_tokens, start), runtime.rank, world_size, page_tokens)
        rows = total_tokens(held)
        name = f"tail {next(self._tails)} of session {request.session_id}"
        tail = runtime.new_shard(name, "raw", rows + total_tokens(more), page_tokens)
        if session is None:
            session = _Session(request.context_id, tail, start, name)
            self._sessions[request.session_id] = session
        else:
            tail.reserve(held)
            for layer in range(facts.num_layers):
                k, v = session.tail.tensors(layer, rows)
                tail.write(layer, k, v)
            runtime.pool.free(session.pool_name)
            session.tail, session.pool_name = tail, name
        return session

    def _question(
        self, session: _Session, request: AnswerRequest
    ) -> tuple[torch.Tensor, LongTurn | None]:
        """The request's tokens through the model: the last row's logits, fp32, on every rank."""
        runtime, facts = self._runtime, self._runtime.facts
        tokens = (*session.unseen, *request.token_ids)
        world_size = runtime.spec.world_size
        chunk_tokens = request.chunk_tokens or STEP_TOKENS[runtime.device.type] * world_size
        reason = why_dealt(len(tokens), world_size, chunk_tokens)
        if reason is None:
            return self._extend(session, tokens), None
        began = time.perf_counter()
        scheme = request.scheme
        if scheme == "auto":
            rows = min(len(tokens), chunk_tokens)
            scheme = turn_scheme(rows, facts.num_q_heads, facts.num_kv_heads, world_size)
        span = Span(session.next_position, session.next_position + len(tokens))
        ids = torch.tensor(tokens, dtype=torch.int64)
        proofs = []
        for chunk in turn_chunks(span, chunk_tokens, session.tail.page_tokens):
            row, proof = self._dealt_step(session, chunk, span, ids, scheme, request.audit_rows)
            proofs.append(proof)
        session.next_position = span.stop
        logits = self._from_owner(row, chunk, session.tail.page_tokens)
        seen, audited, error = self._proved(proofs)
        return logits, LongTurn(
            reason=reason,
            num_tokens=len(tokens),
            num_chunks=len(proofs),
            scheme=scheme,
            seen_keys=seen,
            audited_rows=audited,
            audit_error=error,
            elapsed_s=time.perf_counter() - began,
        )

    def _dealt_step(
        self,
        session: _Session,
        chunk: Span,
        turn: Span,
        ids: torch.Tensor,
        scheme: str,
        audit_rows: int,
    ) -> tuple[torch.Tensor, Proof]:
        """One step of a partial prefill. ids int64 [T] are the whole turn's. Gives the logits
        [1, vocabulary] of the turn's last row on the rank that has it; on others hidden states."""
        runtime, tail = self._runtime, session.tail
        context = self._contexts[session.context_id]
        dealt = self._tail_deal(chunk, tail.page_tokens)
        so_far = self._tail_deal(Span(context.num_tokens, chunk.start), tail.page_tokens)
        mine = dealt[runtime.rank]
        audit = Audit.drawn(chunk.start, runtime.facts.num_layers, audit_rows)
        tail.reserve(mine)
        step = PrefillStep(
            runtime.transport,
            runtime.buffers,
            runtime.compute,
            scheme,
            tail,
            dealt,
            (HeldKeys(context.shard, context.held), HeldKeys(tail, so_far)),
            audit=audit,
        )
        # A rank that got no tokens still serves every hop: it takes one that counts for nothing.
        where = positions(mine) if mine else torch.tensor([turn.start])
        has_last = owner(dealt, chunk.stop - 1)[0] == runtime.rank and chunk.stop == turn.stop
        try:
            out = runtime.forward(
                ids[where - turn.start], where, step, logits=has_last, last_only=True
            )
            proof = step.prove(runtime.device)
        except torch.OutOfMemoryError as error:
            tail.cancel()
            why = str(error).strip().splitlines()[0]
            raise TooLarge(
                f"a step of {chunk.tokens} tokens of a question does not fit beside the KV on "
                f"{runtime.device} ({why}); ask a shorter question, or with more ranks"
            ) from None
        except BaseException:
            tail.cancel()
            raise
        return out[-1:], proof

    def _from_owner(self, row: torch.Tensor, chunk: Span, page_tokens: int) -> torch.Tensor:
        """The logits [1, vocabulary] of the rank that has the chunk's last token, fp32
        [vocabulary] on all."""
        transport = self._runtime.transport
        if transport.world_size == 1:
            return row[0].float()
        src, _ = owner(self._tail_deal(chunk, page_tokens), chunk.stop - 1)
        width = torch.tensor([row.shape[1]], device=row.device)  # only the owner ran the head
        transport.broadcast(width, src)
        logits = torch.empty(int(width.item()), dtype=torch.float32, device=row.device)
        if transport.rank == src:
            logits.copy_(row[0])
        transport.broadcast(logits, src)
        return logits

    def _proved(self, proofs: list[Proof]) -> tuple[int, int, float]:
        """Of all ranks: keys seen, rows audited, the worst error."""
        audits = [proof.audit for proof in proofs if proof.audit is not None]
        mine = torch.tensor(
            (
                sum(proof.seen or 0 for proof in proofs),
                sum(audit.rows for audit in audits),
                max((audit.relative_error for audit in audits), default=0.0),
            ),
            dtype=torch.float64,  # exact for counts below 2^53
            device=self._runtime.device,
        )
        all_ranks = self._runtime.transport.all_gather(mine).cpu()
        seen, rows = all_ranks[:, :2].sum(0).tolist()
        return int(seen), int(rows), float(all_ranks[:, 2].max())

    def _tail_deal(self, span: Span, page_tokens: int) -> Deal:
        return tail_deal(span, self._runtime.spec.world_size, page_tokens)

    def _extend(self, session: _Session, tokens: tuple[int, ...]) -> torch.Tensor:
        """`tokens` through the model, on every rank alike: the last row's logits, fp32."""
        runtime = self._runtime
        span = Span(session.next_position, session.next_position + len(tokens))
        mine = owned(span, runtime.rank, runtime.spec.world_size, session.tail.page_tokens)
        session.tail.reserve(mine)
        step = TailStep(
            runtime.transport,
            runtime.buffers,
            runtime.compute,
            (self._contexts[session.context_id].shard,),
            session.tail,
            span,
            rows_of(mine, span),
        )
        ids = torch.tensor(tokens, dtype=torch.int64)
        try:
            out = runtime.forward(ids, positions((span,)), step, logits=True, last_only=True)
        except BaseException:
            session.tail.cancel()
            raise
        session.next_position = span.stop
        return out[-1].float()
