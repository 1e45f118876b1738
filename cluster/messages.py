"""Every message between controller and ranks. Control only: tensors never ride in messages.

A noun for what is wanted (`PrefillPlan`), a past participle for what happened (`ChunkDone`). The
docstring is the arrow: sender -> receiver, and what is now true.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import msgspec

from ringspan.attention.cost import Link, Speeds
from ringspan.specs import ModelFacts as ModelFacts
from ringspan.specs import ModelSpec as ModelSpec
from ringspan.types import Span


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every message on the wire: immutable, tagged by class name."""


class GangSpec(Message, frozen=True, kw_only=True):
    """controller -> rank: the gang this rank is part of."""

    world_size: int
    model: ModelSpec
    transport: str = "auto"
    """`auto`, `nccl`, `copy-engine` (`nccl`, but between GPUs of one host copies that take no SM),
    `gloo` or `loopback` (all ranks in one process on one device)."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    backend: str = "auto"
    """Local attention backend: `auto`, or a name of `ringspan.attention.local.BACKENDS`."""
    threads: int = 0
    """CPU threads of one rank; 0 lets the machine's cores be dealt evenly."""
    timeout_s: float = 60.0
    """How long a rank waits for a peer in one exchange before it names it and gives up."""
    measure: bool | None = None
    """Whether speeds that are not in the cache are measured at the start; None: on GPUs."""


class RankReady(Message, frozen=True, kw_only=True):
    """rank -> controller: weights are loaded, the group is joined."""

    rank: int
    device: str
    """`cuda:0`, `cpu`."""
    device_name: str
    host: str
    pid: int
    transport: str
    facts: ModelFacts
    weights_bytes: int
    free_bytes: int
    """Of the device, for KV and activations, after the weights."""
    elapsed_s: float
    speeds: Speeds | None = None
    """Of the device, if they are known; the planner's rules do without."""
    link: Link | None = None
    """To the other ranks; None with `speeds`, and for a gang of one rank."""
    tile_rows: int = 0
    """Rows that go through an MLP at once; 0: all of a chunk."""


class PrefillPlan(Message, frozen=True, kw_only=True):
    """controller -> every rank: how a context is to be prefilled."""

    context_id: str
    num_tokens: int
    page_tokens: int
    chunk_tokens: int
    """Tokens of one prefill step over all ranks; a multiple of page_tokens."""
    layout: str
    scheme: str
    codec: str
    deterministic: bool = False
    """One merge order and one backend by rule, so that a run repeats bit for bit."""
    audit_rows: int = 4
    """Rows of each rank that are computed again in fp32, at one layer of every chunk; 0: none."""
    predicted_s: float = 0.0
    """Of all chunks; 0 where nothing was measured to predict from."""
    predicted_chunk_s: tuple[float, ...] = ()
    prefix_id: str = ""
    """The context whose first pages are taken over instead of being computed; empty: none."""
    reused_tokens: int = 0
    """So many of its tokens; whole pages."""
    not_reused: str = ""
    """Why a prefix that was found was computed all the same: its pages could not be used."""
    namespace: str = ""
    """Hex of the namespace that page keys are made under; empty: the public one."""
    parity: int = 0
    """Pages of parity to a stripe of the stored context, 0 to 2."""

    @property
    def chunks(self) -> tuple[Span, ...]:
        """Of the tokens that are computed."""
        starts = range(self.reused_tokens, self.num_tokens, self.chunk_tokens)
        return tuple(Span(s, min(s + self.chunk_tokens, self.num_tokens)) for s in starts)


class PrefillBegun(Message, frozen=True, kw_only=True):
    """rank -> controller: it has memory for its share, and what is taken over lies in it. The same
    from every rank."""

    context_id: str
    prefix: tuple[tuple[Span, ...], ...]
    """What each rank holds before the first chunk."""
    provenance: tuple[str, ...]
    """Of that KV; see `kvstore.page.Origin`."""


class PrefillStands(Message, frozen=True, kw_only=True):
    """rank -> controller: how much of a prefill this rank has after a fault."""

    context_id: str
    rank: int
    chunks_done: int
    """Chunks whose pages it has, here or in the staging folder; -1: not even the prefix."""
    restored_pages: int = 0
    """That were read for a rank that was lost."""


class Findings(Message, frozen=True, kw_only=True):
    """rank -> controller -> record: what steps proved of themselves, and what they stood still and
    took. Those of ranks go `beside` each other, those of a later chunk `then` come."""

    exposed_s: tuple[float, ...] = ()
    """By step of the scheme, over layers and chunks: how long computing stood still for an
    exchange, on the rank that waited longest; device timestamps on a GPU, host time on a CPU."""
    seen_keys: int = 0
    """Keys that the rows saw, counted over heads and layers and found to be what the mask says."""
    audited_rows: int = 0
    audit_error: float = 0.0
    """The worst ||out - exact|| / ||exact|| over audited rows, exact in fp32 over all shards."""
    work_bytes: int = 0
    """The device's memory at its fullest, without weights and KV; 0 where that is not known."""

    def beside(self, other: Findings) -> Findings:
        return self._with(other, max)

    def then(self, other: Findings) -> Findings:
        return self._with(other, lambda a, b: a + b)

    def _with(self, other: Findings, waits: Callable[[float, float], float]) -> Findings:
        pairs = zip_longest(self.exposed_s, other.exposed_s, fillvalue=0.0)
        return Findings(
            exposed_s=tuple(waits(a, b) for a, b in pairs),
            seen_keys=self.seen_keys + other.seen_keys,
            audited_rows=self.audited_rows + other.audited_rows,
            audit_error=max(self.audit_error, other.audit_error),
            work_bytes=max(self.work_bytes, other.work_bytes),
        )


