"""The choice of a kernel and its tile shape, without a GPU: the timing itself is replaced."""

import json
import threading

import pytest
import torch

from ringspan.kernels import flash_tune
from ringspan.kernels.flash_hopper import HopperConfig, why_not_hopper
from ringspan.kernels.flash_triton import Config

PLAIN, HOPPER = Config(128, 64, 4, 2), HopperConfig(128, 2, True)
SMALL, LARGE = 64, 16384


class Clock:
    """Stands for _time: gives the milliseconds it was told, counts what it timed."""

    def __init__(self, times):
        self.times, self.timed = times, []

    def __call__(self, config, q, k, v, causal):
        self.timed.append((config, causal))
        return self.times[config]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A machine with two candidates and an empty cache of its own."""
    clock = Clock({HOPPER: 2.0, PLAIN: 1.0})
    monkeypatch.setenv("RINGSPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(flash_tune, "_chosen", {})
    monkeypatch.setattr(flash_tune, "_candidates", lambda q, k, v: (HOPPER, PLAIN))
    monkeypatch.setattr(flash_tune, "_time", clock)
    monkeypatch.setattr(flash_tune, "_TUNE_TOKENS", 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return clock


def choose(tokens, causal=True):
    q, kv = (
        torch.empty(1, heads, 128, dtype=torch.bfloat16).expand(tokens, -1, -1) for heads in (32, 8)
    )
    return flash_tune.choose(q, kv, kv, causal=causal)


def test_a_small_call_takes_the_default_and_measures_nothing(clock):
    assert choose(SMALL) == HOPPER
    assert clock.timed == []


def test_a_large_call_measures_its_mask_once(clock):
    assert [choose(LARGE), choose(LARGE), choose(SMALL)] == [PLAIN] * 3
    assert clock.timed == [(HOPPER, True), (PLAIN, True)]
    assert choose(SMALL, causal=False) == HOPPER


def test_another_process_takes_what_the_file_says(clock, monkeypatch):
    choose(LARGE)
    monkeypatch.setattr(flash_tune, "_chosen", {})
    clock.times = {HOPPER: 1.0, PLAIN: 2.0}
    assert choose(LARGE) == PLAIN
    assert len(clock.timed) == 2


def test_a_stored_choice_that_is_no_candidate_is_measured_again(clock, monkeypatch):
    choose(LARGE)
    monkeypatch.setattr(flash_tune, "_chosen", {})
    monkeypatch.setattr(flash_tune, "_candidates", lambda q, k, v: (HOPPER,))
    assert choose(LARGE) == HOPPER


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a GPU": 3}'])
def test_a_broken_cache_file_is_replaced(clock, content):
    path = flash_tune.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert choose(LARGE) == PLAIN
    assert len(json.loads(path.read_text())) >= 1


def test_a_candidate_that_fails_is_not_taken(clock):
    clock.times[PLAIN] = None
    assert choose(LARGE) == HOPPER


def test_nothing_is_measured_while_a_graph_is_captured(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(LARGE) == HOPPER
    assert clock.timed == []


def test_ranks_that_measure_at_once_leave_a_whole_file(clock):
    devices = [f"GPU {i}" for i in range(8)]
    threads = [threading.Thread(target=flash_tune._store, args=(name, PLAIN)) for name in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = json.loads(flash_tune.cache_file().read_text())
    assert set(stored) <= set(devices)
    assert stored


def test_tune_tells_what_it_measured(clock):
    times = flash_tune.tune(torch.device("cpu"), 128, torch.bfloat16)
    assert times == {mask: {str(HOPPER): 2.0, str(PLAIN): 1.0} for mask in ("causal", "full")}
    assert choose(SMALL, causal=False) == PLAIN


def test_the_hopper_kernel_tells_why_it_cannot(monkeypatch):
    x = torch.empty(4, 2, 128, dtype=torch.bfloat16)
    assert "Hopper" in why_not_hopper(x, x, x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.float(), "bf16 and fp16"),
        (lambda x: x[..., :80], "head_dim 64 and 128"),
        (lambda x: x.flatten()[4 : 4 + 2 * 2 * 64].view(2, 2, 64), "16-byte"),
        (lambda x: x[:1].expand(4, -1, -1), "16-byte"),
    ],
    ids=["fp32", "head_dim 80", "base off 16 bytes", "stride 0"],
)
def test_the_hopper_kernel_refuses_by_name(make, reason, device):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wants a Hopper GPU")
    x = make(torch.zeros(4, 2, 128, dtype=torch.bfloat16, device=device))
    assert reason in why_not_hopper(x, x, x)
