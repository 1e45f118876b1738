"""The sessions on a rank: tails behind contexts, and the tokens generated on them.

A question of few tokens is computed by every rank alike; a long one is a partial prefill onto the
tail, each rank computing its share (`attention.tail.why_dealt`). The answer's tokens come one by
one, those of several sessions together (decoding.py).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ringspan.attention.audit import Audit
from ringspan.attention.decode_step import DecodeStep, Shared, TailRows
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
from ringspan.cluster.decoding import Decoding
from ringspan.cluster.device import on_device
from ringspan.cluster.messages import AnswerRequest, LongTurn, TokenChunk, TokenChunks
from ringspan.cluster.prefills import Contexts
from ringspan.cluster.runtime import Runtime
from ringspan.cluster.sampling import (
    Logprobs,
    Sampler,
    greedy_tokens,
    logprobs_of,
    next_tokens,
)
from ringspan.cluster.tails import Tail, TailBlock, rows_of_tails
from ringspan.errors import BadInput, TooLarge
from ringspan.types import Span, page_tokens_for, total_tokens

MAX_TOGETHER = 64
"""Sessions that advance in one step; more of them take turns."""

SHORT_QUESTION, SHORT_QUESTIONS = 64, 1024
"""Tokens of a question that goes through the model together with others, and of all of these: few
enough that their own keys are worth no kernel of causal tiles."""


@dataclass
class _Session:
    context_id: str
    tail: Tail
    next_position: int
    """What lies behind it in the tail is of a turn that failed, and not there."""
    unseen: tuple[int, ...] = ()
    """Generated last, not yet taken through the model."""
    turn: _Turn | None = None
    """The last one; a slice of it may follow as long as it is not done."""


class _Turn:
    """One request's answer on its way."""

    def __init__(self, request: AnswerRequest, session: _Session) -> None:
        self.request, self.session = request, session
        self.sampler = Sampler(request)
        self.count = 0
        self.done = False
        self.slice(request.slice_tokens)

    def slice(self, tokens: int) -> None:
        """So many more now, then it rests; 0: all of them."""
        self.until = self.count + tokens if tokens else self.request.max_tokens

    @property
    def rests(self) -> bool:
        return self.done or self.count >= self.until

    @property
    def left(self) -> int:
        """Tokens that may follow."""
        return self.request.max_tokens - self.count

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of the question, and the one before it that was not seen yet."""
        return (*self.session.unseen, *self.request.token_ids)

    def take(
        self, token: int, told: Logprobs | None, long_turn: LongTurn | None = None
    ) -> TokenChunk:
        """The answer's next token."""
        request, index = self.request, self.count
        reason = None
        if token in request.stop_ids:
            reason = "stop"  # the token ends the turn; a next turn brings its own
        elif index + 1 == request.max_tokens:
            reason = "length"
        self.count = self.sampler.told = index + 1
        self.done = reason is not None
        self.session.unseen = () if reason == "stop" else (token,)
        return TokenChunk(
            session_id=request.session_id,
            index=index,
            token_id=token,
            finish_reason=reason,
            logprob=None if told is None else told.logprob,
            top=() if told is None else told.top,
            long_turn=long_turn,
        )


class _Step:
    """A step of decoding, and whose tokens it brings; kept from slice to slice of the same turns,
    so that a captured step is captured once."""

    def __init__(self, turns: list[_Turn], decoding: Decoding) -> None:
        self.turns, self.decoding = turns, decoding
        self.block = turns[0].session.tail.block
        self.intact = True
        """Every turn that is not done stands where the step has it."""

    def carries(self, turns: list[_Turn]) -> bool:
        """These and no others, where they lie now."""
        going = [turn for turn in self.turns if not turn.done]
        return (
            self.intact
            and len(going) == len(turns)
            and 2 * len(going) > len(self.turns)
            and all(any(one is turn for turn in turns) for one in going)
            and all(turn.session.tail.block is self.block for turn in turns)
        )


def _batches(turns: list[_Turn]) -> Iterator[list[_Turn]]:
    """Of at most SHORT_QUESTIONS tokens each."""
    batch: list[_Turn] = []
    for turn in turns:
        if sum(len(one.tokens) for one in (*batch, turn)) > SHORT_QUESTIONS:
            yield batch
            batch = []
        batch.append(turn)
    yield batch


