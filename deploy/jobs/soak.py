"""Many clients for minutes, some leaving, a rank killed: is every answer right, is all given back?

    python -m ringspan.deploy.jobs.soak --minutes 10 --sessions 8      # smollm2, 2 CPU ranks
    python -m ringspan.deploy.jobs.soak --minutes 1 --model random:tiny --json soak.jsonl

A real `ringspan serve` with a Ray of its own is asked by OpenAI's client, `--sessions` at once:
chats and completions, streams and whole answers, contexts, prompts and follow-ups. Clients leave
before the first token and within streams. One rank is killed on the way. Every answer is compared
with transformers' (`soak_questions`, `soak_clients`); what the processes hold is looked at each
second (`soak_watch`). Status 1 where an answer is wrong, an error has another shape, memory grows
by more than `--most-growth`, or anything is left when the last client has gone.

Kept by design: an ended request for 600 s, contexts of 32 plain prompts, named contexts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ringspan.deploy.jobs.soak_questions import Greedy, every, questions
from ringspan.errors import BadInput, RingspanError

NEEDED = ("openai", "psutil")
START_S, STOP_S, SETTLE_S = 180.0, 90.0, 60.0
WARM_UP_S = 10.0
AFTER_START_S = 45.0
"""A new rank's memory is looked at from then on."""
FDS_MORE, THREADS_MORE = 4, 4
"""That a process may hold at the end over what it had after the warm-up: Ray opens some late."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--sessions", type=int, default=8, help="clients at once")
    parser.add_argument("--model", default="smollm2", help="smollm2, random:tiny, a folder, ...")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--document-tokens", type=int, default=600)
    parser.add_argument(
        "--kill-rank-at", type=float, default=0.5, help="share of the time; below 0: none is"
    )
    parser.add_argument("--most-growth", type=float, default=4.0, help="MiB a minute and process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append a row a second, and one of the whole")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.sessions < 1 or options.kill_rank_at >= 1:
        parser.error("wanted --minutes above 0, --sessions of at least 1, --kill-rank-at below 1")
    try:
        row = run(options)
    except RingspanError as error:
        print(f"soak: {error}", file=sys.stderr)
        return error.exit_status
    print(table(row))
    for wrong in row["wrong"] + row["amiss"]:
        print(f"soak: {wrong}", file=sys.stderr)
    return 0 if row["ok"] else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole's row. BadInput where a package is missing that only tests need."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"a soak wants the package {package}, which is not installed; run: pip "
                           f"install -c requirements.lock {package}")  # fmt: skip
    from ringspan.deploy.jobs.soak_clients import Client, Heard
    from ringspan.deploy.jobs.soak_watch import Watch, ranks_of

    greedy = Greedy(options.model, 0)
    documents, asked, left_out = questions(greedy, options.seed, options.document_tokens)
    print(f"soak: {sum(1 for _ in every(asked))} questions, {left_out} left out", flush=True)
    amiss: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        with _server(options, Path(folder)) as (process, url):
            contexts = {one.title: _make(url, one.body) for one in documents}
            heard, stop = Heard(), threading.Event()
            _warm_up(url, asked, contexts, amiss)
            watch = Watch(process.pid)
            baseline = watch.sample()
            watch.start()
            began_s = time.time()
            span_s = 60 * options.minutes
            clients = [
                Client(url, asked, contexts, heard, stop, options.seed * 1000 + at)
                for at in range(options.sessions)
            ]
            for client in clients:
                client.start()
            killed_s = 0.0
            if options.kill_rank_at >= 0:
                time.sleep(options.kill_rank_at * span_s)
                ranks = ranks_of(_process(process.pid))
                if len(ranks) != options.ranks:
                    amiss.append(f"{len(ranks)} ranks before the kill, wanted {options.ranks}")
                if ranks:
                    ranks[-1].kill()
                    killed_s = time.time()
            time.sleep(max(0.0, began_s + span_s - time.time()))
            stop.set()
            for client in clients:
                client.join(SETTLE_S + 200)
            if any(client.is_alive() for client in clients):
                amiss.append("a client never had its answer")
            ended_s = time.time()
            amiss += _settled(url)
            after = _again(watch, baseline, amiss)
            kept = _delete(url, contexts, amiss)
            watch.close()
            children = _process(process.pid).children(recursive=True)
        status = process.returncode
        if status != 0:
            log = (Path(folder) / "serve.log").read_text()[-1500:]
            amiss.append(f"the server ended with status {status}: {log}")
        alive = [child.pid for child in children if child.is_running()]
        if alive:
            amiss.append(f"processes {alive} outlived the server")
        if left := watch.shm_left():
            amiss.append(f"left in /dev/shm: {left}")
    memory = _memory(watch.rows, began_s, ended_s, killed_s)
    amiss += [
        f"{one['process']}: {one['last_mib_min']:+.1f} MiB a minute in the last quarter, at most "
        f"{options.most_growth:g}"
        for one in memory
        if one["last_mib_min"] > options.most_growth
    ]
    if killed_s and not heard.last_s > killed_s:
        amiss.append("no right answer after the kill")
    firsts = sorted(heard.first_token_s)
    row = {
        "kind": "soak",
        "model": options.model,
        "ranks": options.ranks,
        "sessions": options.sessions,
        "minutes": options.minutes,
        "seed": options.seed,
        "questions": sum(1 for _ in every(asked)),
        "left_out": left_out,
        "outcomes": dict(heard.outcomes),
        "tokens": heard.tokens,
        "first_token_s": [firsts[int(share * (len(firsts) - 1))] for share in (0.5, 0.99)]
        if firsts
        else [],
        "errors_for_s": max(heard.rank_lost_at_s, default=killed_s) - killed_s,
        "memory": memory,
        "baseline": baseline,
        "after": after,
        "kept": kept,
        "wrong": heard.wrong,
        "amiss": amiss,
        "ok": not amiss and not heard.outcomes["WRONG"] and bool(heard.outcomes["right"]),
    }
    if options.json is not None:
        with options.json.open("a") as file:
            for one in (*watch.rows, row):
                file.write(json.dumps(one) + "\n")
    return row


@contextlib.contextmanager
def _server(
    options: argparse.Namespace, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`ringspan serve` until it is left; its log is beside its store."""
    command = [sys.executable, "-P", "-m", "ringspan.deploy.cli", "serve"]
    command += ["--model", options.model, "--ranks", str(options.ranks), "--device", "cpu"]
    command += ["--threads", "1", "--port", "0", "--store", str(folder / "store")]
    source = str(Path(__file__).resolve().parents[2] / "src")
    found = os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "PYTHONPATH": f"{source}:{found}" if found else source}
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, env=env, stderr=file, stdout=file)
    try:
        ends = time.monotonic() + START_S
        while "ringspan serves" not in (said := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > ends:
                raise RingspanError(f"ringspan serve did not start: {said[-1500:]}")
            time.sleep(0.2)
        line = next(one for one in said.splitlines() if "ringspan serves" in one)
        yield process, line.split(" at ")[1].strip()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)


