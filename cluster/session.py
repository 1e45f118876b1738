"""What a controller knows of the contexts on its gang and of the sessions on them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from ringspan.errors import BadInput


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
