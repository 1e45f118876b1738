"""The contexts on a service's gang: what is known of them, and which may leave it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ringspan.cluster.controller import Controller
from ringspan.cluster.events import PrefillDone
from ringspan.cluster.session import ContextHandle
from ringspan.cluster.stored import Description
from ringspan.kvstore.leases import InUse


@dataclass(eq=False)
class Place:
    """One context on the gang."""

    controller: Controller
    handle: ContextHandle
    plain: bool
    """Of a prompt: nobody has its id, it only saves work."""
    stored: bool
    description: Description
    created_unix_s: float
    used_s: float


class Held:
    """The service's thread changes it; others may look at `places`."""

    def __init__(self, max_plain: int, has_sessions: Callable[[Controller, str], bool]) -> None:
        """has_sessions: a context does, that are not to end."""
        self._max_plain, self._has_sessions = max_plain, has_sessions
        self._places: dict[tuple[int, str], Place] = {}

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(self._places.values())

    def of(self, controller: Controller) -> Iterable[Place]:
        return [place for place in self.places if place.controller is controller]

    def has(self, controller: Controller, name: str) -> bool:
        return (id(controller), name) in self._places

    def opened(self, controller: Controller, handle: ContextHandle) -> None:
        """It is stored."""
        self._add(Place(controller, handle, False, True, Description(), time.time(), 0.0))

    def prefilled(
        self,
        controller: Controller,
        done: PrefillDone,
        *,
        plain: bool,
        stored: bool,
        description: Description | None,
    ) -> None:
        for handle in controller.contexts:
            if handle.context_id == done.context_id:
                about = description or Description()
                self._add(Place(controller, handle, plain, stored, about, time.time(), 0.0))
        plains = [place for place in self.places if place.plain]
        while len(plains) > self._max_plain and self.give_up_one(plain=True):
            plains = [place for place in self.places if place.plain]

    def used(self, controller: Controller, name: str) -> None:
        self._places[id(controller), name].used_s = time.monotonic()

    def clear(self) -> None:
        """A rank was lost."""
        self._places.clear()

    def drop(self, place: Place) -> None:
        """From the gang. InUse."""
        place.controller.drop(place.handle.context_id)
        self._places.pop((id(place.controller), place.handle.context_id), None)

    def give_up_one(self, plain: bool = False) -> bool:
        """The one that was used longest ago and that nobody reads leaves the gang: of prompts, and
        unless `plain` of those that the store has too. False if there is none."""
        for place in sorted(self.places, key=lambda one: one.used_s):
            if self._has_sessions(place.controller, place.handle.context_id):
                continue
            if place.plain or (place.stored and not plain):
                try:
                    self.drop(place)
                except InUse:
                    continue
                return True
        return False

    def _add(self, place: Place) -> None:
        place.used_s = time.monotonic()
        self._places[id(place.controller), place.handle.context_id] = place