def _process(pid: int) -> Any:
    import psutil  # type: ignore[import-untyped]

    return psutil.Process(pid)


def _http(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=180) as answer:
        return json.loads(answer.read())


def _make(url: str, body: dict[str, Any]) -> str:
    return str(_http("POST", f"{url}/v1/contexts", {**body, "wait": True})["id"])


def _warm_up(url: str, asked: Sequence[Any], contexts: dict[str, str], amiss: list[str]) -> None:
    """`WARM_UP_S` of clients: threads, sockets and buffers that are made once are made."""
    from ringspan.deploy.jobs.soak_clients import Client, Heard

    heard, stop = Heard(), threading.Event()
    clients = [Client(url, asked, contexts, heard, stop, seed) for seed in range(-8, 0)]
    for client in clients:
        client.start()
    time.sleep(WARM_UP_S)
    stop.set()
    for client in clients:
        client.join(SETTLE_S)
    amiss += [f"in the warm-up: {wrong}" for wrong in heard.wrong]
    amiss += _settled(url)


def _settled(url: str) -> list[str]:
    """What still runs long after the last client has left."""
    ends = time.monotonic() + SETTLE_S
    while True:
        views = _http("GET", f"{url}/v1/requests")["data"]
        going = [v for v in views if v["state"] not in ("done", "failed", "cancelled")]
        if not going:
            return []
        if time.monotonic() > ends:
            return [f"still runs: {view}" for view in going]
        time.sleep(0.2)


