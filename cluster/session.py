"""What a controller knows of the contexts on its gang and of the sessions on them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import torch

from ringspan.cluster.messages import ModelFacts, PrefillPlan
from ringspan.errors import BadInput
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.page import page_form


@dataclass(frozen=True)
class ContextHandle:
    """A context that every rank of the gang holds its share of."""

    context_id: str
    num_tokens: int
    codec: str
    kv_bytes: int
    """Encoded, over all ranks."""
    open_s: float = 0.0
    """Read, verified and placed; 0 if it was prefilled here."""
    keys: tuple[str, ...] = ()
    """Of its pages, in position order."""


class Prefix(NamedTuple):
    """A known context whose first pages are those of a new one too."""

    plan: PrefillPlan
    """What is left to do of the new one."""
    manifest: Manifest | None
    """Of the known one; None: the gang holds it."""


def longest_prefix(
    plan: PrefillPlan,
    keys: Sequence[str],
    facts: ModelFacts,
    held: Iterable[ContextHandle],
    stored: Iterable[Manifest],
) -> Prefix | None:
    """Where most of the plan's pages, whose keys these are, lie already; a held context before a
    stored one. None where no context in the plan's codec begins with the same page.

    Keys are chained hashes of model, namespace and all tokens so far, so that equal keys and an
    equal form are the same KV. The last page is always computed, so that a prefill has a chunk. A
    held context is not begun on itself: that would drop it.
    """
    form = page_form(
        codec(plan.codec),
        facts.num_layers,
        facts.num_kv_heads,
        facts.head_dim,
        getattr(torch, facts.dtype),
        plan.page_tokens,
    )
    known: list[tuple[str, Sequence[str], Manifest | None]] = [
        (handle.context_id, handle.keys, None)
        for handle in held
        if handle.codec == plan.codec and handle.context_id != plan.context_id
    ]
    known += [
        (manifest.context_id, manifest.keys, manifest)
        for manifest in stored
        if manifest.form == form
    ]
    most = (plan.num_tokens - 1) // plan.page_tokens
    pages, found = 0, None
    for prefix_id, theirs, manifest in known:
        if (same := min(most, shared_pages(keys, theirs))) > pages:
            onto = msgspec.structs.replace(
                plan,
                prefix_id=prefix_id,
                reused_tokens=same * plan.page_tokens,
                predicted_s=0.0,  # it was for the whole
                predicted_chunk_s=(),
            )
            pages, found = same, Prefix(onto, manifest)
    return found


def shared_pages(keys: Sequence[str], known: Sequence[str]) -> int:
    """How many of the first pages are the same. A key says that all before it are equal too."""
    low, high = 0, min(len(keys), len(known))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if keys[middle - 1] == known[middle - 1] else (low, middle - 1)
    return low


@dataclass
class Sessions:
    """Which session stands on which context. Ids are unguessable: they are all a client needs."""

    _context_of: dict[str, str] = field(default_factory=dict)

    def begin(self, context_id: str) -> str:
        session_id = secrets.token_hex(8)
        self._context_of[session_id] = context_id
        return session_id

    def resume(self, session_id: str, context_id: str) -> None:
        """BadInput if the session is not one on this context."""
        found = self._context_of.get(session_id)
        if found is None:
            raise BadInput(
                f"session {session_id!r} is not open; leave the session out to begin a new one"
            )
        if found != context_id:
            raise BadInput(f"session {session_id!r} is on context {found}, not on {context_id}")

    def end(self, session_id: str) -> bool:
        """True if there was one."""
        return self._context_of.pop(session_id, None) is not None

    def end_all_on(self, context_id: str) -> None:
        for session_id in [s for s, c in self._context_of.items() if c == context_id]:
            del self._context_of[session_id]
