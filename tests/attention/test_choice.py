"""The measured order of backends: what is kept, what is read, when it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ringspan.attention import choice
from ringspan.attention.backends.case import Mask
from ringspan.attention.local import BACKENDS, case_of, choose, measure_backends
from ringspan.kernels.flash import flash_ref

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")


def case(rows: int, keys: int, causal: bool, device: str = "cpu"):
    q = torch.empty(rows, 8, 64, dtype=torch.bfloat16, device=device)
    k = torch.empty(keys, 2, 64, dtype=torch.bfloat16, device=device)
    return case_of(q, k, Mask(causal, keys - rows if causal else 0, None), 0.0, 0.125)


def test_kinds_tell_apart_what_decides_between_backends() -> None:
    kinds = {
        choice.kind(case(rows, keys, causal))
        for rows, keys, causal in (
            (1, 20_000, False), (9, 20_000, False), (1, 100, False), (99, 99, True),
        )
    }  # fmt: skip
    assert len(kinds) == 4
    assert choice.kind(case(70, 20_000, False)) == choice.kind(case(1, 100, False))


def test_a_cpu_goes_by_the_fixed_order() -> None:
    assert choice.order(case(8, 8, True)) is None
    assert choose(case(8, 8, True)).name == "cpu-flash"


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": {"b": 3}}', "not json"])
def test_a_file_that_cannot_be_read_counts_as_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path))
    (tmp_path / "backends.json").write_text(text)
    assert choice._read() == {}


def test_what_is_kept_is_read_again_beside_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path / "new"))
    choice._keep("one", {"many full": ["a", "b"]})
    choice._keep("two", {"few full": ["b", "a"]})
    choice._keep("one", {"few full": ["c"]})
    assert choice._read() == {
        "one": {"many full": ["a", "b"], "few full": ["c"]},
        "two": {"few full": ["b", "a"]},
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["backends.json"]


def test_the_first_of_the_fixed_order_gives_way_only_to_what_is_clearly_faster() -> None:
    assert choice.ranked({"a": 1.02, "b": 1.0, "c": 3.0}) == ["a", "b", "c"]
    assert choice.ranked({"a": 1.05, "b": 1.0, "c": 0.99}) == ["c", "b", "a"]
    assert choice.ranked({}) == []


@gpu
@pytest.mark.gpu
def test_a_gpu_takes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path))
    choice._measured.clear()
    device = torch.device("cuda", 0)
    measure_backends(device, torch.bfloat16, 8, 2, 64)
    [kinds] = json.loads((tmp_path / "backends.json").read_text()).values()
    assert len(kinds) == 4
    assert all(set(names) <= set(BACKENDS) and len(names) > 1 for names in kinds.values())
    one = case(300, 500, True, "cuda")
    assert choose(one).name == kinds[choice.kind(one)][0]
    assert choose(one, by_rule=True).name == next(
        name
        for name in BACKENDS
        if BACKENDS[name].available("cuda") is None and BACKENDS[name].why_not(one) is None
    )
    q, k, v = (
        torch.randn(n, h, 64, device="cuda").bfloat16() for n, h in ((300, 8), (500, 2), (500, 2))
    )
    exact = flash_ref(q, k, v, causal=True, offset=200, scale=0.125)
    part = choose(one).run(q, k, v, one)
    assert (part.out.float() - exact.out.float()).abs().max() < 0.02