def _again(watch: Any, baseline: dict[str, Any], amiss: list[str]) -> dict[str, Any]:
    """A sample that holds no more than the baseline, or says what it does."""
    ends = time.monotonic() + SETTLE_S
    while True:
        after = dict(watch.sample())
        over = _over(baseline, after)
        if not over or time.monotonic() > ends:
            amiss += over
            return after
        time.sleep(1.0)


def _over(baseline: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is held more than before. A rank that was replaced is compared with any other's most."""
    known = {one["pid"]: one for one in baseline["processes"]}
    ranks = baseline["processes"][1:]
    over = []
    for one in after["processes"]:
        for name, more in (("fds", FDS_MORE), ("threads", THREADS_MORE)):
            before = known.get(one["pid"])
            most = before[name] if before else max(rank[name] for rank in ranks)
            if one[name] > most + more:
                over.append(f"process {one['pid']}: {one[name]} {name}, {most} after the warm-up")
    if after["ranks"] != baseline["ranks"]:
        over.append(f"{after['ranks']} ranks, {baseline['ranks']} at first")
    if after["shm"] > baseline["shm"]:
        over.append(f"{after['shm']} entries in /dev/shm, {baseline['shm']} after the warm-up")
    return over


def _delete(url: str, contexts: dict[str, str], amiss: list[str]) -> dict[str, int]:
    """Contexts can be deleted: a session or reader that was forgotten would forbid it (409)."""
    views = _http("GET", f"{url}/v1/requests")["data"]
    held = _http("GET", f"{url}/v1/contexts")["data"]
    for title, name in contexts.items():
        try:
            _http("DELETE", f"{url}/v1/contexts/{name}")
        except OSError as error:
            amiss.append(f"context {title} cannot be deleted: {error}")
    rest = [one["id"] for one in _http("GET", f"{url}/v1/contexts")["data"]]
    if left := set(rest) & set(contexts.values()):
        amiss.append(f"contexts {left} are there though they were deleted")
    return {"requests": len(views), "contexts": len(held), "contexts_after": len(rest)}


def _memory(
    rows: Sequence[dict[str, Any]], began_s: float, ended_s: float, killed_s: float
) -> list[dict[str, Any]]:
    """Of each process the growth over the second and the last quarter of the time it was looked
    at, of a new rank without its start."""
    from ringspan.deploy.jobs.soak_watch import growth

    server = rows[0]["processes"][0]["pid"] if rows else 0
    first = {one["pid"] for row in rows[:1] for one in row["processes"]}
    last = [one["pid"] for one in rows[-1]["processes"]] if rows else []
    quarter_s = (ended_s - began_s) / 4
    found = []
    for pid in last:
        name = "server" if pid == server else "rank" if pid in first else "new rank"
        begin_s = ended_s - quarter_s
        if pid not in first:
            begin_s = min(max(begin_s, killed_s + AFTER_START_S), ended_s)
        second, _ = growth(rows, pid, began_s + quarter_s, began_s + 2 * quarter_s)
        slope, middle = growth(rows, pid, begin_s, ended_s)
        found.append(
            {"process": name, "rss_mib": middle, "second_mib_min": second, "last_mib_min": slope}
        )
    return found


def table(row: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| what came of a request | times |", "|---|---:|"]
    lines += [f"| {name} | {count:,} |" for name, count in sorted(row["outcomes"].items())]
    lines += ["", "| process | RSS, MiB | 2nd quarter, MiB/min | last quarter, MiB/min |"]
    lines += ["|---|---:|---:|---:|"]
    lines += [
        f"| {one['process']} | {one['rss_mib']:.0f} | {one['second_mib_min']:+.2f} "
        f"| {one['last_mib_min']:+.2f} |"
        for one in row["memory"]
    ]
    lines += ["", "| held | after the warm-up | after the last client |", "|---|---:|---:|"]
    for name in ("fds", "threads"):
        before, after = (
            ", ".join(str(one[name]) for one in row[when]["processes"])
            for when in ("baseline", "after")
        )
        lines.append(f"| {name} of server and ranks | {before} | {after} |")
    lines.append(f"| /dev/shm entries | {row['baseline']['shm']} | {row['after']['shm']} |")
    lines += ["", f"{'ok' if row['ok'] else 'NOT OK'}; {row['tokens']:,} tokens; {row['kept']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
