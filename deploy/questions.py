"""Where questions come from: the command line, a pipe (one a line), or a person at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from ringspan.errors import BadInput

PROMPT = "> "


def questions(given: Sequence[str], stream: TextIO | None = None) -> Iterator[str]:
    """The given ones (see `check_given`); without any, the lines of `stream` (stdin) until it
    ends, blank ones left out. At a terminal a blank line ends."""
    if given:
        yield from given
        return
    stream = stream or sys.stdin
    terminal = stream.isatty()
    if terminal:
        print("Ask; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        if terminal:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = stream.readline()
        if not line or (terminal and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def check_given(given: Sequence[str], stream: TextIO | None = None) -> None:
    """Before anything is started: the given questions hold words, or there is a stream to read."""
    for number, question in enumerate(given, 1):
        if not question.strip():
            raise BadInput(f"question {number} of {len(given)} is empty; wanted words")
    stream = stream or sys.stdin
    if not given and (stream is None or stream.closed):
        raise BadInput("no question given, and stdin is closed; put a question behind the context")
