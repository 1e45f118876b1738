"""What several tests share: real processes that form a gloo group."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringspan.attention.transport import Transport

GROUP_TIMEOUT_S = 20.0


def spawn_ranks(
    body: Callable[[Transport, int, Path], None], world_size: int, folder: Path
) -> None:
    """Runs body(transport, rank, folder) in `world_size` processes that share a gloo group.

    The function is found again by its file and name, because a test module cannot be imported by
    name from another process. A failure in any process is raised here.
    """
    import torch.multiprocessing as mp

    where = body.__code__.co_filename
    mp.spawn(_enter, args=(where, body.__name__, world_size, str(folder)), nprocs=world_size)


def _enter(rank: int, where: str, name: str, world_size: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from ringspan.attention.group import join_group

    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "rendezvous"), world_size)
    transport = join_group("gloo", store, rank, world_size, torch.device("cpu"), GROUP_TIMEOUT_S)
    try:
        _function(where, name)(transport, rank, Path(folder))
    finally:
        transport.close()


def _function(where: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("ringspan_test_body", where)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
