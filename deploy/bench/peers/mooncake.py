"""Mooncake Store on the loopback interface, put and got as `ringspan bench store` tells it.

Runs in an environment of its own (`store_peers.PACKAGES`) and imports nothing of ringspan.
One line of JSON in, a `MooncakeJob`; `ready` out. Then a line for each command:

    put            every page under a new key; one line out: seconds
    get            all of them into other buffers, compared with what was put after the clock has
                   stopped; one line out: seconds
    remove         what was put last; one line out: 0

where: `owner`, a second process of this script holds the pages and TCP carries them, so that they
outlive this one; or `own`, this process holds them itself, where Mooncake copies without a wire.
Buffers are registered once and every call takes all pages (`batch_put_from`, `batch_get_into`): the
fastest road that its Python interface has.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

HOST = "127.0.0.1"
LOCAL_BYTES = 64 << 20
SETUP_S = 20.0


def main() -> None:
    job = json.loads(sys.stdin.readline())
    pages = np.load(job["pages"])
    address = f"{HOST}:{_free_port()}"
    room = 3 * pages.nbytes + (256 << 20)
    processes = [_start_master(address, job["log"])]
    try:
        if job["where"] == "owner":
            processes.append(_start_owner(address, room))
        store = _connect(address, room if job["where"] == "own" else 0)
        print("ready", flush=True)
        _serve(store, pages)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _serve(store: Any, pages: np.ndarray) -> None:
    back = np.zeros_like(pages)
    count, page_bytes = pages.shape
    for array in (pages, back):
        _check("register_buffer", store.register_buffer(array.ctypes.data, array.nbytes), 0)
    into = [back[i].ctypes.data for i in range(count)]
    out = [pages[i].ctypes.data for i in range(count)]
    sizes = [page_bytes] * count
    keys: list[str] = []
    for round_, line in enumerate(sys.stdin):
        began = time.perf_counter()
        if line.strip() == "put":
            keys = [f"page-{round_}-{i}" for i in range(count)]
            codes, wanted = store.batch_put_from(keys, out, sizes), 0
        elif line.strip() == "get":
            codes, wanted = store.batch_get_into(keys, into, sizes), page_bytes
        else:
            codes, wanted = [store.remove(key, True) for key in keys], 0
        seconds = time.perf_counter() - began
        for code in codes:
            _check(line.strip(), code, wanted)
        if line.strip() == "get":
            if not np.array_equal(pages, back):
                raise SystemExit("Mooncake gave other bytes than were put")
            back.fill(0)
        print(seconds, flush=True)


def _start_master(address: str, log: str) -> subprocess.Popen[bytes]:
    program = Path(sys.executable).with_name("mooncake_master")
    port = address.rpartition(":")[2]
    with open(log, "ab") as file:
        return subprocess.Popen(
            [
                str(program),
                f"-rpc_port={port}",
                f"-rpc_address={HOST}",
                f"-metrics_port={_free_port()}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def _start_owner(address: str, room: int) -> subprocess.Popen[bytes]:
    owner = subprocess.Popen(
        [sys.executable, "-I", __file__, "owner", address, str(room)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    if owner.stdout.readline().strip() != b"owner":
        raise SystemExit("the owner of Mooncake's memory did not start; its output above says why")
    return owner


def own(address: str, room: int) -> None:
    """Holds memory for others until its standard input ends."""
    store = _connect(address, room)
    print("owner", flush=True)
    sys.stdin.read()
    store.close()


def _connect(address: str, room: int) -> Any:
    """A client that gives `room` bytes to the store, once the master answers."""
    deadline = time.monotonic() + SETUP_S
    while True:
        store = MooncakeDistributedStore()
        code = store.setup(HOST, "P2PHANDSHAKE", room, LOCAL_BYTES, "tcp", "", address)
        if code == 0:
            return store
        if time.monotonic() > deadline:
            raise SystemExit(f"Mooncake's setup gave {code} for {SETUP_S} s")
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _check(what: str, code: int, wanted: int) -> None:
    if code != wanted:
        raise SystemExit(f"Mooncake's {what} gave {code}, wanted {wanted}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["owner"]:
        own(sys.argv[2], int(sys.argv[3]))
    else:
        main()
