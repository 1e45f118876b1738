"""Every scheme over real processes, whose exchanges come in any order: equal to one process.

Cases and their exact answers are those of test_schemes.py. One start of processes a world size runs
all of them.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ringspan.attention.buffers import Buffers
from ringspan.attention.compute import Compute
from ringspan.attention.layer import Layer
from ringspan.attention.ledger import Ledger
from ringspan.attention.schemes.table import SCHEMES, why_not
from ringspan.attention.transport import Message, Pending
from ringspan.testing import spawn_ranks
from ringspan.types import Part

NAMES = ("prefix", "full", "sinks-window-softcap", "batch-window", "mqa")
REPEATS = 2
TOLERANCE = 2e-5
LONGEST_DELAY_S = 4e-3


def _conformance() -> ModuleType:
    """test_schemes.py, found by its place: a test module cannot be imported by name."""
    name = "ringspan_test_schemes"
    if name not in sys.modules:
        path = Path(__file__).with_name("test_schemes.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Delayed:
    """A transport that waits a random while around every exchange."""

    def __init__(self, transport: Any, rng: random.Random) -> None:
        self._transport, self._rng = transport, rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def start(self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0) -> Pending:
        time.sleep(self._rng.random() * LONGEST_DELAY_S)
        pending: Pending = self._transport.start(sends, recvs, step)
        time.sleep(self._rng.random() * LONGEST_DELAY_S)
        return pending


def part_of(scheme: str, given: Any, transport: Any, rank: int) -> Part:
    """The scheme as this rank runs it, with the keys that lie before every window left out."""
    problem, firsts = given.problem.windowed(given.rules.window)
    own, begin = [], 0
    for at, source in enumerate(problem.sources):
        stop = begin + len(source.codec.specs(*given.kv_shape, torch.float32))
        own += [t[firsts[at][rank] :].contiguous() for t in given.own[rank][begin:stop]]
        begin = stop
    ledger = Ledger(problem)
    ledger.layer(given.rules.window, given.q[rank].shape[1])
    layer = Layer(
        transport, Buffers(torch.device("cpu")), Compute(), problem, given.rules, given.q[rank],
        tuple(own), given.kv_shape, ledger,
    )  # fmt: skip
    part = SCHEMES[scheme](layer)
    part = Part(part.out.clone(), part.lse.clone())
    ledger.check(transport, torch.device("cpu"))
    return part


def _all_schemes(transport: Any, rank: int, folder: Path) -> None:
    suite = _conformance()
    world_size = transport.world_size
    delayed = Delayed(transport, random.Random(rank))
    ran = 0
    for name in NAMES:
        case = suite.BY_NAME[name]
        given = suite.setting(case, world_size)
        for scheme in sorted(SCHEMES):
            if why_not(scheme, *case.heads, world_size) is not None:
                continue
            first: Part | None = None
            for end in (transport, *[delayed] * REPEATS):
                part = part_of(scheme, given, end, rank)
                where = f"{scheme}, {name}, rank {rank} of {world_size}"
                for got, wanted in zip(part, given.exact[rank], strict=True):
                    assert got.shape == wanted.shape, where
                    if got.numel():
                        assert (got.double() - wanted).abs().max() <= TOLERANCE, where
                first = first or part
                assert torch.equal(part.out, first.out), f"{where}: delays changed the result"
                assert torch.equal(part.lse, first.lse), f"{where}: delays changed the result"
            ran += 1
    assert ran >= 3 * len(NAMES)
    (folder / f"ran-{rank}").write_text(str(ran))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_schemes_between_processes_equal_one_process(world_size: int, tmp_path: Path) -> None:
    spawn_ranks(_all_schemes, world_size, tmp_path)
    assert len({(tmp_path / f"ran-{rank}").read_text() for rank in range(world_size)}) == 1
