"""What a controller knows of the contexts on its gang and of the sessions on them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import torch

from ringspan.cluster.known import Known
from ringspan.cluster.messages import ModelFacts, PrefillPlan
from ringspan.errors import BadInput
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.fidelity import ANY, Fidelity
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.page import PageForm, page_form
from ringspan.kvstore.records import Tier


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
    fidelity: Fidelity = Fidelity.EXACT
    pages: dict[str, dict[str, int]] = field(default_factory=dict)
    """What became of its pages when it was opened, by road; see `kvstore.tiers.counters`."""
    recomputed: int = 0
    """Pages that were lost when it was opened, and computed again."""


class Prefix(NamedTuple):
    """A known context whose first pages are those of a new one too."""

    plan: PrefillPlan
    """What is left to do of the new one."""
    manifest: Manifest | None
    """Of the known one; None: the gang holds it."""
    fidelity: Fidelity
    """Of the known one: what is computed over it is no better."""


def longest_prefix(
    plan: PrefillPlan,
    keys: Sequence[str],
    form: PageForm,
    known: Known,
    lowest: Fidelity = ANY,
) -> Prefix | None:
    """Where most of the plan's pages, whose keys and form these are, lie already, of fidelity
    `lowest` at least; a held context before a stored one. None where no context in this form begins
    with the same page.

    Keys are chained hashes of model, namespace and all tokens so far, so that equal keys and an
    equal form are the same KV. The last page is always computed, so that a prefill has a chunk. A
    held context is not begun on itself: that would drop it.
    """
    most = (plan.num_tokens - 1) // plan.page_tokens
    pages, found, on_gang = 0, None, False
    for row in known.leading(keys, form, lowest):
        same, held = min(most, row.pages), row.shelf.tier is Tier.GPU
        if held and row.shelf.place == plan.context_id:
            continue
        if same and (same, held) > (pages, on_gang):
            pages, found, on_gang = same, row, held
    if found is None:
        return None
    onto = msgspec.structs.replace(
        plan,
        prefix_id=found.shelf.place,
        reused_tokens=pages * plan.page_tokens,
        predicted_s=0.0,  # it was for the whole
        predicted_chunk_s=(),
    )
    manifest = None if on_gang else known.manifest(found.shelf.place)
    return Prefix(onto, manifest, Fidelity(found.shelf.fidelity))


def form_of(plan: PrefillPlan, facts: ModelFacts) -> PageForm:
    """Of the pages that the plan makes."""
    return page_form(
        codec(plan.codec),
        facts.num_layers,
        facts.num_kv_heads,
        facts.head_dim,
        getattr(torch, facts.dtype),
        plan.page_tokens,
    )


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

    def end_all_on(self, context_id: str) -> tuple[str, ...]:
        """Those that were."""
        ended = tuple(s for s, c in self._context_of.items() if c == context_id)
        for session_id in ended:
            del self._context_of[session_id]
        return ended
