from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ringspan.deploy.commands import options
from ringspan.errors import BadInput, StoreError
from ringspan.kvstore import folder as folder_module
from ringspan.kvstore import quota, staging
from ringspan.kvstore.folder import Store
from ringspan.kvstore.quota import OpenMark, is_open, locked
from ringspan.kvstore.testing import Made, make_context
from ringspan.kvstore.tiers.moving import move, pin
from ringspan.kvstore.tiers.placement import TierName, read_placement, write_placement
from ringspan.kvstore.tiers.remote import REMOTE

NAME = "0123456789abcdef"


def three(root: Path) -> list[str]:
    """Ids of contexts of one size, the one unread for longest first."""
    made = [make_context(root, seed=seed) for seed in (1, 2, 3)]
    for age_s, one in zip((3000, 2000, 1000), made, strict=True):
        used(one, age_s)
    return [one.manifest.context_id for one in made]


def used(made: Made, age_s: float) -> None:
    path = made.store.folder(made.manifest) / "tokens.npy"
    now = time.time()
    os.utime(path, (now - age_s, now))


def left_alone(root: Path, name: str) -> bool:
    return not Store(root).verify(name).problems


def full(root: Path, free_bytes: int = 10) -> Store:
    return Store(root, quota_bytes=Store(root).used_bytes() + free_bytes)


def test_the_context_unread_for_longest_goes_and_the_others_stay_whole(tmp_path: Path) -> None:
    oldest, *others = three(tmp_path)
    store = full(tmp_path)
    assert store.check_room(10).contexts == ()
    assert store.check_room(11).contexts == (oldest,)
    assert store.ids() == sorted(others)
    assert all(left_alone(tmp_path, name) for name in others)
    assert store.used_bytes() <= (store.quota_bytes or 0)


def test_pinned_open_and_used_contexts_stay(tmp_path: Path) -> None:
    first, second, third = three(tmp_path)
    pin(Store(tmp_path), first, True)
    digest_keys = set(Store(tmp_path).manifest(second).keys)
    store = full(tmp_path)
    store.check_room(1)  # makes the lock, as any writer with a quota does
    mark = OpenMark(tmp_path, third)

    def in_use(namespace: str, key: str) -> int:
        return int(key in digest_keys)

    with pytest.raises(StoreError, match=r"quota of .* GB, and too few of them may go: remove"):
        store.check_room(11, in_use=in_use)
    assert store.ids() == sorted([first, second, third])
    mark.close()
    mark.close()
    with pytest.raises(StoreError, match="too few of them may go"):
        store.check_room(11, in_use=in_use, keep=[third])
    assert store.check_room(11, in_use=in_use).contexts == (third,)
    assert store.ids() == sorted([first, second])


