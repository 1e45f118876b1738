"""A real process that uses a real store until it is killed: for faults without a simulation."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import torch

from ringspan.errors import BadInput, CorruptPage, StoreError
from ringspan.kvstore.faults.contexts import Known, make, open_context, prefill, wrong_pages
from ringspan.kvstore.folder import Store
from ringspan.kvstore.tiers.counters import StoreCounters
from ringspan.kvstore.tiers.moving import move
from ringspan.kvstore.tiers.placement import TierName

NUM_CONTEXTS = 6


def known_context(number: int) -> Known:
    """The same in every process."""
    draw = np.random.default_rng(number)
    return make(draw.integers(0, 50_000, 9 + 5 * number, dtype=np.int32), "raw", True)


def work(root: Path, host: Path, log: Path, seed: int) -> None:
    """Write, read and move contexts for ever. What is done goes to `log`, a line each, before the
    next thing begins: `stored`, `read`, `refused`, `wrong`, with the context's number."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    known = [known_context(number) for number in range(NUM_CONTEXTS)]
    done = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while True:
        number = draw.randrange(NUM_CONTEXTS)
        said = "refused"
        with contextlib.suppress(StoreError, CorruptPage, BadInput):
            said = _do(draw, root, host, known[number])
        os.write(done, f"{said} {number}\n".encode())


def _do(draw: random.Random, root: Path, host: Path, known: Known) -> str:
    store = Store(root)
    kind = draw.random()
    if kind < 0.3:
        prefill(store, known, draw.randint(1, 3))
        return "stored"
    if kind < 0.5:
        to = draw.choice((TierName("host", str(host)), TierName("disk")))
        move(store, known.name, to, keep=draw.random() < 0.5)
        return "moved"
    return read_once(store, known, draw.randint(1, 3))


def read_once(store: Store, known: Known, world_size: int) -> str:
    """`read` or `wrong`. Raises what the store refuses with."""
    manifest = store.manifest(known.name)
    opened = open_context(store.root, manifest, known, world_size, StoreCounters(), None)
    return "wrong" if wrong_pages(known, opened) else "read"
