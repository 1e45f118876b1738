"""Faults on purpose, on hosts of this machine: what a prefill loses, and how soon it is at work.

    python -m ringspan.deploy.jobs.survive                      # a table, needs root
    python -m ringspan.deploy.jobs.survive --only rank-30 node  --tokens 8192 --json rows.jsonl

Network namespaces make four hosts, the last one spare; a gang of CPU ranks on them prefills the
retriever's haystack: once undisturbed, then once with each fault. Stored pages are compared bit for
bit with the undisturbed run's, and every needle is asked for. Times are the machine's own, with
all hosts on its few cores: `detected` and `at work` count from the fault, `load` is the share of
`at work` in which new processes start and read the weights. When the controller is killed another
is started at once, as a supervisor would: it has a new gang before it finds what was left, so
`detected` has the time for that.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ringspan.cluster.messages import GangSpec
from ringspan.cluster.namespaces import Hosts, why_not
from ringspan.errors import RingspanError

HOST_CPUS = (2, 2, 2, 2)
"""Ray's count; the last host is the spare one."""
RANKS = 6
FAULTS = ("rank-30", "rank-80", "node", "link", "controller")
CUT_S = 10.0
DRIVER = ("-m", "ringspan.deploy.jobs.survive")
"""What Python runs on the first host."""
RUN_TIMEOUT_S = 900.0
COLUMNS = ("fault", "hit", "prefill", "detected", "at work", "load", "again", "pages", "needles")
CHUNK_ROUNDS = 10
"""Chunks of the haystack."""


@dataclass
class Run:
    """What one prefill's driver said, each line with the time it was said at."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    fault_s: float = 0.0
    """When it was done to it, by the machine's clock."""
    hit: str = ""
    """What was done to what."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--needles", type=int, default=8, help="0: a text, for other models")
    parser.add_argument(
        "--model", default="retriever", help="a name of --model of ringspan prefill"
    )
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--json", type=Path, help="append a row for each fault")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.drive:
        return drive(json.loads(options.drive))
    if reason := why_not():
        print(f"survive: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _terminated)  # hosts end with the job, however it ends
    good = True
    print("".join(f"{name:>16}" for name in COLUMNS), flush=True)
    try:
        for row in run(options.tokens, options.needles, options.model, options.only):
            print(line_of(row), flush=True)
            good = good and row["ok"]
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    except RingspanError as error:
        print(f"survive: {error}", file=sys.stderr)
        return error.exit_status
    return 0 if good else 1


def run(tokens: int, needles: int, model: str, faults: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for the undisturbed run, and one for each fault, as they come."""
    with (
        tempfile.TemporaryDirectory(prefix="rsv-", dir="/tmp") as folder,
        Hosts(HOST_CPUS) as hosts,
    ):
        given = {"tokens": tokens, "needles": needles, "model": model}
        calm = one_run(hosts, "none", {**given, "store": f"{folder}/none"})
        yield row_of("none", calm, calm)
        for fault in faults:
            faulty = one_run(hosts, fault, {**given, "store": f"{folder}/{fault}"})
            yield row_of(fault, faulty, calm)


def one_run(hosts: Hosts, fault: str, given: dict[str, Any]) -> Run:
    """A driver on the first host, and the fault when it is time for it; after a killed driver
    another."""
    found = Run()
    status, said = _one_driver(hosts, fault, given, found)
    if fault == "controller" and found.hit:
        status, said = _one_driver(hosts, "none", given, found)
    if status or not found.of("done"):
        raise RingspanError(
            f"{fault}: the driver ended with status {status}: {' | '.join(said[-4:])}"
        )
    return found


def _one_driver(
    hosts: Hosts, fault: str, given: dict[str, Any], found: Run
) -> tuple[int, list[str]]:
    """What it says goes to `found`; its exit status, and all its lines."""
    command = [sys.executable, *DRIVER, "--drive", json.dumps(given)]
    driver = hosts.popen(0, command, stdout=subprocess.PIPE)
    patience = threading.Timer(RUN_TIMEOUT_S, driver.kill)
    patience.start()
    said: list[str] = []
    try:
        for line in _lines(driver):
            said.append(line)
            if not line.startswith('{"kind"'):
                continue
            found.lines.append(json.loads(line))
            if not found.hit and fault != "none":
                strike(hosts, fault, found)
    finally:
        patience.cancel()
        if found.of("done"):
            driver.communicate()  # it ends by itself
        driver.kill()
        status = driver.wait()
        if driver.stdout is not None:
            driver.stdout.close()
        if fault == "node" and found.hit:
            hosts.start(int(found.hit.removeprefix("host")))
    return status, said


def strike(hosts: Hosts, fault: str, found: Run) -> None:
    """Does the fault once the prefill is so far."""
    progress = found.of("progress")
    share = {"rank-30": 0.3, "rank-80": 0.8, "node": 0.5, "link": 0.4, "controller": 0.5}[fault]
    if not progress or progress[-1]["share"] < share:
        return
    time.sleep(progress[-1]["chunk_s"] / 3)  # into the middle of a chunk
    ranks = found.of("ready")[0]["ranks"]
    host, pid = next(
        (int(name.removeprefix("host")), pid) for name, pid in reversed(ranks) if name != "host0"
    )
    found.fault_s = time.time()
    if fault.startswith("rank"):
        found.hit = f"rank of host{host}"
        hosts.popen(host, ["kill", "-KILL", str(pid)]).wait(10)
    elif fault == "controller":
        found.hit = "the driver"
        hosts.popen(0, ["kill", "-KILL", str(found.of("ready")[0]["pid"])]).wait(10)
    elif fault == "node":
        found.hit = f"host{host}"
        hosts.kill(host)
    else:
        found.hit = f"link of host{host}"
        hosts.cut(host)
        time.sleep(CUT_S)
        hosts.restore(host)


