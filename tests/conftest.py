"""What must be set before torch, triton or Ray start, and which tests this machine can run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning threads of several ranks starve each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else each private Ray writes a token to ~/.ray
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns if it must choose

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # acts when a kernel's module is imported

REAL_EMPTY = {"empty": torch.empty, "empty_like": torch.empty_like}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="wants a CUDA device"))
        if item.get_closest_marker("multigpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"wants 2 CUDA devices, found {gpus}"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the first GPU, else the CPU under Triton's interpreter."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def dirty_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and empty_like give nan (77 as integers): what is left unwritten shows."""

    def dirty(real):
        def make(*args, **kwargs):
            tensor = real(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        return make

    for name, real in REAL_EMPTY.items():
        monkeypatch.setattr(torch, name, dirty(real))
