"""The controller: prefills contexts on a gang, keeps them in a store, answers questions on them.

A plain class. It knows which contexts the gang holds and which sessions stand on them; ranks know
their shards and tails. One caller at a time: a gang does one thing at a time anyway.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np

from ringspan.attention.tail import LONG_TURN_TOKENS
from ringspan.cluster.events import (
    Cancelled,
    IsCancelled,
    OnEvent,
    PrefillDone,
    PrefillTimings,
    ignore_event,
    never,
)
from ringspan.cluster.gang import Gang, Pending
from ringspan.cluster.messages import (
    AnswerRequest,
    ChunkDone,
    ModelFacts,
    PrefillPlan,
    ShardOpened,
    ShardSaved,
    TokenChunk,
)
from ringspan.cluster.pace import Pace
from ringspan.cluster.planner import (
    PrefillOptions,
    kv_bytes,
    plan_prefill,
    with_prediction,
)
from ringspan.cluster.prefill_run import PrefillRun
from ringspan.cluster.scheme_choices import SchemeChoices
from ringspan.cluster.session import ContextHandle, Prefix, Sessions, longest_prefix
from ringspan.cluster.stored import Description, check_model, manifest_of, store_bytes
from ringspan.errors import BadInput, CorruptPage, RingspanError, StoreError, UnknownName
from ringspan.kvstore.folder import Store
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, page_keys
from ringspan.kvstore.manifest import Manifest

BEGIN_TIMEOUT_S = 120.0
"""For ranks to take memory for a shard."""
DISK_TIMEOUT_S = 3600.0
"""For ranks to write or read their pages."""
TOKEN_TIMEOUT_S = 600.0
"""For one token; the first one takes the whole question through the model ..."""
TOKENS_A_TIMEOUT = 65_536
"""... and has the time once more for each so many tokens of it."""
TIDY_TIMEOUT_S = 30.0
CHUNKS_AHEAD = 2
"""Chunks submitted at once: the next one waits at the ranks when one is done."""


class Controller:
    """`gang` must be started; it stays the caller's to close if `close` is not called."""

    def __init__(self, gang: Gang, store: Store | None = None) -> None:
        self._gang, self._store = gang, store
        self._contexts: dict[str, ContextHandle] = {}
        self._sessions = Sessions()
        self._schemes = SchemeChoices(gang)

    @property
    def facts(self) -> ModelFacts:
        return self._gang.ready[0].facts

    @property
    def contexts(self) -> tuple[ContextHandle, ...]:
        """Those that the gang holds."""
        return tuple(self._contexts.values())

    # prefill

    def plan(self, token_ids: np.ndarray, options: PrefillOptions | None = None) -> PrefillPlan:
        """What `prefill` would do with these tokens, with the context's id. Refuses what cannot
        be done (TooLarge, UnknownName, BadInput)."""
        gang = self._gang
        plan = plan_prefill(
            self.facts, gang.ready, len(token_ids), gang.world_size, options or PrefillOptions()
        )
        return msgspec.structs.replace(plan, context_id=context_id(self._keys(plan, token_ids)))

    def prefill(
        self,
        token_ids: np.ndarray,
        options: PrefillOptions | None = None,
        *,
        description: Description | None = None,
        on_event: OnEvent = ignore_event,
        cancelled: IsCancelled = never,
        again: bool = False,
        reuse: bool = True,
    ) -> PrefillDone:
        """Take the tokens (int32 [n]) through the model and keep their KV, on the gang and, if
        there is a store, in it. A context that the store has with this codec is not computed again
        unless `again`. Where the gang or the store has a context that begins with the same pages,
        only what is new is computed, unless `again` or not `reuse`; the plan that comes back says
        how much.

        Raises before any work what can be known before (see `plan`; StoreError for want of room);
        RankLost naming rank and chunk; Cancelled. Whatever it raises, nothing half-written stays.
        """
        began = time.perf_counter()
        token_ids = np.ascontiguousarray(token_ids, dtype=np.int32)
        description = description or Description()
        plan = self.plan(token_ids, options)
        if not again and (stored := self._stored(plan)) is not None:
            return PrefillDone(
                context_id=plan.context_id,
                plan=plan,
                reused=True,
                saved=True,
                kv_bytes=stored.payload_bytes,
                timings=PrefillTimings(plan_s=time.perf_counter() - began),
            )
        if self._store is not None:
            self._store.check_room(store_bytes(plan, kv_bytes(plan, self.facts)))
        try:
            prefix = None
            if reuse and not again:
                prefix = self._prefix(plan, options or PrefillOptions(), token_ids)
            return self._prefill(plan, prefix, token_ids, description, on_event, cancelled, began)
        except Exception:
            self._forget_quietly(plan.context_id)
            raise

    def _prefill(
        self,
        plan: PrefillPlan,
        prefix: Prefix | None,
        token_ids: np.ndarray,
        description: Description,
        on_event: OnEvent,
        cancelled: IsCancelled,
        began: float,
    ) -> PrefillDone:
        name = plan.context_id
        self._sessions.end_all_on(name)
        self._contexts.pop(name, None)
        plan = self._begin(plan, prefix, token_ids)
        planned = time.perf_counter()
        run = PrefillRun(plan, Pace(plan, self.facts), planned)
        self._run_chunks(run, on_event, cancelled)
        computed = time.perf_counter()
        if self._store is not None:
            self._save(self._store, plan, token_ids, description)
        self._contexts[name] = ContextHandle(
            context_id=name,
            num_tokens=plan.num_tokens,
            codec=plan.codec,
            kv_bytes=run.kv_bytes,
            keys=tuple(self._keys(plan, token_ids)),
        )
        return run.finished(
            self._store is not None,
            PrefillTimings(
                plan_s=planned - began,
                prefill_s=computed - planned,
                save_s=time.perf_counter() - computed,
                chunk_s=run.chunk_s,
            ),
        )

    def _begin(
        self, plan: PrefillPlan, prefix: Prefix | None, token_ids: np.ndarray
    ) -> PrefillPlan:
        """Memory on the ranks, with the prefix's pages in it; the plan for what is left to
        compute. Pages that cannot be read, or are not what they should be, are computed too."""
        if prefix is None:
            self._begin_with(plan, "begin_prefill", token_ids)
            return plan
        try:
            if prefix.manifest is None or self._store is None:
                self._begin_with(prefix.plan, "begin_prefill_on_held", token_ids)
            else:
                stored = (prefix.manifest, str(self._store.root))
                self._begin_with(prefix.plan, "begin_prefill_on_stored", token_ids, *stored)
        except (CorruptPage, StoreError) as error:
            plan = msgspec.structs.replace(plan, not_reused=str(error))
            return self._begin(plan, None, token_ids)
        return prefix.plan

    def _begin_with(self, plan: PrefillPlan, method: str, *args: object) -> None:
        what = f"beginning context {plan.context_id}"
        if plan.prefix_id:
            what += f" on {plan.reused_tokens} tokens of context {plan.prefix_id}"
        timeout_s = DISK_TIMEOUT_S if method == "begin_prefill_on_stored" else BEGIN_TIMEOUT_S
        self._gang.call(method, plan, *args, timeout_s=timeout_s, what=what)

    def _run_chunks(self, run: PrefillRun, on_event: OnEvent, cancelled: IsCancelled) -> None:
        """Chunk after chunk, the next one always submitted before the last one is waited for."""
        plan = run.plan
        num_chunks = len(plan.chunks)
        asked: deque[Pending] = deque()
        submitted = 0
        for index in range(num_chunks):
            while submitted < num_chunks and len(asked) < CHUNKS_AHEAD:
                if cancelled():
                    raise Cancelled(
                        f"prefill of context {plan.context_id} was cancelled after {index} of "
                        f"{num_chunks} chunks; nothing of it was kept"
                    )
                span = plan.chunks[submitted]
                what = f"prefill chunk {submitted} [{span.start}, {span.stop})"
                asked.append(
                    self._gang.submit("prefill_chunk", plan.context_id, submitted, what=what)
                )
                submitted += 1
            done: list[ChunkDone] = asked.popleft().result(run.pace.timeout_s(index))
            on_event(run.add(done))

    def _save(
        self, store: Store, plan: PrefillPlan, token_ids: np.ndarray, description: Description
    ) -> Manifest:
        """Every rank writes its pages beside the others'; then, in one step, it is a context."""
        name = plan.context_id
        staging = store.stage(name, token_ids)
        try:
            saved: list[ShardSaved] = self._gang.call(
                "save",
                name,
                staging,
                timeout_s=DISK_TIMEOUT_S,
                what=f"saving context {name} after its last chunk",
            )
            manifest = manifest_of(
                plan, self._gang.spec, saved, staging, description, created_unix_s=time.time()
            )
            return store.publish(staging, manifest)
        except BaseException:
            if self._gang.lost:
                self._gang.close()  # or a rank that still writes would bring the folder back
            store.abort(staging)
            raise

    # contexts

    def open(self, name: str) -> ContextHandle:
        """Bring a stored context (an id or the beginning of one) to the gang, verified. A context
        that the gang holds already is given back as it is."""
        for held in self._contexts:
            if name and held.startswith(name) and (self._store is None or len(name) == len(held)):
                return self._contexts[held]
        if self._store is None:
            raise UnknownName("context", name, tuple(self._contexts))
        manifest = self._store.manifest(name)
        if manifest.context_id in self._contexts:
            return self._contexts[manifest.context_id]
        check_model(manifest, self.facts)
        began = time.perf_counter()
        try:
            opened: list[ShardOpened] = self._gang.call(
                "open",
                manifest,
                str(self._store.root),
                timeout_s=DISK_TIMEOUT_S,
                what=f"opening context {manifest.context_id}",
            )
        except Exception:
            self._forget_quietly(manifest.context_id)
            raise
        handle = ContextHandle(
            context_id=manifest.context_id,
            num_tokens=manifest.num_tokens,
            codec=manifest.codec,
            kv_bytes=sum(shard.kv_bytes for shard in opened),
            open_s=time.perf_counter() - began,
            keys=manifest.keys,
        )
        self._contexts[handle.context_id] = handle
        return handle

    def drop(self, name: str) -> None:
        """Free a context's memory on the gang, with its sessions. The store keeps it."""
        self._sessions.end_all_on(name)
        if self._contexts.pop(name, None) is not None:
            self._gang.call("drop", name, timeout_s=TIDY_TIMEOUT_S, what=f"dropping context {name}")

    # answers

    def begin_session(self, name: str) -> str:
        """An empty session on a context that the gang holds (`prefill` or `open` it first)."""
        return self._sessions.begin(self._held(name).context_id)

    def ask(
        self,
        session_id: str,
        name: str,
        token_ids: np.ndarray | tuple[int, ...] | list[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: tuple[int, ...] = (),
        cancelled: IsCancelled = never,
    ) -> Iterator[TokenChunk]:
        """Append the tokens to the session on context `name`, then yield the answer's tokens.

        seed: None takes a fresh one. Closing the iterator, or `cancelled`, ends the answer at
        most one token further; the session goes on from there.
        """
        handle = self._held(name)
        self._sessions.resume(session_id, handle.context_id)
        if max_tokens < 1:
            raise BadInput(f"max_tokens {max_tokens}: wanted at least 1")
        request = AnswerRequest(
            session_id=session_id,
            context_id=handle.context_id,
            token_ids=tuple(int(token) for token in token_ids),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=secrets.randbits(31) if seed is None else seed,
            stop_ids=stop_ids,
            scheme=(
                self._schemes.onto(len(token_ids), handle.num_tokens, handle.codec)
                if len(token_ids) >= LONG_TURN_TOKENS
                else "auto"
            ),
        )
        return self._answer(request, cancelled)

    def _answer(self, request: AnswerRequest, cancelled: IsCancelled) -> Iterator[TokenChunk]:
        what = f"answer of session {request.session_id} on context {request.context_id}"
        timeout_s = TOKEN_TIMEOUT_S * (1 + len(request.token_ids) // TOKENS_A_TIMEOUT)
        tokens = self._gang.stream("generate", request, timeout_s=timeout_s, what=what)
        try:
            for token in tokens:
                yield token
                if cancelled():
                    return
        finally:
            tokens.close()  # type: ignore[attr-defined]  # gangs stream by generators

    def end_session(self, session_id: str) -> None:
        """May be repeated."""
        if self._sessions.end(session_id) and not self._gang.lost:
            self._gang.call(
                "end_session",
                session_id,
                timeout_s=TIDY_TIMEOUT_S,
                what=f"ending session {session_id}",
            )

    def close(self) -> None:
        """Ends the gang. May be repeated."""
        self._contexts.clear()
        self._sessions = Sessions()
        self._gang.close()

    # helpers

    def _prefix(
        self, plan: PrefillPlan, asked: PrefillOptions, token_ids: np.ndarray
    ) -> Prefix | None:
        """What need not be computed, and the plan for the rest."""
        stored = self._store.contexts()[0] if self._store is not None else ()
        keys = self._keys(plan, token_ids)
        prefix = longest_prefix(plan, keys, self.facts, self._contexts.values(), stored)
        if prefix is None:
            return None
        onto = prefix.plan
        if asked.scheme == "auto":
            scheme = self._schemes.onto(onto.chunks[0].tokens, onto.reused_tokens, plan.codec)
            onto = msgspec.structs.replace(onto, scheme=scheme)
        return prefix._replace(plan=with_prediction(onto, self.facts, self._gang.ready))

    def _keys(self, plan: PrefillPlan, token_ids: np.ndarray) -> list[str]:
        return page_keys(self.facts.fingerprint, PUBLIC_NAMESPACE, token_ids, plan.page_tokens)

    def _held(self, name: str) -> ContextHandle:
        try:
            return self._contexts[name]
        except KeyError:
            raise UnknownName("context", name, tuple(self._contexts)) from None

    def _stored(self, plan: PrefillPlan) -> Manifest | None:
        """The store's manifest of this context in this codec. A damaged one does not count: the
        new one will replace it."""
        if self._store is None or plan.context_id not in self._store.ids():
            return None
        try:
            manifest = self._store.manifest(plan.context_id)
        except StoreError:
            return None
        return manifest if manifest.codec == plan.codec else None

    def _forget_quietly(self, name: str) -> None:
        """After a failure, whose error is the one to show."""
        self._contexts.pop(name, None)
        if self._gang.lost:
            self._gang.close()
            return
        try:
            self._gang.call("drop", name, timeout_s=TIDY_TIMEOUT_S, what=f"dropping context {name}")
        except RingspanError:
            self._gang.close()
