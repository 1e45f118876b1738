"""The sessions on a rank: tails behind contexts, and the tokens generated on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ringspan.attention.engine import TailStep
from ringspan.attention.layout import positions
from ringspan.attention.tail import owned, rows_of
from ringspan.cluster.messages import AnswerRequest, TokenChunk
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
        tokens = request.token_ids
        if not tokens:
            raise BadInput(f"session {request.session_id}: a question needs at least one token")
        session = self._session(request)
        sampler = Sampler(request, self._runtime.transport, self._runtime.device)
        tokens, session.unseen = (*session.unseen, *tokens), ()
        for index in range(request.max_tokens):
            token = sampler.next(self._extend(session, tokens))
            tokens = (token,)
            reason = None
            if token in request.stop_ids:
                reason = "stop"  # the token ends the turn; a next turn brings its own
            elif index + 1 == request.max_tokens:
                reason = "length"
            session.unseen = () if reason == "stop" else tokens
            yield TokenChunk(
                session_id=request.session_id, index=index, token_id=token, finish_reason=reason
            )
            if reason is not None:
                return

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
        more = owned(Span(start, stop), runtime.rank, runtime.spec.world_size, page_tokens)
        held = session.tail.num_tokens if session else 0
        name = f"tail {next(self._tails)} of session {request.session_id}"
        tail = runtime.new_shard(name, "raw", held + total_tokens(more), page_tokens)
        if session is None:
            session = _Session(request.context_id, tail, start, name)
            self._sessions[request.session_id] = session
        else:
            tail.reserve(session.tail.spans)
            for layer in range(facts.num_layers):
                k, v = session.tail.tensors(layer)
                tail.write(layer, k, v)
            runtime.pool.free(session.pool_name)
            session.tail, session.pool_name = tail, name
        return session

    def _extend(self, session: _Session, tokens: tuple[int, ...]) -> torch.Tensor:
        """`tokens` through the model, behind the session's tail: the last row's logits, fp32."""
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