def test_a_mark_ends_with_its_process(tmp_path: Path) -> None:
    name = make_context(tmp_path).manifest.context_id
    folder = tmp_path / "contexts" / name
    text = (
        "import sys\nfrom pathlib import Path\nfrom ringspan.kvstore.quota import OpenMark\n"
        "mark = OpenMark(Path(sys.argv[1]), sys.argv[2])\nprint('marked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"marked\n"
        assert is_open(folder)
        process.kill()
    assert not is_open(folder)


def test_what_another_tier_has_loses_only_its_copy_on_the_disk(tmp_path: Path) -> None:
    oldest, *_ = three(tmp_path / "store")
    to = TierName(REMOTE, f"file://{tmp_path / 'remote'}")
    move(Store(tmp_path / "store"), oldest, to, keep=True)
    os.utime(tmp_path / "store" / "contexts" / oldest / "tokens.npy", (0, time.time()))
    store = full(tmp_path / "store")
    assert store.check_room(11).contexts == (oldest,)
    assert oldest in store.ids()
    assert read_placement(store.root / "contexts" / oldest).tiers == (to,)
    assert left_alone(store.root, oldest)


def test_a_context_that_is_more_than_the_quota_costs_no_other_one(tmp_path: Path) -> None:
    names = three(tmp_path)
    store = full(tmp_path)
    with pytest.raises(StoreError, match="too few of them may go"):
        store.check_room((store.quota_bytes or 0) + 1)
    assert store.ids() == sorted(names)


def test_two_writers_at_once_do_not_overshoot(tmp_path: Path) -> None:
    size = 1000
    refused: list[str] = []
    begin = threading.Barrier(8)

    def write() -> None:
        store = Store(tmp_path, quota_bytes=3 * size)
        begin.wait(30)
        try:
            store.check_room(size)
        except StoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(refused) == 5
    assert Store(tmp_path).used_bytes() == 3 * size


def test_a_reservation_goes_over_to_the_staging_folder_and_ends_with_it(tmp_path: Path) -> None:
    made = make_context(tmp_path / "other")
    store = Store(tmp_path / "store", quota_bytes=100_000)
    store.check_room(90_000)
    assert store.used_bytes() == 90_000
    folder = Path(store.stage(made.manifest.context_id, made.token_ids))
    assert store.used_bytes() == 90_000
    (folder / "rank-0.seg").write_bytes(bytes(50_000))
    assert store.used_bytes() == 90_000  # what is written is part of what was reserved
    with pytest.raises(StoreError, match="of a quota of"):
        store.check_room(10_001)
    store.abort(str(folder))
    assert store.used_bytes() == 0
    store.check_room(90_000)
    store.check_room(80_000)  # he who asks again has thought better of it
    assert store.used_bytes() == 80_000


def test_a_published_context_counts_with_its_size(tmp_path: Path) -> None:
    made = make_context(tmp_path)
    name, size = made.manifest.context_id, Store(tmp_path).used_bytes()
    store = Store(tmp_path, quota_bytes=10 * size)
    store.check_room(5 * size)
    with store.staged(name, made.token_ids) as folder:
        for path in made.store.folder(made.manifest).glob("*.seg"):
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        store.publish(folder, made.manifest)
    assert store.used_bytes() == size
    assert left_alone(tmp_path, name)


def test_a_dead_writers_reservation_goes(tmp_path: Path) -> None:
    text = (
        "import os, sys\nfrom ringspan.kvstore.folder import Store\n"
        "Store(sys.argv[1], quota_bytes=1000).check_room(900)\nos._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", text, str(tmp_path)], check=False)
    assert len(list((tmp_path / "reserved").iterdir())) == 1
    Store(tmp_path, quota_bytes=1000).check_room(900)


def test_a_crash_while_a_context_is_evicted_leaves_the_others_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oldest, *others = three(tmp_path)

    class Crash(BaseException):
        pass

    def crash(*args: object, **kwargs: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.shutil, "rmtree", crash)  # between the rename and the removal
        with pytest.raises(Crash):
            full(tmp_path).check_room(11)
    store = Store(tmp_path)
    assert store.ids() == sorted(others)
    assert all(left_alone(tmp_path, name) for name in others)
    assert list((tmp_path / "trash").iterdir()) == []
    assert oldest not in store.ids()


def test_who_waits_for_the_lock_too_long_is_told(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(StoreError, match=r"quota.lock was held for 0.05 s: another"),
        locked(tmp_path, timeout_s=0.05),
    ):
        pass
    with locked(tmp_path, timeout_s=0.05):
        pass


def test_a_damaged_placement_is_left_alone(tmp_path: Path) -> None:
    oldest, second, _ = three(tmp_path)
    folder = tmp_path / "contexts" / oldest
    write_placement(folder, read_placement(folder))
    for path in folder.glob("tiers.json*"):
        path.write_bytes(b"{")
    assert full(tmp_path).check_room(11).contexts == (second,)


def test_a_taken_over_folder_does_not_count_with_the_dead_ones_room(tmp_path: Path) -> None:
    folder = staging.new_folder(tmp_path / "staging", NAME)
    (folder / quota.ROOM).write_text("900")
    (folder / "rank-0.seg").write_bytes(bytes(100))
    store = Store(tmp_path, quota_bytes=2000)
    assert store.used_bytes() == 900
    store.check_room(1000, folder)
    assert store.used_bytes() < 1900


@pytest.mark.parametrize("given", [0.0, -1.0, float("nan"), float("inf")])
def test_a_quota_that_is_none_is_refused(given: float) -> None:
    with pytest.raises(BadInput, match=r"--quota .*: wanted GB, more than 0"):
        options.quota_bytes(given)


def test_a_quota_is_given_in_gb() -> None:
    assert options.quota_bytes(1.5) == 1_500_000_000
    assert options.quota_bytes(None) is None