class Answers:
    def __init__(self, runtime: Runtime, contexts: Contexts) -> None:
        self._runtime, self._contexts = runtime, contexts
        self._sessions: dict[str, _Session] = {}
        self._blocks = itertools.count()
        self._kept: _Step | None = None
        """Of the last slice."""

    def end(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.tail.block.leave()
            kept = self._kept
            if kept is not None and not any(
                one.tail.block is kept.block for one in self._sessions.values()
            ):
                self._kept = None

    def end_all_on(self, context_id: str) -> None:
        for session_id, session in list(self._sessions.items()):
            if session.context_id == context_id:
                self.end(session_id)

    def clear(self) -> None:
        for session_id in list(self._sessions):
            self.end(session_id)

    def generate(self, request: AnswerRequest) -> Iterator[TokenChunk]:
        """Extends the session's tail by the request's tokens, then yields token after token."""
        for together in self._generate((request,)):
            yield from together.chunks

    def generate_together(self, requests: tuple[AnswerRequest, ...]) -> Iterator[TokenChunks]:
        """Several sessions' answers: first the questions, short ones together, then a token of
        every session with each step, those of one context sweeping its keys once. A session's
        tokens do not depend on the others but for rounding: a row of a larger matrix product may
        be summed in another order. Requests of slices stop there, and go on in a later call,
        together or apart, with whoever is asked along."""
        for at in range(0, len(requests), MAX_TOGETHER):
            yield from self._generate(requests[at : at + MAX_TOGETHER])

    def _generate(self, requests: tuple[AnswerRequest, ...]) -> Iterator[TokenChunks]:
        for request in requests:
            if not request.token_ids and not request.goes_on:
                raise BadInput(f"session {request.session_id}: a question needs at least one token")
        if len({request.session_id for request in requests}) < len(requests):
            raise BadInput("a session was asked twice at once; ask it one question after the other")
        going = [self._going(request) for request in requests]
        turns = []
        for request, session, turn in zip(requests, self._room(requests), going, strict=True):
            if turn is None:
                turn = session.turn = _Turn(request, session)
            else:
                turn.slice(request.slice_tokens)
            turns.append(turn)
        short = [turn for turn in turns if not turn.count and len(turn.tokens) <= SHORT_QUESTION]
        if len(short) > 1:
            for some in _batches(sorted(short, key=lambda turn: turn.session.context_id)):
                yield self._first_tokens(some)
        for turn in turns:
            if not turn.count:
                logits, long_turn = self._question(turn.session, turn.request)
                yield TokenChunks(chunks=self._chosen([turn], logits[None], long_turn))
        while turns := [turn for turn in turns if not turn.rests]:
            yield from self._decode(turns)

    def _going(self, request: AnswerRequest) -> _Turn | None:
        """The turn that the request goes on with."""
        if not request.goes_on:
            return None
        session = self._sessions.get(request.session_id)
        if session is None or session.turn is None or session.turn.done:
            raise BadInput(
                f"session {request.session_id} has no answer to go on with; ask it again"
            )
        return session.turn

    def _decode(self, turns: list[_Turn]) -> Iterator[TokenChunks]:
        """Until half of the turns are done: then the rest goes on in a smaller step."""
        step = self._kept
        if step is None or not step.carries(turns):
            turns = sorted(turns, key=lambda turn: turn.session.context_id)
            self._kept = step = _Step(turns, self._decoding(turns))
        turns, decoding = step.turns, step.decoding
        while 2 * sum(not turn.done for turn in turns) > len(turns):
            if all(turn.rests for turn in turns):
                return
            self._check_open(turns)
            step.intact = False  # unless this one comes to its end
            logits, greedy = decoding.step()
            going = [None if turn.rests else turn for turn in turns]
            for turn in going:
                if turn is not None:
                    self._moved(turn)
            samplers = [None if turn is None else turn.sampler for turn in going]
            drawn = not all(sampler is None or sampler.greedy for sampler in samplers)
            tokens = next_tokens(samplers, logits, greedy, self._runtime.transport)
            told = logprobs_of(
                logits, tokens, [0 if turn is None else turn.request.logprobs for turn in going]
            )
            chunks = tuple(
                turn.take(token, what)
                for turn, token, what in zip(going, tokens, told, strict=True)
                if turn is not None
            )
            if drawn:
                decoding.draw(tokens)
            step.intact = len({turn.rests for turn in turns if not turn.done}) <= 1
            decoding.rest(
                [
                    row
                    for row, turn in enumerate(going)
                    if turn is not None and (turn.done or (turn.rests and not step.intact))
                ]
            )
            yield TokenChunks(chunks=chunks)

    def _check_open(self, turns: list[_Turn]) -> None:
        for turn in turns:
            name = turn.request.session_id
            if not turn.rests and self._sessions.get(name) is not turn.session:
                raise BadInput(f"session {name} was ended while it was answered; begin a new one")

    def _decoding(self, turns: list[_Turn]) -> Decoding:
        sessions = [turn.session for turn in turns]
        return Decoding(
            self._runtime,
            *self._standing(sessions),
            [s.next_position for s in sessions],
            [s.unseen[0] for s in sessions],
            max(turn.left for turn in turns),
        )

    def _first_tokens(self, turns: list[_Turn]) -> TokenChunks:
        """Short questions through the model in one forward; those on one context are neighbours."""
        runtime = self._runtime
        rows: list[_Session] = []
        positions: list[int] = []
        ids: list[int] = []
        spans: list[Span] = []
        for turn in turns:
            at = turn.session.next_position
            spans.append(Span(at, at + len(turn.tokens)))
            rows += [turn.session] * len(turn.tokens)
            positions += range(at, at + len(turn.tokens))
            ids += turn.tokens
        with on_device(runtime.device), torch.inference_mode():
            step = DecodeStep(
                runtime.transport,
                runtime.spec.backend,
                *self._standing(rows),
                positions,
                runtime.device,
            )
            step.begin()
            last = torch.tensor([span.tokens for span in spans]).cumsum(0) - 1
            logits = runtime.forward(
                torch.tensor(ids), step.cursor.where, step, logits=True, last_only=False, rows=last
            )
        for turn, span in zip(turns, spans, strict=True):
            turn.session.tail.reserve(self._owned(span))
            turn.session.next_position, turn.session.unseen = span.stop, ()
        return TokenChunks(chunks=self._chosen(turns, logits.float()))

    def _standing(self, rows: list[_Session]) -> tuple[list[Shared], TailRows]:
        """What the rows of a step attend to: contexts, those of one being neighbours, and tails."""
        shared: list[Shared] = []
        begin = 0
        for context_id, same in itertools.groupby(session.context_id for session in rows):
            stop = begin + len(list(same))
            shared.append(Shared(self._contexts[context_id].shard, begin, stop))
            begin = stop
        starts = [self._contexts[session.context_id].num_tokens for session in rows]
        tails = [session.tail for session in rows]
        return shared, rows_of_tails(tails[0].block, tails, starts)

    def _moved(self, turn: _Turn) -> None:
        """Its last token went through the model; where this rank keeps it, it lies in the tail."""
        session = turn.session
        at = Span(session.next_position, session.next_position + 1)
        session.tail.reserve(self._owned(at))
        session.next_position, session.unseen = at.stop, ()

    def _chosen(
        self, turns: list[_Turn], logits: torch.Tensor, long_turn: LongTurn | None = None
    ) -> tuple[TokenChunk, ...]:
        transport = self._runtime.transport
        samplers = [turn.sampler for turn in turns]
        tokens = next_tokens(samplers, logits, greedy_tokens(logits, transport), transport)
        told = logprobs_of(logits, tokens, [turn.request.logprobs for turn in turns])
        return tuple(
            turn.take(token, what, long_turn)
            for turn, token, what in zip(turns, tokens, told, strict=True)
        )

    def _owned(self, span: Span) -> tuple[Span, ...]:
        """What this rank keeps of new tail positions."""
        runtime = self._runtime
        page_tokens = page_tokens_for(runtime.facts.head_dim)
        return owned(span, runtime.rank, runtime.spec.world_size, page_tokens)

    def _room(self, requests: tuple[AnswerRequest, ...]) -> list[_Session]:
        """The sessions of the requests, their tails in one block that has room for all that the
        requests may add."""
        known = [self._sessions.get(request.session_id) for request in requests]
        held, whole = [], []
        for request, session in zip(requests, known, strict=True):
            start = self._contexts[request.context_id].num_tokens
            now = session.next_position if session else start
            stop = self._stop(request, session, now)
            held.append(self._owned(Span(start, now)))
            whole.append(total_tokens(self._owned(Span(start, stop))))
        tails = [session.tail for session in known if session]
        if len(tails) == len(requests) and all(
            tail.block is tails[0].block and rows <= tail.capacity_tokens
            for tail, rows in zip(tails, whole, strict=True)
        ):
            for tail, spans in zip(tails, held, strict=True):
                tail.keep(spans)
            return [session for session in known if session]
        facts = self._runtime.facts
        name = f"tails {next(self._blocks)} of session {requests[0].session_id}"
        if len(requests) > 1:
            name += f" and {len(requests) - 1} more"
        block = TailBlock(self._runtime, name, page_tokens_for(facts.head_dim), whole)
        sessions = []
        for request, session, tail, spans in zip(requests, known, block.tails, held, strict=True):
            if session is None:
                start = self._contexts[request.context_id].num_tokens
                session = _Session(request.context_id, tail, start)
                self._sessions[request.session_id] = session
            else:
                tail.take_over(session.tail, spans, facts.num_layers)
                session.tail.block.leave()
                session.tail = tail
            sessions.append(session)
        return sessions

    def _stop(self, request: AnswerRequest, session: _Session | None, now: int) -> int:
        """The position behind all that the request may add. TooLarge beyond the model's."""
        facts = self._runtime.facts
        unseen = len(session.unseen) if session else 0
        left = request.max_tokens
        if request.goes_on and session is not None and session.turn is not None:
            left = session.turn.left
        stop = now + unseen + len(request.token_ids) + left
        if stop > facts.max_positions:
            raise TooLarge(
                f"position {stop} is beyond the {facts.max_positions} of {facts.name}: fewer "
                "--max-tokens, or a shorter question"
            )
        return stop

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
        mine = self._owned(span)
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
