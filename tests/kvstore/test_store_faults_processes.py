"""The store under faults, with real processes: killed at random, their files damaged between."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.faults.contexts import prefill
from ringspan.kvstore.faults.worker import NUM_CONTEXTS, known_context, read_once, work
from ringspan.kvstore.folder import Store
from ringspan.kvstore.index_copy import mend_index

ROUNDS, MOST_S = 100, 30.0
CAPACITY_BYTES = 4 << 20


@contextlib.contextmanager
def host_store(folder: Path):
    command = [sys.executable, "-P", "-m", "ringspan.kvstore.tiers.host_server"]
    src = Path(__file__).parents[2] / "src"
    process = subprocess.Popen(
        [*command, str(folder), str(CAPACITY_BYTES)],
        env={**os.environ, "PYTHONPATH": str(src)},
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def damage(root: Path, draw: random.Random) -> int:
    """Bits turn over in one file of one context."""
    names = ("*/*.seg", "*/manifest.json", "*/tokens.npy", "*/index.copy")
    files = sorted(path for name in names for path in (root / "contexts").glob(name))
    if not files:
        return 0
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return 1


def settle(root: Path, stored: set[int], counts: Counter[str]) -> None:
    """Nothing wrong is read; what was stored is there, and is readable again."""
    store = Store(root)
    listed = set(store.ids())
    for number in range(NUM_CONTEXTS):
        known = known_context(number)
        assert known.name in listed or number not in stored, f"context {number} is gone"
        if known.name not in listed:
            continue
        try:
            said = read_once(store, known, 2)
        except (StoreError, CorruptPage, BadInput):
            counts["refused"] += 1
            with contextlib.suppress(StoreError):
                mend_index(root / "contexts" / known.name)
            prefill(store, known, 2)  # from its tokens
            counts["repaired"] += 1
            said = read_once(store, known, 1)
        assert said == "read", f"wrong KV of context {number}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_wrong_kv_and_nothing_lost_when_processes_are_killed(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ringspan.kvstore.faults.worker"])
    draw, counts, stored = random.Random(5), Counter(), set()
    root, host, log = tmp_path / "store", tmp_path / "host", tmp_path / "log"
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(host_store(host))
        for number in range(ROUNDS):
            if time.monotonic() - began > MOST_S:
                break
            workers = [
                context.Process(target=work, args=(root, host, log, draw.randrange(1 << 30)))
                for _ in range(2)
            ]
            for worker in workers:
                worker.start()
            until_s = time.monotonic() + 10.0
            while not log.exists() and time.monotonic() < until_s:
                time.sleep(0.01)  # until one of them is at work
            time.sleep(draw.uniform(0.05, 0.4))
            if number % 5 == 4:
                server.kill()
                server.wait()
                counts["killed"] += 1
                server = stack.enter_context(host_store(host))
            for worker in workers:
                worker.kill()
                worker.join()
                counts["killed"] += 1
            for line in log.read_text().splitlines() if log.exists() else ():
                said, which = line.split()
                counts[f"worker {said}"] += 1
                if said == "stored":
                    stored.add(int(which))
            log.unlink(missing_ok=True)
            counts["flips"] += damage(root, draw)
            settle(root, stored, counts)
            counts["rounds"] += 1
    assert counts["worker wrong"] == 0
    assert counts["rounds"] >= 10, counts
    assert counts["killed"] > 20, counts
    assert counts["worker read"] > 0, counts
    assert counts["worker stored"] > 0, counts
    assert counts["repaired"] > 0, counts
