"""`make run`: a real document through two ranks of a private local Ray, then questions on it.

The document is a part of Python's own language reference, which the standard library carries
(`help("assert")` reads it), so it is on every machine. One sentence is planted in it, and the
output says so: it is the fact that a model cannot know without having read the context.
Everything goes the way it would on a cluster: `ray job submit` of `ringspan prefill`, a store in a
folder, `ringspan ask` from another process.

Touches no Ray but its own. Every step has a deadline; Ctrl-C ends what was started.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from types import FrameType

import ringspan
from ringspan.cluster.ray_cluster import HeadProcess
from ringspan.deploy.machine import gpus, hardware
from ringspan.deploy.progress import clock_words
from ringspan.deploy.record import RunRecord, read_record
from ringspan.errors import RingspanError

MODEL = "smollm2"
ROPE_SCALING = "yarn:4"
"""smollm2 was trained on 8,192 positions; stretched by 4 it reads the document whole."""
PLANTED = "The special magic number mentioned in this text is 48213."
PLANTED_AT = 0.6
"""Of the document's length."""
DOCUMENT_TOKENS = 12_000
DOCUMENT_CHARS = 80_000
"""More than the tokens above; the rest is cut off."""
QUESTIONS = (
    "What is the special magic number mentioned in the text?",
    "What does the assert statement do?",
)
PREFILL_DEADLINE_S = 900.0
ASK_DEADLINE_S = 600.0
FOLDER = Path(".cache") / "demo"


def main() -> int:
    signal.signal(signal.SIGTERM, _terminated)
    began = time.monotonic()
    try:
        _run()
    except KeyboardInterrupt:
        print("make run: interrupted; what it had started is stopped", file=sys.stderr)
        return 130
    except RingspanError as error:
        print(f"make run: {error}", file=sys.stderr)
        return error.exit_status
    print(f"\nDone in {clock_words(time.monotonic() - began)}.")
    return 0


def _run() -> None:
    machine, boards = hardware(), gpus()
    devices = f"{len(boards)} x {boards[0].name}" if boards else f"{machine.cores} CPU cores"
    ranks = max(len(boards), 2)
    folder = FOLDER.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    store, record = folder / "store", folder / "prefill.json"
    record.unlink(missing_ok=True)
    print(f"ringspan on {devices} ({machine.cpu}): {ranks} ranks, model {MODEL}")
    document = folder / "reference.txt"
    document.write_text(reference(), encoding="utf-8")
    print(
        f"Document: the language reference of Python {sys.version_info[0]}."
        f"{sys.version_info[1]}, its first {DOCUMENT_TOKENS:,} tokens.\n"
        f"Planted in it, so that there is something to find: {PLANTED!r}"
    )
    say("starting a private Ray (no other Ray of this machine is touched)")
    cpus = max(machine.cores, ranks)
    with HeadProcess(num_cpus=cpus, num_gpus=len(boards)) as head:
        prefill = [
            *ringspan_command(), "prefill", "--model", MODEL, "--rope-scaling", ROPE_SCALING,
            "--ranks", str(ranks), *placement_options(len(boards), ranks),
            "--input", str(document),
            "--limit-tokens", str(DOCUMENT_TOKENS), "--store", str(store), "--again",
            "--json", str(record),
        ]  # fmt: skip
        submit = [*ray_command(), "job", "submit", "--address", head.dashboard_url, "--"]
        shown(["ray", "job", "submit", "--address", head.dashboard_url, "--", *prefill])
        follow([*submit, *prefill], head.env, PREFILL_DEADLINE_S, "the prefill job")
        done = read_record(record)
        ask = [
            *ringspan_command(), "ask", str(done.context_id), *QUESTIONS,
            "--ranks", str(max(len(boards), 1)),  # on a CPU fewer than stored it: pages fit any
            "--max-tokens", "24", "--store", str(store),
        ]  # fmt: skip
        shown(ask)
        env = {**head.env, "RAY_ADDRESS": head.address}
        follow(ask, env, ASK_DEADLINE_S, "the questions")
        say("stopping the private Ray")
    _tell(done, store)


def _tell(done: RunRecord, store: Path) -> None:
    prefilled = done.prefill
    if prefilled is not None:
        print(
            f"\nPrefilled {prefilled.tokens:,} tokens in {prefilled.elapsed_s:.1f} s"
            f" ({prefilled.tokens_per_s:,.0f} tokens/s) on {len(done.ranks)} ranks."
        )
    shown_store = os.path.relpath(store)
    command = "ringspan" if shutil.which("ringspan") else ".venv/bin/ringspan"
    print(
        f"The context stays in {shown_store}. Go on with:\n"
        f"  {command} ask {done.context_id} --store {shown_store}        # ask it yourself\n"
        f"  {command} contexts list --store {shown_store}\n"
        f"  {command} prefill --model {MODEL} --input YOUR_FILES --rope-scaling {ROPE_SCALING}\n"
        f"  {command} doctor --needles                                   # does every page arrive?"
    )


def reference() -> str:
    """The language reference, topic after topic, with the planted sentence."""
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[:DOCUMENT_CHARS]
    # tokens are not counted yet: characters go to tokens at about 4 to 1 here
    return plant(text, PLANTED, int(PLANTED_AT * 4 * DOCUMENT_TOKENS))


def plant(text: str, sentence: str, at: int) -> str:
    """`sentence` as a paragraph of its own, between the two that meet first behind `at`."""
    behind = text.find("\n\n", at)
    if behind < 0:
        return f"{text}\n\n{sentence}\n"
    return f"{text[:behind]}\n\n{sentence}{text[behind:]}"


def placement_options(num_gpus: int, ranks: int) -> list[str]:
    """One GPU holds both ranks; otherwise each has a device of its own."""
    return ["--transport", "loopback"] if num_gpus == 1 and ranks > 1 else []


def ringspan_command() -> list[str]:
    """The installed command, or the module of a checkout that runs on PYTHONPATH alone."""
    script = Path(sys.executable).with_name("ringspan")
    if script.exists():
        return [str(script)]
    return [sys.executable, "-P", "-m", "ringspan.deploy.cli"]


def ray_command() -> list[str]:
    script = Path(sys.executable).with_name("ray")
    return [str(script)] if script.exists() else [sys.executable, "-m", "ray.scripts.scripts"]


def follow(command: list[str], env: Mapping[str, str], deadline_s: float, what: str) -> None:
    """Runs it, its output shown as it comes. RingspanError if it fails or takes too long."""
    source = str(Path(ringspan.__file__).resolve().parent.parent)
    paths = [source, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    process = subprocess.Popen(
        command,
        env={**env, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(deadline_s, give_up)
    timer.start()
    try:
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
    if late.is_set():
        raise RingspanError(f"{what} took longer than {deadline_s:.0f} s and was stopped")
    if status:
        raise RingspanError(f"{what} failed (status {status}); its output above says why")


def shown(command: list[str]) -> None:
    say(shlex.join(Path(word).name if word == command[0] else word for word in command))


def say(text: str) -> None:
    print(f"\n>>> {text}", flush=True)


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
