"""Puts clock, disk and wire of a simulation in the place of the real ones, and takes them back.

Shipped modules name these at their top (`os`, `time`, `secrets`, `socket`); while a simulation
runs, the names in these modules lead to it. Nothing else of them is changed: the code that runs is
the code that ships.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np

from ringspan.kvstore import audit as audits
from ringspan.kvstore import (
    direct,
    folder,
    index_copy,
    journal,
    leases,
    parity,
    repair,
    segment,
    segment_reader,
    staging,
    transfer,
    write_behind,
)
from ringspan.kvstore.faults.chance import Chance
from ringspan.kvstore.faults.disk import SimDisk
from ringspan.kvstore.faults.host import HostOs, SimHost
from ringspan.kvstore.faults.remote import Objects, SimRemote, register
from ringspan.kvstore.tiers import disk as disk_tier
from ringspan.kvstore.tiers import host as host_tier
from ringspan.kvstore.tiers import placement, quarantine, remote, slabs

ON_DISK = (
    direct, disk_tier, folder, host_tier, index_copy, journal, parity, placement, quarantine,
    repair, segment, segment_reader, staging,
)  # fmt: skip
OPENING = (folder, index_copy, parity, placement, repair, segment, segment_reader)
NAMING = (folder, index_copy, leases, remote, repair, slabs, staging)
THREADED = (audits, host_tier, parity, transfer, write_behind)


class Inline:
    """An executor that does the work at once, so that the order of all calls is the seed's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:  # as in a thread: the future has it
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing waits."""

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing waits."""


@contextlib.contextmanager
def installed(chance: Chance, disk: SimDisk, host: SimHost, objects: Objects) -> Iterator[None]:
    """While the body runs, the store's modules live in the simulation. One at a time."""
    names = SimpleNamespace(token_hex=chance.token_hex)
    clock = SimpleNamespace(time=lambda: chance.wall_s, monotonic=lambda: chance.monotonic_s)
    arrays = _With(np, copyto=host.copyto)
    put: list[tuple[Any, str, Any]] = [
        *((module, "os", disk) for module in ON_DISK),
        *((module, "open", disk.open_file) for module in OPENING),
        *((module, "secrets", names) for module in NAMING),
        *((module, "ThreadPoolExecutor", Inline) for module in THREADED),
        (staging, "time", clock),
        (quarantine, "time", clock),
        (staging, "_started", lambda pid: "now" if pid == disk.pid else None),
        (slabs, "os", HostOs(chance)),
        (host_tier, "socket", host),
        (host_tier, "np", arrays),
    ]
    missing = object()
    before = [(module, name, vars(module).get(name, missing)) for module, name, _ in put]
    register()
    SimRemote.objects = objects
    try:
        for module, name, value in put:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            if value is missing:
                delattr(module, name)
            else:
                setattr(module, name, value)


class _With:
    """A module, some names of which are others."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def memory_folder() -> str | None:
    """A folder for temporary files in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
