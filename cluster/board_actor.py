"""The status board as a Ray actor: named, detached, found by whoever joins the cluster."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from ringspan.cluster.board import Board, Report, Reporter, Seen
from ringspan.errors import PeerTimeout, StoreError

NAME = "ringspan-status"
RAY_NAMESPACE = "ringspan"
CALL_TIMEOUT_S = 10.0


def join_board(name: str = NAME) -> Any:
    """The cluster's board as an actor; the first caller starts it. It outlives its drivers."""
    return (
        ray.remote(Board)
        .options(
            name=name,
            namespace=RAY_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
        )
        .remote()
    )


def look(name: str = NAME, timeout_s: float = CALL_TIMEOUT_S) -> tuple[Seen, ...]:
    """What runs on the cluster that this process has joined; nothing where nobody ever reported.
    Raises PeerTimeout, `StoreError`."""
    try:
        board = ray.get_actor(name, namespace=RAY_NAMESPACE)
    except ValueError:
        return ()
    try:
        found: tuple[Seen, ...] = ray.get(board.look.remote(), timeout=timeout_s)
    except GetTimeoutError:
        raise PeerTimeout(f"the status board did not answer in {timeout_s:g} s") from None
    except RayError as error:
        line = str(error).strip().splitlines()[0]
        raise StoreError(f"the status board cannot be asked: {line}") from None
    return found


def ray_reporter(report: Report) -> Reporter:
    """For the cluster that this process has joined."""
    board = join_board()

    def put(newest: Report) -> None:
        board.put.remote(newest)

    def gone(source: str) -> None:
        board.end.remote(source)

    return Reporter(report, put, gone)
