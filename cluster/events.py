"""What the controller tells its caller about a prefill: while it runs, and when it is done."""

from __future__ import annotations

from collections.abc import Callable

from ringspan.cluster.messages import ChunkDone, Findings, Message, PrefillPlan
from ringspan.errors import RingspanError
from ringspan.types import Span


class PrefillProgress(Message, frozen=True, kw_only=True):
    """controller -> deploy: every rank is done with one more chunk."""

    context_id: str
    chunk_index: int
    num_chunks: int
    span: Span
    tokens_done: int
    num_tokens: int
    elapsed_s: float
    chunk_s: float = 0.0
    """Of this chunk, the slowest rank's."""
    predicted_chunk_s: float = 0.0
    """What the plan said of it; 0 if it was not predicted."""
    tokens_per_s: float
    """Since the first chunk began."""
    left_s: float
    """By FLOPs, since a chunk costs more the more tokens lie before it."""
    kv_bytes: int
    """Encoded, held by all ranks so far."""
    sent_bytes: int
    """By all ranks so far."""
    ranks: tuple[ChunkDone, ...] = ()
    """What each rank said of this chunk."""


class PrefillPaused(Message, frozen=True, kw_only=True):
    """controller -> deploy: a rank was lost; the prefill goes on when the gang is mended."""

    context_id: str
    chunk_index: int
    """Of the chunk that is to be done next; the number of chunks once all are done."""
    num_chunks: int
    reason: str
    """One line, which names the rank."""


class PrefillResumed(Message, frozen=True, kw_only=True):
    """controller -> deploy: all ranks stand behind the same chunk again, and go on."""

    context_id: str
    chunk_index: int
    """That is computed next."""
    num_chunks: int
    reason: str
    """Why it paused."""
    replaced: tuple[int, ...]
    """Ranks whose processes are new."""
    recomputed_tokens: int
    """Of chunks that had been begun and are computed again."""
    restored_pages: int
    """Of the lost ranks, read from the store instead of being computed."""
    load_s: float
    """Of `pause_s`, for new processes to start and to load the weights."""
    pause_s: float
    """From when the loss was noticed until now."""


class PrefillTimings(Message, frozen=True, kw_only=True):
    """Seconds of each phase of a prefill."""

    plan_s: float = 0.0
    """Keys, plan, room in the store, memory on the ranks."""
    prefill_s: float = 0.0
    save_s: float = 0.0
    """Pages written and synced by all ranks, and the context published."""
    chunk_s: tuple[float, ...] = ()
    """Of each chunk, the slowest rank's."""


class PrefillDone(Message, frozen=True, kw_only=True):
    """controller -> deploy: the context is on the gang and, if there is a store, in it."""

    context_id: str
    plan: PrefillPlan
    reused: bool = False
    """The store had it already: nothing was computed, and the gang does not hold it (`open`)."""
    saved: bool = False
    kv_bytes: int = 0
    """Encoded, over all ranks."""
    sent_bytes: int = 0
    exchange_s: float = 0.0
    """Waited for peers, summed over ranks (CPU ranks only)."""
    findings: Findings = Findings()
    """Of all ranks and chunks."""
    flops: float = 0.0
    timings: PrefillTimings = PrefillTimings()
    resumed: tuple[PrefillResumed, ...] = ()
    """The faults that it went through."""


class Cancelled(RingspanError):
    """The caller asked for an end; nothing half-written was left."""


PrefillEvent = PrefillProgress
OnEvent = Callable[[PrefillEvent], None]
PauseEvent = PrefillPaused | PrefillResumed
OnPause = Callable[[PauseEvent], None]
IsCancelled = Callable[[], bool]


def ignore_event(event: PrefillEvent) -> None:
    """For callers that do not look."""


def ignore_pause(event: PauseEvent) -> None:
    """For callers that do not look."""


def never() -> bool:
    """For callers that do not cancel."""
    return False
