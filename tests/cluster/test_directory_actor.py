"""The directory as a real Ray actor: found by its name, killed, started anew from its journal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ringspan.cluster.directory_actor import RayDirectory, end_directory, join_directory
from ringspan.cluster.ray_cluster import connect
from ringspan.errors import StoreError, UnknownName
from ringspan.kvstore.leases import InUse, StaleHandle
from ringspan.kvstore.records import PageEntry, Shelf, Tier

pytestmark = pytest.mark.ray

KEYS = [f"{page:064x}" for page in range(40)]
SHELF = Shelf(Tier.GPU, "context", "raw", 64)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with connect(num_cpus=2):
        yield


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RayDirectory]:
    yield join_directory(tmp_path / "journal")
    end_directory()


def put(directory: RayDirectory) -> int:
    epoch = directory.join("gang")
    directory.declare("ten", "context", KEYS, 5120, owner="gang", epoch=epoch, ref="w")
    directory.stage("gang", epoch, "w", "ten", SHELF, [PageEntry(key, 3) for key in KEYS])
    directory.publish("gang", epoch, "w", len(KEYS))
    directory.release("gang", epoch, "w")
    return epoch


def test_what_one_driver_publishes_another_one_finds(
    directory: RayDirectory, tmp_path: Path
) -> None:
    epoch = put(directory)
    other = join_directory(tmp_path / "journal")
    (row,) = other.leading("ten", [*KEYS[:30], "f" * 64])
    assert (row.pages, row.holder, row.epoch, row.shelf) == (30, "gang", epoch, SHELF)
    assert other.known("ten", KEYS) == 40
    assert other.used_bytes("ten") == {Tier.GPU: 120}
    (found,) = other.locate("ten", KEYS[:1], here=("gang",))
    assert found is not None
    assert found.size_bytes == 3
    with pytest.raises(UnknownName, match="unknown context 'context'; known: none"):
        other.lease("eleven", "context", "gang", epoch, SHELF)
    lease = other.lease("ten", "context", "gang", epoch, SHELF)
    with pytest.raises(InUse, match="1 leases stand"):
        directory.withdraw("gang", epoch, "ten", SHELF)
    assert other.end_lease(lease)
    assert directory.withdraw("gang", epoch, "ten", SHELF, KEYS[20:]) == 20


def test_a_directory_that_is_killed_comes_back_with_what_it_answered(
    directory: RayDirectory,
) -> None:
    epoch = put(directory)
    lease = directory.lease("ten", "context", "gang", epoch, SHELF)
    pid = ray.get(directory._actor.__ray_call__.remote(lambda host: os.getpid()), timeout=30)
    os.kill(pid, signal.SIGKILL)
    assert directory.leading("ten", KEYS)[0].pages == 40
    with pytest.raises(StaleHandle, match="the directory was started anew"):
        directory.check(lease)
    with pytest.raises(InUse, match="leases from before"):
        directory.withdraw("gang", epoch, "ten", SHELF)
    directory.beat("gang", epoch)
    assert directory.join("gang") > epoch


def test_a_directory_that_was_ended_is_told_so(tmp_path: Path) -> None:
    directory = join_directory(tmp_path / "journal")
    epoch = put(directory)
    assert end_directory()
    assert not end_directory()
    with pytest.raises(StoreError, match="the directory is lost"):
        directory.beat("gang", epoch)
    again = join_directory(tmp_path / "journal")
    assert again.leading("ten", KEYS)[0].pages == 40
    end_directory()
