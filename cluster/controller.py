"""The controller: prefills contexts on a gang, keeps them in a store, answers questions on them.

A plain class. It knows which contexts the gang holds and which sessions stand on them; ranks know
their shards and tails. What it knows of contexts it tells a directory, its own or one that many
share, and looks prefixes up there; what is read is leased there, what sessions stand on is referred
to. One caller at a time: a gang does one thing at a time anyway.

A controller works in one namespace. Contexts of another one, of a shared gang, store or directory,
do not exist for it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import cast

import msgspec
import numpy as np
import torch

from ringspan.attention.tail import LONG_TURN_TOKENS
from ringspan.cluster.batched import (
    TOKEN_TIMEOUT_S,
    TOKENS_A_TIMEOUT,
    Question,
    ask_many,
    request_of,
)
from ringspan.cluster.events import (
    IsCancelled,
    OnEvent,
    OnPause,
    PrefillDone,
    PrefillTimings,
    ignore_event,
    ignore_pause,
    never,
)
from ringspan.cluster.gang import Gang
from ringspan.cluster.known import Known
from ringspan.cluster.mending import recompute_lost
from ringspan.cluster.messages import (
    AnswerRequest,
    ModelFacts,
    PrefillPlan,
    ShardOpened,
    TokenChunk,
)
from ringspan.cluster.page_directory import PageDirectory
from ringspan.cluster.planner import (
    PrefillOptions,
    kv_bytes,
    plan_prefill,
    with_prediction,
)
from ringspan.cluster.prefill_journal import LeftBehind, left_behind
from ringspan.cluster.prefill_task import DISK_TIMEOUT_S, PrefillTask
from ringspan.cluster.reading import Reading
from ringspan.cluster.scheme_choices import SchemeChoices
from ringspan.cluster.session import ContextHandle, Prefix, Sessions, form_of, longest_prefix
from ringspan.cluster.stored import Description, check_model, store_bytes
from ringspan.cluster.wishes import Interlude, Wishes
from ringspan.errors import BadInput, CorruptPage, RingspanError, StoreError, TooLarge, UnknownName
from ringspan.kvstore.directory import Directory
from ringspan.kvstore.fidelity import (
    ANY,
    Fidelity,
    check_fidelity,
    codec_fidelity,
    fidelity_named,
    fidelity_of,
)
from ringspan.kvstore.folder import Store
from ringspan.kvstore.forms import second_form
from ringspan.kvstore.handoff import HandoffPlan
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, page_keys
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.page import Origin, PageForm
from ringspan.kvstore.prefixes import Leading
from ringspan.kvstore.records import Tier
from ringspan.kvstore.tiers.counters import added
from ringspan.kvstore.transcode import recoded_form, recoded_origin

TIDY_TIMEOUT_S = 30.0


def _as_opened(manifest: Manifest, codec_name: str) -> tuple[PageForm, Origin]:
    """Of the pages of a stored context once they lie in a codec (empty: their own)."""
    if not codec_name:
        return manifest.form, manifest.origin
    form = recoded_form(manifest.form, codec_name, f"context {manifest.context_id}")
    return form, recoded_origin(manifest.origin, manifest.form)


class _OnGang:
    """Of what a controller knows, the contexts that its gang holds."""

    def __init__(self, known: Known) -> None:
        self._known = known

    def leading(self, keys: Sequence[str], form: PageForm, lowest: Fidelity = ANY) -> list[Leading]:
        rows = self._known.leading(keys, form, lowest)
        return [row for row in rows if row.shelf.tier is Tier.GPU]

    def manifest(self, context_id: str) -> Manifest | None:
        return None


class Controller:
    """`gang` must be started; it stays the caller's to close if `close` is not called.

    directory: None for one of its own. namespace: of all its contexts, `tenancy.tenant_namespace`.
    """

    def __init__(
        self,
        gang: Gang,
        store: Store | None = None,
        *,
        directory: PageDirectory | None = None,
        namespace: bytes = PUBLIC_NAMESPACE,
    ) -> None:
        self._gang, self._store = gang, store
        self._directory: PageDirectory = Directory() if directory is None else directory
        self._namespace = namespace
        self._known = Known(self._directory, namespace, store)
        self._contexts: dict[str, ContextHandle] = {}
        self._sessions = Sessions()
        self._schemes = SchemeChoices(gang)
        self.mends_itself = False
        """A lost gang is left for the owner to `mend`; otherwise it is closed once a prefill or an
        opening has failed."""
        self._left_over: set[str] = set()
        """Given up while the gang was lost: ranks that live on may hold something of them."""

    def beside(self, namespace: bytes) -> Controller:
        """One for another namespace, over the same gang, store and directory. Close one of them:
        that ends the gang."""
        other = Controller(self._gang, self._store, directory=self._directory, namespace=namespace)
        other.mends_itself = self.mends_itself
        return other

    @property
    def gang(self) -> Gang:
        return self._gang

    @property
    def store(self) -> Store | None:
        return self._store

    def stored(self) -> list[Manifest]:
        """Contexts of this namespace in the store, by id."""
        return self._known.stored()

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
        return self._plan(token_ids, options or PrefillOptions())[0]

    def _plan(
        self, token_ids: np.ndarray, options: PrefillOptions
    ) -> tuple[PrefillPlan, tuple[str, ...]]:
        """The plan, and the keys of its pages: a sequence is hashed once."""
        gang = self._gang
        plan = plan_prefill(self.facts, gang.ready, len(token_ids), gang.world_size, options)
        keys = page_keys(self.facts.fingerprint, self._namespace, token_ids, plan.page_tokens)
        plan = msgspec.structs.replace(plan, context_id=context_id(keys))
        if self._namespace != PUBLIC_NAMESPACE:
            plan = msgspec.structs.replace(plan, namespace=self._namespace.hex())
        return plan, tuple(keys)

    def prefill(
        self,
        token_ids: np.ndarray,
        options: PrefillOptions | None = None,
        *,
        description: Description | None = None,
        on_event: OnEvent = ignore_event,
        on_pause: OnPause = ignore_pause,
        cancelled: IsCancelled = never,
        again: bool = False,
        reuse: bool = True,
        save: bool = True,
        interlude: Interlude | None = None,
    ) -> PrefillDone:
        """Take the tokens (int32 [n]) through the model and keep their KV, on the gang and, if
        there is a store, in it. A context that the store has with this codec is not computed again
        unless `again`. Where the gang or the store has a context that begins with the same pages,
        only what is new is computed, unless `again` or not `reuse`; the plan that comes back says
        how much. Without `save` only the gang keeps it, and only what the gang holds is built upon.
        interlude: work of others, let in between two chunks.

        Raises before any work what can be known before (see `plan`; StoreError for want of room),
        InUse for a context that is being read and would be computed anew. While it runs a lost rank
        is replaced, which `on_pause` tells, and other contexts leave the gang, of which that rank
        had a share; RankLost, naming rank and chunk, where that is not to be had; Cancelled.
        Whatever it raises, nothing half-written stays.

        Where a controller's process on this host was killed in the middle of the same prefill
        (tokens, options, ranks), whole chunks of it are read from the store's staging folder and
        gone on behind; `PrefillDone.resumed` tells.
        """
        began = time.perf_counter()
        token_ids = np.ascontiguousarray(token_ids, dtype=np.int32)
        options = options or PrefillOptions()
        plan, keys = self._plan(token_ids, options)
        if not again and (stored := self._stored(plan, options)) is not None:
            return PrefillDone(
                context_id=plan.context_id,
                plan=plan,
                reused=True,
                saved=True,
                kv_bytes=stored.payload_bytes,
                timings=PrefillTimings(plan_s=time.perf_counter() - began),
            )
        store, left = self._store if save else None, None
        if store is not None:
            left = left_behind(store, plan, options, self._namespace, self._gang.world_size)
            need_bytes = store_bytes(plan, kv_bytes(plan, self.facts), self._gang.world_size)
            going_on_with = None if left is None else left.folder
            store.check_room(need_bytes, going_on_with, in_use=self._directory.in_use)
        self._let_go(plan.context_id)
        write = self._known.begin(plan.context_id, keys, plan.num_tokens)
        try:
            prefix = self._prefix(plan, options, keys, save) if reuse and not again else None
            wishes = Wishes(description or Description(), on_event, on_pause, cancelled, interlude)
            done = self._prefill(plan, prefix, token_ids, wishes, began, store, options, left)
            form, kept = form_of(plan, self.facts), self._contexts[plan.context_id].fidelity
            self._known.arrived(write, plan.context_id, keys, form, kept, done.kv_bytes)
        except BaseException as error:
            self._known.failed(write)
            if isinstance(error, Exception):
                self._forget_quietly(plan.context_id)
            raise
        return done

    def _prefill(
        self,
        plan: PrefillPlan,
        prefix: Prefix | None,
        token_ids: np.ndarray,
        wishes: Wishes,
        began: float,
        store: Store | None,
        asked: PrefillOptions,
        left: LeftBehind | None,
    ) -> PrefillDone:
        name = plan.context_id
        kept = self._codec_fidelity(plan.codec)
        task = PrefillTask(
            self._gang,
            store,
            self._known,
            self._namespace,
            plan,
            token_ids,
            wishes,
            asked=asked,
            left=left,
            forget=self._forget_quietly,
            mended=lambda _: self._forget_others(name),
        )
        done = task.run(prefix, began)
        if prefix is not None and done.plan.prefix_id:
            kept = min(kept, prefix.fidelity)
        self._contexts[name] = ContextHandle(
            context_id=name,
            num_tokens=plan.num_tokens,
            codec=plan.codec,
            kv_bytes=done.kv_bytes,
            fidelity=kept,
        )
        return done

    # contexts

    def open(self, name: str, lowest_fidelity: str = "", codec_name: str = "") -> ContextHandle:
        """Bring a stored context (an id or the beginning of one) to the gang, verified. A context
        that the gang holds already is given back as it is. BadInput for one below the fidelity
        asked for (`exact`, `8-bit`, ...; empty: any).

        codec_name: its pages are to lie in this codec: those of a second form if the store has
        one, else recoded while they are read. BadInput for one that would keep more than the
        stored one does."""
        for held in self._contexts:
            if name and held.startswith(name) and (self._store is None or len(name) == len(held)):
                return self._good_enough(self._contexts[held], lowest_fidelity)
        if self._store is None:
            raise UnknownName("context", name, tuple(self._contexts))
        manifest = self._known.find_stored(name)
        if manifest.context_id in self._contexts:
            return self._good_enough(self._contexts[manifest.context_id], lowest_fidelity)
        context, store = f"context {manifest.context_id}", self._store
        if codec_name == manifest.codec:
            codec_name = ""
        form, origin = _as_opened(manifest, codec_name)
        if codec_name and (second := second_form(store, manifest, codec_name)) is not None:
            store, manifest = second
            codec_name, form, origin = "", manifest.form, manifest.origin
        check_fidelity(context, form, origin, lowest_fidelity)
        check_model(manifest, self.facts)
        began = time.perf_counter()
        write = self._known.begin(manifest.context_id, manifest.keys, manifest.num_tokens)
        try:
            manifest, opened, recomputed = self._open_whole(store, manifest, codec_name)
            form, origin = _as_opened(manifest, codec_name)
            held_bytes = sum(shard.kv_bytes for shard in opened)
            self._known.arrived(
                write,
                manifest.context_id,
                manifest.keys,
                form,
                fidelity_of(form, origin),
                held_bytes,
            )
        except BaseException as error:
            self._known.failed(write)
            if isinstance(error, Exception):
                self._forget_quietly(manifest.context_id)
            raise
        handle = ContextHandle(
            context_id=manifest.context_id,
            num_tokens=manifest.num_tokens,
            codec=form.codec,
            kv_bytes=held_bytes,
            open_s=time.perf_counter() - began,
            fidelity=fidelity_of(form, origin),
            pages=added(shard.pages for shard in opened),
            recomputed=recomputed,
        )
        self._contexts[handle.context_id] = handle
        return handle

    def _open_whole(
        self, store: Store, manifest: Manifest, codec_name: str = ""
    ) -> tuple[Manifest, list[ShardOpened], int]:
        """On every rank; pages that can be had from nowhere are computed again first: the manifest
        then, the ranks' shards, how many pages that were."""
        try:
            return manifest, self._open_on_ranks(store, manifest, codec_name), 0
        except (CorruptPage, StoreError) as error:
            try:
                done = recompute_lost(self._gang, store, manifest)
            except (CorruptPage, StoreError, BadInput, TooLarge) as why:
                raise type(error)(f"{error}; it could not be computed again: {why}") from error
            if not done.spans:
                raise
            opened = self._open_on_ranks(store, done.manifest, codec_name)
            return done.manifest, opened, len(done.spans)

    def _open_on_ranks(
        self, store: Store, manifest: Manifest, codec_name: str = ""
    ) -> list[ShardOpened]:
        what = f"opening context {manifest.context_id}"
        opened: list[ShardOpened] = self._gang.call(
            "open", manifest, str(store.root), codec_name, timeout_s=DISK_TIMEOUT_S, what=what
        )
        return opened

    def drop(self, name: str) -> None:
        """Free a context's memory on the gang, with its sessions. The store keeps it. InUse while
        an answer reads it."""
        if self._let_go(name):
            self._gang.call("drop", name, timeout_s=TIDY_TIMEOUT_S, what=f"dropping context {name}")

    def take_over(
        self, plan: HandoffPlan, token_ids: np.ndarray, opened: Sequence[ShardOpened]
    ) -> ContextHandle:
        """The gang holds, since a hand-off by this plan ended, a context of these tokens (int32
        [n]), verified on every rank: it may be asked from now on."""
        name = plan.fence.context_id
        keys = page_keys(self.facts.fingerprint, self._namespace, token_ids, plan.form.page_tokens)
        write = self._known.begin(name, keys, plan.num_tokens)
        kept = fidelity_of(plan.form, plan.origin)
        kv_held = sum(shard.kv_bytes for shard in opened)
        try:
            self._known.arrived(write, name, keys, plan.form, kept, kv_held)
        except BaseException as error:
            self._known.failed(write)
            if isinstance(error, Exception):
                self._forget_quietly(name)
            raise
        self._contexts[name] = ContextHandle(
            context_id=name,
            num_tokens=plan.num_tokens,
            codec=plan.form.codec,
            kv_bytes=kv_held,
            fidelity=kept,
            pages=added(shard.pages for shard in opened),
        )
        return self._contexts[name]

    # answers

    def begin_session(self, name: str) -> str:
        """An empty session on a context that the gang holds (`prefill` or `open` it first)."""
        context_id = self._held(name).context_id
        session_id = self._sessions.begin(context_id)
        self._known.session_began(session_id, context_id)
        return session_id

    def reading(self, names: Sequence[str]) -> Reading:
        """Leases on contexts that the gang holds: they stay there until `Reading.end`."""
        return self._known.reading([self._held(name).context_id for name in names])

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
        return self._read(self._answer(request, cancelled), [handle.context_id])

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

    def ask_many(
        self, questions: Sequence[Question], *, cancelled: IsCancelled = never
    ) -> Iterator[TokenChunk]:
        """Answer several sessions' questions together; see `batched.ask_many`."""
        tokens = ask_many(
            self._gang, self._sessions, self._held, self._schemes, questions, cancelled
        )
        return self._read(tokens, [question.context_id for question in questions])

    def _read(self, tokens: Iterator[TokenChunk], names: Sequence[str]) -> Iterator[TokenChunk]:
        """The same tokens, under leases on what they are computed from."""
        reading = self.reading(names)
        try:
            for token in tokens:
                reading.check()
                yield token
        finally:
            tokens.close()  # type: ignore[attr-defined]  # a generator
            reading.end()

    def end_session(self, session_id: str) -> None:
        """May be repeated."""
        if not self._sessions.end(session_id):
            return
        self._known.sessions_ended([session_id])
        if not self._gang.lost:
            self._gang.call(
                "end_session",
                session_id,
                timeout_s=TIDY_TIMEOUT_S,
                what=f"ending session {session_id}",
            )

    def request(self, question: Question) -> AnswerRequest:
        """For `batched.next_slice`, under a `reading` of its context; BadInput, UnknownName."""
        return request_of(self._sessions, self._held, self._schemes, question)

    def planned(
        self, token_ids: np.ndarray, options: PrefillOptions
    ) -> tuple[PrefillPlan, tuple[str, ...]]:
        """`plan`, and the keys of the pages, for `known_tokens`. Any thread may ask."""
        return self._plan(np.ascontiguousarray(token_ids, dtype=np.int32), options)

    def known_tokens(
        self, plan: PrefillPlan, keys: Sequence[str], options: PrefillOptions, save: bool
    ) -> int:
        """Tokens of the plan that `prefill` would not compute."""
        if plan.context_id in self._contexts or self._stored(plan, options) is not None:
            return plan.num_tokens
        prefix = self._prefix(plan, options, keys, save)
        return 0 if prefix is None else prefix.plan.reused_tokens

    def mended(self) -> None:
        """Ranks were lost and replaced, by whoever works on the same gang: contexts had a share on
        them, so the gang holds none of them any more, and their sessions have ended."""
        self._forget_others("")

    def close(self) -> None:
        """Ends the gang. May be repeated."""
        self._known.close()
        self._contexts.clear()
        self._sessions = Sessions()
        self._gang.close()

    # helpers

    def _prefix(
        self, plan: PrefillPlan, asked: PrefillOptions, keys: Sequence[str], stored: bool = True
    ) -> Prefix | None:
        """What need not be computed, and the plan for the rest; not `stored`: only of contexts
        that the gang holds."""
        lowest = fidelity_named(asked.lowest_fidelity) if asked.lowest_fidelity else ANY
        known = self._known if stored else cast("Known", _OnGang(self._known))
        prefix = longest_prefix(plan, keys, form_of(plan, self.facts), known, lowest)
        if prefix is None:
            return None
        onto = prefix.plan
        if asked.scheme == "auto":
            scheme = self._schemes.onto(onto.chunks[0].tokens, onto.reused_tokens, plan.codec)
            onto = msgspec.structs.replace(onto, scheme=scheme)
        return prefix._replace(plan=with_prediction(onto, self.facts, self._gang.ready))

    def _good_enough(self, handle: ContextHandle, lowest_fidelity: str) -> ContextHandle:
        if lowest_fidelity and handle.fidelity < (wanted := fidelity_named(lowest_fidelity)):
            raise BadInput(
                f"context {handle.context_id} is {handle.fidelity.text}, asked for is "
                f"{wanted.text} or better: prefill it again with another --codec, or ask for less"
            )
        return handle

    def _let_go(self, name: str) -> bool:
        """The gang is to free the context; its sessions end. False if it does not hold it. InUse,
        with nothing changed, while an answer reads it."""
        if name not in self._contexts:
            return False
        self._known.check_unread(name)
        self._known.sessions_ended(self._sessions.end_all_on(name))
        self._known.let_go(name)
        del self._contexts[name]
        return True

    def _held(self, name: str) -> ContextHandle:
        try:
            return self._contexts[name]
        except KeyError:
            raise UnknownName("context", name, tuple(self._contexts)) from None

    def _stored(self, plan: PrefillPlan, asked: PrefillOptions) -> Manifest | None:
        """The store's manifest of this context in this codec, as good as was asked for. A damaged
        one does not count: the new one will replace it."""
        if self._store is None:
            return None
        lowest = fidelity_named(asked.lowest_fidelity) if asked.lowest_fidelity else ANY
        for manifest in self._known.stored():
            found = (manifest.context_id, manifest.codec)
            if found == (plan.context_id, plan.codec) and manifest.fidelity >= lowest:
                return manifest
        return None

    def _codec_fidelity(self, codec: str) -> Fidelity:
        facts = self.facts
        dtype = getattr(torch, facts.dtype)
        return codec_fidelity(codec, facts.num_kv_heads, facts.head_dim, dtype)

    def _forget_others(self, name: str) -> None:
        """A rank was lost, and with it its share of every context that the gang held; `name` is
        being put together again. The store keeps what it has."""
        for other in [held for held in self._contexts if held != name]:
            del self._contexts[other]
            self._known.sessions_ended(self._sessions.end_all_on(other))
            self._known.lose(other)
            self._left_over.add(other)
        while self._left_over:
            other = self._left_over.pop()
            if other == name:
                continue
            what = f"dropping context {other}"
            self._gang.call("drop", other, timeout_s=TIDY_TIMEOUT_S, what=what)

    def _forget_quietly(self, name: str) -> None:
        """After a failure, whose error is the one to show."""
        self._contexts.pop(name, None)
        self._known.sessions_ended(self._sessions.end_all_on(name))
        self._known.lose(name)
        if self._gang.lost:
            if self.mends_itself:
                self._left_over.add(name)
            else:
                self._gang.close()
            return
        try:
            self._gang.call("drop", name, timeout_s=TIDY_TIMEOUT_S, what=f"dropping context {name}")
        except RingspanError:
            self._gang.close()
