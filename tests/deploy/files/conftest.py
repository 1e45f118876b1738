"""What an operator's files have in common: where they are, and the commands written in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from ringspan.deploy.cli import app
from ringspan.deploy.commands.options import spread_inputs

ROOT = Path(__file__).resolve().parents[3]
_ENDS = {"|", "&&", "||", ";", "&", "<", ">", ">>", "#"}
"""Words of a shell that end the command before them."""


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], Any]:
    """The parsed YAML file of this name under deploy/, its only document."""

    def read(name: str) -> Any:
        return yaml.safe_load((ROOT / "deploy" / name).read_text())

    return read


@pytest.fixture(scope="session")
def parse() -> Callable[[Sequence[str]], dict[str, Any]]:
    """The words after `ringspan`, through the real command line without running it: the command's
    options. Raises what the command line does for an option or a command that is not there."""

    def parsed(words: Sequence[str]) -> dict[str, Any]:
        command: Any = get_command(app)
        arguments, context = spread_inputs(words), None
        while hasattr(command, "resolve_command"):
            context = command.make_context(command.name, list(arguments), parent=context)
            rest = [*getattr(context, "_protected_args", ()), *context.args]
            name, command, arguments = command.resolve_command(context, rest)
            assert command is not None, f"no command {name}"
        options: dict[str, Any] = command.make_context(
            command.name, list(arguments), parent=context
        ).params
        return options

    return parsed


@pytest.fixture(scope="session")
def commands() -> Callable[[str], list[list[str]]]:
    """Of shell text: the words after each `ringspan`, comments and continued lines understood."""

    def found(text: str) -> list[list[str]]:
        every = []
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a quote that the next line closes: no command of ours
                continue
            starts = [at for at, word in enumerate(words) if word == "ringspan"]
            for at in starts:
                if at and words[at - 1] not in {"--", "env", *_ENDS} and "=" not in words[at - 1]:
                    continue
                rest = words[at + 1 :]
                end = next((n for n, word in enumerate(rest) if word in _ENDS), len(rest))
                if rest[:end]:
                    every.append(rest[:end])
        return every

    return found


@pytest.fixture(scope="session")
def blocks() -> Callable[[str], list[str]]:
    """The shell blocks of a Markdown text, in order: fenced as `sh`, or indented by four."""

    def found(text: str) -> list[str]:
        fenced = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.M | re.S)
        bare = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        indented = re.findall(r"(?:^ {4,}\S.*\n?)+", bare, flags=re.M)
        return fenced + indented

    return found
