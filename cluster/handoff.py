"""A rank's part in handing a context over to, or taking it from, the ranks of another gang.

What moves and how it is verified is in kvstore/handoff.py; here are the rank's memory, its model's
fingerprint and its word on which prefill of a context it holds. A hand-off never fails a call: the
gangs stay in step, and `Moved.failed` says what became of it. `cluster/handing.py` calls all this.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import msgspec
import numpy as np
import torch.distributed as dist

from ringspan.cluster.device import on_device
from ringspan.cluster.messages import ShardOpened
from ringspan.cluster.opening import pool_name
from ringspan.cluster.prefills import Contexts, HeldContext, namespace_of
from ringspan.cluster.runtime import Runtime
from ringspan.errors import BadInput, RankLost
from ringspan.kvstore.handoff import (
    Fence,
    HandoffPlan,
    Moved,
    check_fence,
    checksum_of,
    failed_note,
)
from ringspan.kvstore.handoff_send import Sending
from ringspan.kvstore.handoff_take import Receiving
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, page_keys
from ringspan.kvstore.leases import StaleHandle
from ringspan.kvstore.page import Origin, PageForm
from ringspan.kvstore.pair import Road, join_pair
from ringspan.kvstore.tiers.counters import COUNTERS, StoreCounters
from ringspan.kvstore.transcode import recoded_form, recoded_origin
from ringspan.types import Span, coalesce, total_tokens

STRETCH_PAGES = 64
"""Pages to each receiver at a time of a context that is complete: none waits for the others."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """sending rank -> controller: this is what it holds. The same from every rank."""

    fence: Fence
    form: PageForm
    """Of the pages as they will be sent."""
    origin: Origin
    num_tokens: int
    chunks: tuple[Span, ...]
    """As they are, or were, prefilled, what was taken over before them; empty for a context that
    was opened."""


class _Offered(NamedTuple):
    offer: Offer
    held: HeldContext
    """The very one: a context that was begun anew is another."""
    keys: tuple[str, ...]


class _Taking(NamedTuple):
    receiving: Receiving
    counters: StoreCounters
    began: float


class Handoffs:
    """Those of one rank."""

    def __init__(self, runtime: Runtime, contexts: Contexts) -> None:
        self._runtime, self._contexts = runtime, contexts
        self._offered: dict[str, _Offered] = {}
        """By context."""
        self._epochs: dict[str, int] = {}
        """The newest of each context that was offered here, or taken."""
        self._sending: dict[str, Sending] = {}
        """By hand-off."""
        self._taking: dict[str, _Taking] = {}
        self._stores: dict[str, dist.TCPStore] = {}
        self._given_up: dict[str, Moved] = {}
        """That the controller has not heard of yet."""

    # the sending gang

    def offer(
        self,
        name: str,
        epoch: int,
        codec_name: str,
        token_ids: np.ndarray | None,
        namespace: str,
    ) -> Offer:
        """Of a context held here, being prefilled or complete. Raises `StaleHandle` for an epoch
        that is not newer than all before, BadInput as `transcode.recoded_form` does.

        codec_name: to send the pages in; empty: as they are. token_ids, namespace (hex): of a
        context that was opened; a prefill knows its own.
        """
        held = self._contexts[name]
        shard = held.resident
        if epoch <= self._epochs.get(name, 0):
            raise StaleHandle(
                f"context {name} was offered under epoch {self._epochs[name]}, now under {epoch}: "
                "offer it under a newer one"
            )
        chunks: tuple[Span, ...] = ()
        if held.prefill is not None:
            plan, token_ids = held.prefill.plan, held.prefill.token_ids
            printed = namespace_of(plan)
            before = (Span(0, plan.reused_tokens),) if plan.reused_tokens else ()
            chunks = before + plan.chunks
        elif token_ids is None:
            raise BadInput(f"context {name} was opened from a store: give its tokens to offer it")
        else:
            printed = bytes.fromhex(namespace) if namespace else PUBLIC_NAMESPACE
        form, origin = shard.form, held.origin
        if codec_name not in ("", form.codec):
            form = recoded_form(form, codec_name, f"context {name}")
            origin = recoded_origin(origin, shard.form)
        keys = page_keys(self._runtime.facts.fingerprint, printed, token_ids, form.page_tokens)
        if context_id(keys) != name:
            raise BadInput(f"context {name} was offered with the tokens of {context_id(keys)}")
        offer = Offer(
            fence=Fence(name, epoch, checksum_of(form, origin, keys)),
            form=form,
            origin=origin,
            num_tokens=held.num_tokens,
            chunks=chunks,
        )
        self._epochs[name] = epoch
        self._offered[name] = _Offered(offer, held, tuple(keys))
        return offer

    def begin_sending(self, plan: HandoffPlan) -> None:
        """What is there of the context goes on its way, the rest as it is sealed. Raises
        `StaleHandle` unless the plan is of the very prefill that was offered last."""
        name = plan.fence.context_id
        offered = self._offered.get(name)
        if offered is None or self._contexts.get(name) is not offered.held:
            raise StaleHandle(
                f"{plan.fence} is not offered here any more: it was dropped or begun anew; ask for "
                "the context anew"
            )
        check_fence(plan.fence, offered.offer.fence, "the hand-off is of")
        with on_device(self._runtime.device):
            sending = Sending(
                plan,
                self._runtime.rank,
                offered.held.resident,
                offered.keys,
                self._join(plan, sends=True),
            )
            sending.add()
        self._sending[plan.handoff_id] = sending

    def sealed(self, name: str) -> None:
        """After each chunk of a prefill: its pages are there. Never raises."""
        for sending in self._sending.values():
            if sending.plan.fence.context_id == name:
                with on_device(self._runtime.device):
                    sending.add()

    def end_sending(self, handoff_id: str, timeout_s: float) -> Moved:
        """After the last chunk: until every receiver has what this rank holds."""
        sending = self._sending.pop(handoff_id, None)
        if sending is None:
            return self._unknown(handoff_id)
        return sending.finish(timeout_s)

    # the receiving gang

    def host_store(self, handoff_id: str, address: str = "") -> tuple[str, int] | None:
        """On rank 0: opens the place where the pairs of a hand-off meet; None elsewhere. address:
        this host's, as others reach it; empty: what its name stands for."""
        if self._runtime.rank != 0:
            return None
        address = address or socket.gethostbyname(socket.gethostname())
        store = dist.TCPStore(address, 0, None, is_master=True, wait_for_workers=False)
        self._stores[handoff_id] = store
        return address, store.port

    def begin_receiving(self, plan: HandoffPlan, token_ids: np.ndarray, namespace: str) -> None:
        """Memory for this rank's share, into which pages come from now on. The context must not be
        held here. Raises TooLarge, and `StaleHandle` where the offer is not of these tokens (under
        this rank's own model), or is older than one that was taken."""
        runtime, name = self._runtime, plan.fence.context_id
        if plan.fence.epoch < self._epochs.get(name, 0):
            raise StaleHandle(
                f"{plan.fence} is older than epoch {self._epochs[name]}, which was taken here: ask "
                "for the context anew"
            )
        if self._contexts.get(name) is not None:
            raise BadInput(f"rank {runtime.rank} holds context {name} already: drop it first")
        printed = bytes.fromhex(namespace) if namespace else PUBLIC_NAMESPACE
        keys = page_keys(runtime.facts.fingerprint, printed, token_ids, plan.form.page_tokens)
        tokens = total_tokens(plan.spans_of(runtime.rank))
        shard = runtime.new_shard(pool_name(name), plan.form.codec, tokens, plan.form.page_tokens)
        counters = StoreCounters(within=COUNTERS)
        try:
            with on_device(runtime.device):
                join = self._join(plan, sends=False)
                receiving = Receiving(plan, runtime.rank, shard, keys, join, counters)
        except BaseException:
            del shard
            runtime.pool.free(pool_name(name))
            raise
        self._epochs[name] = plan.fence.epoch
        self._taking[plan.handoff_id] = _Taking(receiving, counters, time.perf_counter())

    def end_receiving(self, handoff_id: str, timeout_s: float) -> Moved:
        """Until this rank's share is there and right; `install` or `abandon` comes next."""
        taking = self._taking.get(handoff_id)
        return self._unknown(handoff_id) if taking is None else taking.receiving.finish(timeout_s)

    def install(self, handoff_id: str) -> ShardOpened:
        """Once every receiver has ended without failure: the context is held, and may be asked."""
        taking = self._taking.get(handoff_id)
        if taking is None:
            raise BadInput(f"rank {self._runtime.rank} takes nothing by hand-off {handoff_id}")
        receiving, plan = taking.receiving, taking.receiving.plan
        receiving.install()
        held = tuple(coalesce(plan.spans_of(rank)) for rank in range(plan.receivers))
        shard = receiving.shard
        name = plan.fence.context_id
        self._contexts.take_over(name, HeldContext(shard, plan.num_tokens, held, plan.origin))
        del self._taking[handoff_id]
        self._stores.pop(handoff_id, None)
        return ShardOpened(
            context_id=name,
            rank=self._runtime.rank,
            num_pages=len(shard.pages()),
            kv_bytes=shard.kv_bytes,
            elapsed_s=time.perf_counter() - taking.began,
            pages=taking.counters.snapshot(),
        )

    # both

    def abandon(self, handoff_id: str, why: str) -> None:
        """Give a hand-off up, whatever part this rank has in it. May be repeated."""
        sending = self._sending.pop(handoff_id, None)
        if sending is not None:
            sending.abandon(why)
        taking = self._taking.pop(handoff_id, None)
        if taking is not None:
            taking.receiving.abandon(why)
            name = taking.receiving.plan.fence.context_id
            del taking
            self._runtime.pool.free(pool_name(name))
        self._stores.pop(handoff_id, None)
        self._given_up.pop(handoff_id, None)

    def close(self, name: str, why: str = "the context was dropped") -> None:
        """Give up all hand-offs of a context, and its offer. May be repeated."""
        self._offered.pop(name, None)
        plans = [one.plan for one in self._sending.values()]
        plans += [taking.receiving.plan for taking in self._taking.values()]
        for plan in plans:
            if plan.fence.context_id == name:
                self.abandon(plan.handoff_id, why)
                error = RankLost(f"rank {self._runtime.rank} gave the hand-off of {name} up: {why}")
                failed = failed_note(plan.fence, error)
                self._given_up[plan.handoff_id] = Moved(rank=self._runtime.rank, failed=failed)

    def clear(self) -> None:
        """The rank stops."""
        for handoff_id in (*self._sending, *self._taking, *self._stores):
            self.abandon(handoff_id, "the rank was stopped")

    def _unknown(self, handoff_id: str) -> Moved:
        rank = self._runtime.rank
        if handoff_id in self._given_up:
            return self._given_up.pop(handoff_id)
        gone = StaleHandle(f"rank {rank} has no part in hand-off {handoff_id}: it was given up")
        nothing = Fence("", 0, "")
        return Moved(rank=rank, failed=failed_note(nothing, gone), hearsay=True)

    def _join(self, plan: HandoffPlan, sends: bool) -> Callable[[int], Road]:
        """How this rank gets to its peers; called on threads of their own."""
        runtime, turn = self._runtime, threading.Lock()
        me, other = ("prefill", "decode") if sends else ("decode", "prefill")
        patience = timedelta(seconds=plan.join_timeout_s)

        def join(peer: int) -> Road:
            sender, receiver = (runtime.rank, peer) if sends else (peer, runtime.rank)
            store = dist.TCPStore(plan.address, plan.port, None, is_master=False, timeout=patience)
            with on_device(runtime.device):
                return join_pair(
                    store,
                    f"{plan.handoff_id}/{sender}-{receiver}",
                    0 if sends else 1,
                    f"{me} rank {runtime.rank}",
                    f"{other} rank {peer}",
                    runtime.device,
                    plan.timeout_s,
                    turn,
                    plan.join_timeout_s,
                )

        return join
