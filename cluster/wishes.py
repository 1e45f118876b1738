"""What a caller wants of a prefill beside its plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ringspan.cluster.events import (
    IsCancelled,
    OnEvent,
    OnPause,
    ignore_event,
    ignore_pause,
    never,
)
from ringspan.cluster.stored import Description


class Interlude(Protocol):
    """Work of others, which a prefill lets in between two of its chunks."""

    def wanted(self) -> bool:
        """There is some; asked before each chunk."""

    def play(self) -> None:
        """Do it. No chunk is under way, the pages of those before are kept, and the gang is the
        other work's until this returns. RankLost counts as the prefill's own."""


@dataclass(frozen=True)
class Wishes:
    """What a caller wants of a prefill beside its plan."""

    description: Description = field(default_factory=Description)
    on_event: OnEvent = ignore_event
    on_pause: OnPause = ignore_pause
    cancelled: IsCancelled = never
    interlude: Interlude | None = None