def row_of(fault: str, found: Run, calm: Run) -> dict[str, Any]:
    done, best = found.of("done")[0], calm.of("done")[0]
    paused, resumed = found.of("paused"), found.of("resumed")
    same = done["pages"] == best["pages"] and done["answers"] == best["answers"]
    recomputed = sum(line["recomputed_tokens"] for line in resumed)
    after = [line["at_s"] for line in found.of("progress") if line["at_s"] > found.fault_s]
    row = {
        "fault": fault,
        "hit": found.hit,
        "prefill_s": done["prefill_s"],
        "faults_seen": len(resumed),
        "replaced": [rank for line in resumed for rank in line["replaced"]],
        "detected_s": paused[0]["at_s"] - found.fault_s if paused else None,
        "at_work_s": resumed[-1]["at_s"] - found.fault_s if resumed else None,
        "next_chunk_s": after[0] - found.fault_s if found.hit and after else None,
        "load_s": sum(line["load_s"] for line in resumed),
        "recomputed_tokens": recomputed,
        "chunk_tokens": done["chunk_tokens"],
        "restored_pages": sum(line["restored_pages"] for line in resumed),
        "pages_equal": same,
        "needles_found": done["found"],
        "needles": done["planted"],
        "reason": paused[0]["reason"] if paused else "",
    }
    row["ok"] = (
        same
        and done["found"] == done["planted"]
        and recomputed <= done["chunk_tokens"]
        and (fault in ("none", "link") or bool(resumed))
    )
    return row


def line_of(row: dict[str, Any]) -> str:
    cells = (
        row["fault"],
        row["hit"] or "-",
        f"{row['prefill_s']:.1f} s",
        *(f"{row[k]:.1f} s" if row[k] is not None else "-" for k in ("detected_s", "at_work_s")),
        f"{row['load_s']:.1f} s",
        f"{row['recomputed_tokens']:,}/{row['chunk_tokens']:,}",
        "equal" if row["pages_equal"] else "DIFFER",
        f"{row['needles_found']}/{row['needles']}",
    )
    return "".join(f"{cell:>16}" for cell in cells)


def drive(given: dict[str, Any]) -> int:
    """On a host: prefill, ask, and say on stdout what happens."""
    from ringspan.attention.models.needles import plant
    from ringspan.cluster.controller import Controller
    from ringspan.cluster.events import PauseEvent, PrefillPaused, PrefillProgress
    from ringspan.cluster.messages import ModelSpec
    from ringspan.cluster.planner import PrefillOptions
    from ringspan.cluster.ray_cluster import connect
    from ringspan.cluster.ray_gang import RayGang
    from ringspan.kvstore.folder import Store

    def say(kind: str, **what: Any) -> None:
        print(json.dumps({"kind": kind, "at_s": time.time(), **what}), flush=True)

    def progress(event: PrefillProgress) -> None:
        say("progress", share=event.tokens_done / event.num_tokens, chunk_s=event.chunk_s)

    def pause(event: PauseEvent) -> None:
        if isinstance(event, PrefillPaused):
            say("paused", reason=event.reason)
        else:
            say(
                "resumed",
                replaced=event.replaced,
                load_s=event.load_s,
                pause_s=event.pause_s,
                recomputed_tokens=event.recomputed_tokens,
                restored_pages=event.restored_pages,
            )

    spec = GangSpec(world_size=RANKS, model=ModelSpec(name=given["model"]), device="cpu", threads=1)
    haystack = plant(given["tokens"], given["needles"], 7) if given["needles"] else None
    token_ids = haystack.token_ids if haystack else _text(spec, given["tokens"])
    page_tokens = 128
    chunk = -(-given["tokens"] // CHUNK_ROUNDS // page_tokens) * page_tokens
    store = Store(given["store"])
    with connect(), RayGang(spec) as gang:
        say("ready", pid=os.getpid(), ranks=[(ready.host, ready.pid) for ready in gang.ready])
        controller = Controller(gang, store)
        done = controller.prefill(
            token_ids,
            PrefillOptions(chunk_tokens=chunk),
            on_event=progress,
            on_pause=pause,
        )
        answers: list[int] = []
        for key in haystack.keys if haystack else token_ids[:1]:
            session = controller.begin_session(done.context_id)
            said = controller.ask(
                session, done.context_id, (int(key),), max_tokens=1 if haystack else 8
            )
            answers += [answer.token_id for answer in said]
            controller.end_session(session)
    manifest = store.manifest(done.context_id)
    say(
        "done",
        pages=[page.xxh3 for page in manifest.pages],
        found=int(np.sum(np.asarray(answers) == haystack.values)) if haystack else 0,
        answers=answers,
        planted=given["needles"],
        chunk_tokens=done.plan.chunk_tokens,
        prefill_s=done.timings.prefill_s,
    )
    return 0


def _text(spec: GangSpec, tokens: int) -> np.ndarray:
    """The beginning of a module of Python's own, as the model's tokens."""
    from ringspan.deploy.checks import check_model
    from ringspan.deploy.inputs import gather
    from ringspan.deploy.tokenise import prepare

    source = [argparse.__file__]
    inputs = gather(source, [])
    return prepare(
        inputs, source, spec.model, check_model(spec), plain=True, limit_tokens=tokens
    ).token_ids


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _lines(driver: subprocess.Popen[bytes]) -> Iterator[str]:
    assert driver.stdout is not None
    for line in driver.stdout:
        yield line.decode(errors="replace").strip()


if __name__ == "__main__":
    raise SystemExit(main())