class ChunkDone(Message, frozen=True, kw_only=True):
    """rank -> controller: this rank's pages of the chunk are in its pool."""

    context_id: str
    rank: int
    chunk_index: int
    span: Span
    rank_tokens: int
    """Tokens of the chunk that this rank took."""
    elapsed_s: float
    exchange_s: float
    """Host time spent waiting for peers."""
    findings: Findings
    sent_bytes: int
    kv_bytes: int
    """Encoded KV bytes that this rank now holds for the context."""


class PageRecord(Message, frozen=True, kw_only=True):
    """Where one sealed page lies in a context's folder."""

    key: str
    """Hex of the chained BLAKE3 key."""
    span: Span
    segment: str
    """File name within the context's folder."""
    offset: int
    frame_bytes: int
    payload_bytes: int
    xxh3: str
    """Hex xxh3-128 of the payload at rest."""


class ShardSaved(Message, frozen=True, kw_only=True):
    """rank -> controller: its pages are on disk (fsynced), not yet published."""

    context_id: str
    rank: int
    records: tuple[PageRecord, ...]
    elapsed_s: float


class ShardOpened(Message, frozen=True, kw_only=True):
    """rank -> controller: its pages were read, verified, and lie in its pool."""

    context_id: str
    rank: int
    num_pages: int
    kv_bytes: int
    elapsed_s: float
    pages: dict[str, dict[str, int]] = {}
    """What became of them, by road; see `kvstore.tiers.counters`."""


class ShardSurvived(Message, frozen=True, kw_only=True):
    """rank -> controller: what can be had of its pages lies in its pool, the rest is lost."""

    context_id: str
    rank: int
    lost: tuple[Span, ...]
    """Pages that no tier has whole and no parity brings back."""
    pages: dict[str, dict[str, int]]
    """What became of the others, by road; see `kvstore.tiers.counters`."""


class GangRepair(Message, frozen=True, kw_only=True):
    """controller -> every rank: compute these pages of a context again, over those that survive."""

    context_id: str
    spans: tuple[Span, ...]
    """Whole pages, the last one of the context maybe short."""
    chunk_tokens: int
    """That go through the model at once, over all ranks; at least a page does."""
    exact: bool = False
    """Keep K and V as they were computed, to compare; else in the context's codec, to be stored."""
    scheme: str = "ring"
    audit_rows: int = 4


class PagesRecomputed(Message, frozen=True, kw_only=True):
    """rank -> controller: the pages dealt to it are in its scratch memory."""

    context_id: str
    rank: int
    num_pages: int
    elapsed_s: float


class PageDeviation(Message, frozen=True, kw_only=True):
    """rank -> controller: a stored page against the one computed again from its tokens.

    Each is ||stored - computed|| / ||computed||, layer by layer, of K or V, which is larger.
    """

    span: Span
    error: tuple[float, ...]
    codec: tuple[float, ...]
    """What encoding the recomputed K and V in the context's codec costs by itself."""


class AnswerRequest(Message, frozen=True, kw_only=True):
    """controller -> every rank: extend a session's tail by these tokens, then generate."""

    session_id: str
    """A new id starts an empty tail on the context; a known one goes on where it stopped."""
    context_id: str
    token_ids: tuple[int, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    scheme: str = "auto"
    """Of a long question's partial prefill; `auto`: by `attention.tail.turn_scheme`."""
    chunk_tokens: int = 0
    """New tokens of one step of it, over all ranks; 0: `attention.tail.STEP_TOKENS` a rank."""
    audit_rows: int = 4
    """Rows of each rank that are computed again in fp32, at one layer of every step; 0: none."""
    min_tokens: int = 0
    """Until there are so many no stop id is chosen."""
    logprobs: int = 0
    """So many likeliest alternatives are told with each token, and its own logprob; 0: neither."""
    slice_tokens: int = 0
    """Tokens of the answer that are wanted now; the session keeps the rest of the turn, seed and
    all, for a request that `goes_on`. 0: all."""
    goes_on: bool = False
    """With the turn of the session's last request, which is not done; it has no `token_ids`."""


class TokenChunk(Message, frozen=True, kw_only=True):
    """rank 0 -> controller -> client: one more token; `finish_reason` is set on the last one."""

    session_id: str
    index: int
    token_id: int
    finish_reason: str | None = None
    """`stop` (a stop id; it is `token_id`), `length` (max_tokens reached)."""
    logprob: float | None = None
    """Natural log, of the model's own distribution, if it was asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest tokens and their logprobs, if they were asked for."""
    long_turn: LongTurn | None = None
    """On the first token, if the question was dealt to the ranks."""


class TokenChunks(Message, frozen=True, kw_only=True):
    """rank 0 -> controller: one more token of each of several sessions that are answered
    together."""

    chunks: tuple[TokenChunk, ...]


class LongTurn(Message, frozen=True, kw_only=True):
    """In a TokenChunk: how a long question was taken through the model, and what was proved."""

    reason: str
    num_tokens: int
    num_chunks: int
    scheme: str
    seen_keys: int
    """Keys that all rows saw, counted over heads and layers and found to be what the mask says."""
    audited_rows: int
    """Of all ranks."""
    audit_error: float
    """The worst ||out - exact|| / ||exact|| of the audited layers and ranks."""
    elapsed_s: float
    """On rank 0, until the logits were there."""
