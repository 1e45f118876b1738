"""Token ids to text as they come.

A token is not a character: some hold half of one, and how a token reads can hang on the one before
it (a leading space). So a few tokens are decoded together, and only what is new and complete is
given out.
"""

from __future__ import annotations

from collections.abc import Callable

HALF = "\ufffd"
"""What a decoder writes for bytes that are not yet a whole character."""
WINDOW_TOKENS = 32
OVERLAP_TOKENS = 8
MAX_HELD_TOKENS = 8
"""A character has at most 4 bytes, a token at least one; after this many it is no character."""


class TextStream:
    """Feed ids with `push`; the pieces it returns, joined, are the decoded text."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._told = 0
        """Characters of the window's text that were given out."""
        self._held = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(HALF) and self._held < MAX_HELD_TOKENS:
            self._held += 1
            return ""
        self._held = 0
        return self._tell(text)

    def finish(self) -> str:
        """What is still held back, whole or not."""
        return self._tell(self._decode(self._window)) if self._window else ""

    def _tell(self, text: str) -> str:
        new = text[self._told :]
        self._told = len(text)
        if len(self._window) > WINDOW_TOKENS:
            self._window = self._window[-OVERLAP_TOKENS:]
            self._told = len(self._decode(self._window))
        return new
