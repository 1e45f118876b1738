"""Synthetic contexts handed over between real processes: what tests and `bench handoff` share.

The KV of a case follows from its seed and the position alone, so that every process knows what any
page must be. Ranks meet by a file in a folder; each says how it ended, as JSON, in that folder.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from ringspan.attention.layout import deal
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.handoff import JOIN_TIMEOUT_S, Fence, HandoffPlan, Moved, checksum_of
from ringspan.kvstore.handoff_send import Sending
from ringspan.kvstore.handoff_take import Receiving
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, namespace_digest, page_keys
from ringspan.kvstore.page import EXACT, Origin, page_form
from ringspan.kvstore.pair import Road, join_pair
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.testing import page_tokens_of
from ringspan.types import Span, coalesce, total_tokens

FINGERPRINT = "ab" * 32
SENDER, RECEIVER = "prefill", "decode"
Wrap = Callable[[Road, str, int, int], Road]
"""(road, side, rank, peer) -> what is used instead; for tests that inject faults."""


class HandoffCase(msgspec.Struct, frozen=True, kw_only=True):
    """One hand-off. Sizes as `ContextShard` has them."""

    name: str
    senders: int
    receivers: int
    num_tokens: int
    chunk_tokens: int
    layout: str = "zigzag"
    """Of a chunk over the senders."""
    codec: str = "raw"
    """That the senders hold."""
    wire_codec: str = ""
    """That the receivers get; empty: the same."""
    num_layers: int = 3
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    timeout_s: float = 10.0
    seed: int = 0
    wrap: str = ""
    """`FILE:FUNCTION` of a `Wrap`."""
    epoch: int = 1
    stale: int = 0
    """What the senders' epoch is older by."""

    @property
    def page_tokens(self) -> int:
        return max(page_tokens_of(c, self.head_dim) for c in (self.codec, self.sent_codec))

    @property
    def sent_codec(self) -> str:
        return self.wire_codec or self.codec

    @property
    def chunks(self) -> tuple[Span, ...]:
        starts = range(0, self.num_tokens, self.chunk_tokens)
        return tuple(Span(s, min(s + self.chunk_tokens, self.num_tokens)) for s in starts)

    def keys(self) -> list[str]:
        ids = torch.arange(self.num_tokens).add(self.seed).numpy()
        return page_keys(FINGERPRINT, PUBLIC_NAMESPACE, ids, self.page_tokens)

    def plan(self, side: str) -> HandoffPlan:
        keys = self.keys()
        form = page_form(
            codec(self.sent_codec),
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            dtype_of(self.dtype),
            self.page_tokens,
        )
        origin = Origin(
            fingerprint=FINGERPRINT,
            namespace=namespace_digest(PUBLIC_NAMESPACE),
            rope="applied theta=10000",
            provenance=EXACT,
        )
        epoch = self.epoch - (self.stale if side == SENDER else 0)
        return HandoffPlan(
            handoff_id=self.name,
            fence=Fence(context_id(keys), epoch, checksum_of(form, origin, keys)),
            form=form,
            origin=origin,
            num_tokens=self.num_tokens,
            stretches=self.chunks,
            senders=self.senders,
            receivers=self.receivers,
            timeout_s=self.timeout_s,
        )

    def shard(self, codec_name: str, tokens: int) -> ContextShard:
        return ContextShard(
            codec(codec_name),
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            dtype_of(self.dtype),
            self.device,
            tokens,
            self.page_tokens,
        )

    def write(self, shard: ContextShard, spans: tuple[Span, ...]) -> None:
        """Behind what the shard holds, the context's K and V of these positions."""
        shard.reserve(spans)
        for layer in range(self.num_layers):
            parts = [self._kv(layer, span) for span in spans]
            k, v = torch.cat(parts, dim=1) if parts else self._kv(layer, Span(0, 0))
            shard.write(layer, k, v)

    def _kv(self, layer: int, span: Span) -> torch.Tensor:
        """[2, T, Hkv, D]; page by page, so that any cut at pages gives the same."""
        step, device = self.page_tokens, torch.device(self.device)
        pages = []
        for start in range(span.start, span.stop, step):
            random = torch.Generator(device)
            random.manual_seed(self.seed * 7919 + layer * 1_000_003 + start)
            tokens = min(step, span.stop - start)
            shape = (2, tokens, self.num_kv_heads, self.head_dim)
            pages.append(torch.randn(shape, generator=random, device=device))
        empty = torch.empty((2, 0, self.num_kv_heads, self.head_dim), device=device)
        return torch.cat(pages or [empty], dim=1).to(dtype_of(self.dtype))


class RankEnded(msgspec.Struct, frozen=True, kw_only=True):
    """process -> test: how a rank's part ended."""

    moved: Moved
    right: bool = False
    """The receiver's rows are what the case says, bit for bit."""
    readable: bool = False
    """The receiver's rows may be read."""


