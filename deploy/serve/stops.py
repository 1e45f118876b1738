"""Stop strings, found in a text that comes in pieces."""

from __future__ import annotations


class StopStrings:
    """Holds back what may be the beginning of a stop string, so that none is ever given out."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False
        """A stop string came: everything from it on is dropped."""

    def push(self, text: str) -> str:
        """More of the text; gives what may be given out now."""
        if self.found:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        places = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end with which `stop` begins, less than all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
