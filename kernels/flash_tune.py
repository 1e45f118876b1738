"""Which flash kernel and tile shape a CUDA call takes: measured once per GPU, else a named default.

A call that is large enough (TUNE_FLOP) and finds no measurement for its device, head_dim, dtype and
mask times the few candidates, once; the result is kept in the process and in a JSON file:

    $RINGSPAN_CACHE/flash.json, or ~/.cache/ringspan/flash.json

Smaller calls take the default. Given the file, every process takes the same kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton

from ringspan.kernels.flash_hopper import (
    HOPPER_CONFIGS,
    WG_ROWS,
    HopperConfig,
    flash_hopper,
    why_not_hopper,
)
from ringspan.kernels.flash_triton import (
    CONFIGS,
    Config,
    fitting_configs,
    flash_triton,
    num_sms,
)
from ringspan.types import Part

TUNE_FLOP = 5e11
"""A call of this size (about 1 ms on an H200) is worth a measurement, and pays for it soon."""

_TUNE_TOKENS, _TUNE_HEADS = 8192, (16, 4)
"""Rows and keys, q and kv heads of what is timed."""

_WARMUPS, _REPEATS = 2, 7

Choice: TypeAlias = Config | HopperConfig

_chosen: dict[str, Choice] = {}


def flash_gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any) -> Part:
    """flash.flash for CUDA tensors, T, S >= 1; `call` holds its keyword arguments."""
    if call["scale"] <= 0:  # the kernels take the largest of the raw scores
        negative = call["scale"] < 0
        q, call["scale"] = (-q, -call["scale"]) if negative else (torch.zeros_like(q), 1.0)
    few_rows = (
        not call["causal"]
        and call["window"] is None
        and 2 * triton.cdiv(q.shape[0], 2 * WG_ROWS) * q.shape[1] < num_sms(q.device)
    )
    # most multiprocessors would idle: only the Triton kernel splits the keys
    config = None if few_rows else choose(q, k, v, causal=call["causal"])
    if isinstance(config, HopperConfig):
        return flash_hopper(q, k, v, **call, config=config)
    return flash_triton(q, k, v, **call, config=config)


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> Choice | None:
    """The measured choice where there is one and the tensors allow it, else the default.

    None leaves the choice to flash_triton. Measures, if the call is large and nothing is known.
    """
    candidates = _candidates(q, k, v)
    if not candidates:
        return None
    key = _key(q.device, q.shape[2], q.dtype, causal)
    if key not in _chosen:
        flop = 4 * q.shape[0] * k.shape[0] * q.shape[1] * q.shape[2]
        known = _load(key, candidates)
        if known is not None:
            _chosen[key] = known
        elif flop >= TUNE_FLOP and not torch.cuda.is_current_stream_capturing():
            _measure(q.device, q.shape[2], q.dtype, causal)
    chosen = _chosen.get(key)
    return chosen if chosen in candidates else candidates[0]


def tune(
    device: torch.device, head_dim: int, dtype: torch.dtype
) -> dict[str, dict[str, float | None]]:
    """Times the candidates, keeps the fastest -> mask -> candidate -> ms (None: it failed).

    Raises ValueError where there is nothing to choose, RuntimeError where no candidate runs.
    """
    return {
        "causal" if causal else "full": {
            str(config): ms for config, ms in _measure(device, head_dim, dtype, causal).items()
        }
        for causal in (True, False)
    }


def cache_file() -> Path:
    """Where choices are kept."""
    folder = os.environ.get("RINGSPAN_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "ringspan") / "flash.json"


def _candidates(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Choice, ...]:
    """What can take these tensors, the default first; none where flash_triton has its own list."""
    dim = q.shape[2]
    if q.element_size() != 2 or dim not in CONFIGS:
        return ()
    plain = fitting_configs(q.device, dim, q.element_size())
    if why_not_hopper(q, k, v) is None:
        return (*HOPPER_CONFIGS[dim], *plain[:1])
    return plain[:2]


def _measure(
    device: torch.device, head_dim: int, dtype: torch.dtype, causal: bool
) -> dict[Choice, float | None]:
    """Times the candidates under one mask; the fastest is chosen from now on, and stored."""
    q_heads, kv_heads = _TUNE_HEADS
    q, k, v = (
        torch.randn(_TUNE_TOKENS, heads, head_dim, device=device, dtype=dtype)
        for heads in (q_heads, kv_heads, kv_heads)
    )
    candidates = _candidates(q, k, v)
    if not candidates:
        raise ValueError(f"head_dim {head_dim} and {dtype} have one kernel: nothing to choose")
    measured = {config: _time(config, q, k, v, causal) for config in candidates}
    ran = {config: ms for config, ms in measured.items() if ms is not None}
    if not ran:
        raise RuntimeError(f"no flash kernel runs on {device} for head_dim {head_dim}, {dtype}")
    best = min(ran, key=ran.__getitem__)
    key = _key(device, head_dim, dtype, causal)
    _chosen[key] = best
    _store(key, best)
    return measured


def _time(
    config: Choice, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> float | None:
    """Median ms of a call, None if it fails."""
    run: Any = flash_hopper if isinstance(config, HopperConfig) else flash_triton
    call = {"causal": causal, "offset": 0, "scale": q.shape[2] ** -0.5, "config": config}
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    try:
        for _ in range(_WARMUPS + _REPEATS):
            events[0].record()
            run(q, k, v, window=None, softcap=0.0, **call)
            events[1].record()
            events[1].synchronize()
            times.append(events[0].elapsed_time(events[1]))
    except Exception:  # too much shared memory, a compiler that refuses: types differ by version
        return None
    return statistics.median(times[_WARMUPS:])


def _key(device: torch.device, head_dim: int, dtype: torch.dtype, causal: bool) -> str:
    """What the best choice depends on."""
    mask = "causal" if causal else "full"
    name = torch.cuda.get_device_name(device)
    return (
        f"{name} triton-{triton.__version__} {str(dtype).removeprefix('torch.')} {head_dim} {mask}"
    )


def _load(key: str, candidates: tuple[Choice, ...]) -> Choice | None:
    """What the file says, if it is one of the candidates of this version."""
    stored = _read().get(key)
    return next((c for c in candidates if _as_json(c) == stored), None)


def _store(key: str, config: Choice) -> None:
    """Replaces the file in one step: several ranks may measure at once, and any of them will do.

    A folder that cannot be written costs the next process a measurement, nothing else.
    """
    path = cache_file()
    content = json.dumps(_read() | {key: _as_json(config)}, indent=1, sort_keys=True)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
            scratch.write(content)
        os.replace(scratch.name, path)


def _read() -> dict[str, Any]:
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or not ours
        return {}
    return content if isinstance(content, dict) else {}


def _as_json(config: Choice) -> dict[str, Any]:
    return {"kernel": type(config).__name__, **config._asdict()}
