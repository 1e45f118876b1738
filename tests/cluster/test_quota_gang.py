"""A store with a quota under a gang: what is open stays, what was let go makes room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.deploy.cli import run
from ringspan.errors import BadInput, StoreError
from ringspan.kvstore.folder import Store
from ringspan.kvstore.quota import is_open

OPTIONS = PrefillOptions(chunk_tokens=256)


@pytest.fixture
def gang() -> Iterator[LocalGang]:
    model = ModelSpec(name="random:tiny", seed=3)
    with LocalGang(
        GangSpec(world_size=2, model=model, device="cpu", threads=1, timeout_s=30.0)
    ) as gang:
        yield gang


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=600, dtype=np.int32)


def test_an_open_context_stays_until_the_gang_lets_it_go(gang: LocalGang, tmp_path: Path) -> None:
    first = Controller(gang, Store(tmp_path)).prefill(tokens(1), OPTIONS).context_id
    taken = Store(tmp_path).used_bytes()
    quota_bytes = taken * 27 // 10  # what is reserved is more than what is taken in the end
    store = Store(tmp_path, quota_bytes=quota_bytes)
    controller = Controller(gang, store)
    second = controller.prefill(tokens(2), OPTIONS).context_id
    assert store.ids() == sorted([first, second])
    controller.drop(second)
    for name in (first, second):
        controller.open(name)
        assert is_open(tmp_path / "contexts" / name)

    with pytest.raises(StoreError, match=r"of a quota of .* GB, and too few of them may go"):
        controller.prefill(tokens(3), OPTIONS)
    assert store.ids() == sorted([first, second])

    controller.drop(first)
    assert not is_open(tmp_path / "contexts" / first)
    third = controller.prefill(tokens(3), OPTIONS).context_id
    assert store.ids() == sorted([second, third])
    assert not store.verify(second).problems
    assert store.used_bytes() <= quota_bytes
    assert list((tmp_path / "reserved").iterdir()) == []


def test_the_option_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", tokens(1))
    asked = [
        "prefill", "--model", "random:tiny", "--input", str(tmp_path / "ids.npy"), "--plain",
        "--store", str(tmp_path / "store"), "--ranks", "2", "--device", "cpu", "--local",
    ]  # fmt: skip
    assert run([*asked, "--quota", "0"]) == BadInput.exit_status
    assert "--quota 0: wanted GB, more than 0" in capsys.readouterr().err
    assert run([*asked, "--quota", "0.00001"]) == StoreError.exit_status
    assert "of a quota of 1e-05 GB" in capsys.readouterr().err
    assert run([*asked, "--quota", "1"]) == 0
    assert len(Store(tmp_path / "store").ids()) == 1