def receivers_expected(case: HandoffCase, rank: int) -> ContextShard:
    """What a receiver's shard must be, made in one go from the same K and V."""
    spans = coalesce(case.plan(RECEIVER).spans_of(rank))
    wanted = case.shard(case.sent_codec, total_tokens(spans))
    if case.wire_codec:  # recoded: through the codec that the senders hold
        held = case.shard(case.codec, total_tokens(spans))
        case.write(held, spans)
        wanted.reserve(spans)
        shape = (2, held.num_tokens, case.num_kv_heads, case.head_dim)
        for layer in range(case.num_layers):
            k, v = torch.empty(shape, dtype=held.dtype, device=held.device)
            held.codec.decode(held.tensors(layer), k, v)
            wanted.write(layer, k, v)
    else:
        case.write(wanted, spans)
    return wanted


def joiner(case: HandoffCase, side: str, rank: int, folder: Path) -> Callable[[int], Road]:
    """How a rank of a case gets to its peers."""
    turn, wrap = threading.Lock(), _wrap(case.wrap)
    other = RECEIVER if side == SENDER else SENDER

    def join(peer: int) -> Road:
        sender, receiver = (rank, peer) if side == SENDER else (peer, rank)
        road: Road = join_pair(
            dist.FileStore(str(folder / "meeting")),
            f"{case.name}-{sender}-{receiver}",
            0 if side == SENDER else 1,
            f"{side} rank {rank}",
            f"{other} rank {peer}",
            torch.device(case.device),
            case.timeout_s,
            turn,
            JOIN_TIMEOUT_S,
        )
        (folder / f"{case.name}-joined-{side}-{rank}-{peer}").touch()
        return road if wrap is None else wrap(road, side, rank, peer)

    return join


def send_case(case: HandoffCase, rank: int, folder: Path, between: Callable[[int], None]) -> Moved:
    """A sender's part. between: called before each chunk with its index."""
    dealt = [deal(case.layout, c, case.senders, case.page_tokens)[rank] for c in case.chunks]
    shard = case.shard(case.codec, sum(map(total_tokens, dealt)))
    sending = Sending(
        case.plan(SENDER), rank, shard, case.keys(), joiner(case, SENDER, rank, folder)
    )
    for index, spans in enumerate(dealt):
        between(index)
        case.write(shard, spans)
        sending.add()
    return sending.finish(6 * case.timeout_s)


def take_case(case: HandoffCase, rank: int, folder: Path) -> RankEnded:
    """A receiver's part."""
    plan = case.plan(RECEIVER)
    shard = case.shard(case.sent_codec, total_tokens(plan.spans_of(rank)))
    join = joiner(case, RECEIVER, rank, folder)
    receiving = Receiving(plan, rank, shard, case.keys(), join)
    moved = receiving.finish(6 * case.timeout_s)
    if moved.failed is not None:
        receiving.abandon("its hand-off failed")
        return RankEnded(moved=moved, readable=shard.num_tokens > 0)
    receiving.install()
    wanted = receivers_expected(case, rank)
    right = shard.spans == wanted.spans and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for layer in range(case.num_layers)
        for a, b in zip(shard.tensors(layer), wanted.tensors(layer), strict=True)
    )
    return RankEnded(moved=moved, right=right, readable=True)


@contextmanager
def started(
    target: Callable[..., None], senders: int, receivers: int, *args: object
) -> Iterator[dict[tuple[str, int], BaseProcess]]:
    """target(side, rank, *args) in a process for each rank; whoever is left is ended on leaving."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(["ringspan.kvstore.handoff_case"])
    found: dict[tuple[str, int], BaseProcess] = {}
    try:
        for side, count in ((SENDER, senders), (RECEIVER, receivers)):
            for rank in range(count):
                process: BaseProcess = context.Process(
                    target=target, args=(side, rank, *args), daemon=True
                )
                process.start()
                found[side, rank] = process
        yield found
    finally:
        for process in found.values():
            process.join(0.1)
            if process.is_alive():
                process.kill()
                process.join(10)


def run_cases(side: str, rank: int, cases: tuple[HandoffCase, ...], folder: str) -> None:
    """A process: this rank's part of every case that it takes part in, one after the other."""
    torch.set_num_threads(1)
    for case in cases:
        if rank >= (case.senders if side == SENDER else case.receivers):
            continue
        if side == SENDER:
            ended = RankEnded(moved=send_case(case, rank, Path(folder), lambda _: None))
        else:
            ended = take_case(case, rank, Path(folder))
        save_ended(ended, case, side, rank, folder)


def run_function(side: str, rank: int, where: str, name: str, *args: object) -> None:
    """A process: a function of a test, found by its file, which cannot be imported by name."""
    from ringspan.testing import _function

    _function(where, name)(side, rank, *args)


def save_ended(ended: RankEnded, case: HandoffCase, side: str, rank: int, folder: str) -> None:
    path = Path(folder) / f"{case.name}-{side}-{rank}.json"
    made = path.with_suffix(".part")
    made.write_bytes(msgspec.json.encode(ended))
    made.rename(path)  # whoever waits for it reads all of it


def ended_of(case: HandoffCase, side: str, rank: int, folder: Path) -> RankEnded | None:
    """None while the rank is not done."""
    path = folder / f"{case.name}-{side}-{rank}.json"
    return msgspec.json.decode(path.read_bytes(), type=RankEnded) if path.exists() else None


def _wrap(where: str) -> Wrap | None:
    if not where:
        return None
    from ringspan.testing import _function

    file, _, name = where.rpartition(":")
    found: Wrap = _function(file, name)
    return found
