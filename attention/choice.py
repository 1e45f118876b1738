"""Which backend is the fastest here: measured once per machine, kept in the user's cache folder.

    $RINGSPAN_CACHE/backends.json     {device and versions: {kind of call: [names, fastest first]}}

Kinds are told apart by what decides between backends: many rows, a few over many keys or one, with
a diagonal or without, heads and dtype. `local.choose` asks `order`; without a measurement, and for
`deterministic` runs, it goes by its own fixed order. Nothing is measured but by `measure`, which a
gang's ranks call at their start on a GPU.

A GPU at its power limit ranks kernels otherwise than a cool one does in its first tenth of a
second: with an order measured by single calls, an H200's rings over 131,072 tokens ran 7 to 11 %
slower than with the fixed one. So the device is heated first, series of calls are timed in turn,
and what comes first by the fixed order stays first unless another is faster by more than the noise.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

import torch

from ringspan.attention.backends.case import Backend, Case, Mask
from ringspan.attention.cost import FEW_ROWS, MANY_KEYS
from ringspan.attention.models.cache import cache_folder, keep_whole

PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
SHAPES = {"one": (1, 131_072), "few": (16, 131_072), "many": (4096, 4096)}
"""(rows, keys) that are timed: of one row, of a few and of many. No larger, or our own kernel would
first measure its tiles (kernels/flash_tune.py)."""
WARM_UPS, REPEATS = 3, 5
HEAT_S, SERIES_S = 0.5, 0.06
MARGIN = 0.03
"""By so much another must be faster to come before the first of the fixed order."""

_measured: dict[str, dict[str, list[str]]] = {}


def kind(case: Case) -> str:
    """What a measurement of this case holds for."""
    rows = "many"
    if case.rows < FEW_ROWS and case.keys >= MANY_KEYS:
        rows = "one" if case.rows == 1 else "few"
    mask = "causal" if case.mask.causal else "full"
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{rows} {mask} {case.num_q_heads}/{case.num_kv_heads} {case.head_dim} {dtype}"


def order(case: Case) -> list[str] | None:
    """Names of backends, fastest first, as measured on this device; None if it was not."""
    if case.device_type != "cuda" or not torch.cuda.is_available():
        return None
    device = _device_key(torch.cuda.current_device())
    if device not in _measured:
        _measured[device] = _read().get(device, {})
    return _measured[device].get(kind(case))


def measure(
    in_order: Callable[[Case], Iterable[Backend]],
    device: torch.device,
    dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> dict[str, dict[str, float]]:
    """Seconds of every usable backend for each kind of call with these heads; kept for `order`.

    in_order(case): the backends in the fixed order. What is known already is not timed again.
    Takes seconds, most of them compilation.
    """
    found: dict[str, dict[str, float]] = {}
    for rows_kind, (rows, keys) in SHAPES.items():
        for causal in (False, True) if rows_kind == "many" else (False,):
            case = Case(
                device_type=device.type,
                capability=torch.cuda.get_device_capability(device),
                dtype=dtype,
                rows=rows,
                keys=keys,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                mask=Mask(causal, keys - rows if causal else 0, None),
                softcap=0.0,
                scale=head_dim**-0.5,
            )
            if order(case) is None:
                found[kind(case)] = _timed(in_order(case), case, device)
    if found:
        _keep(_device_key(device.index), {name: ranked(s) for name, s in found.items()})
    return found


def ranked(seconds: dict[str, float]) -> list[str]:
    """Names by seconds, fastest first; `seconds` is in the fixed order, whose first stays first
    unless it is slower by more than MARGIN."""
    names = sorted(seconds, key=seconds.__getitem__)
    first = next(iter(seconds), None)
    if first is not None and seconds[first] <= (1 + MARGIN) * seconds[names[0]]:
        names.remove(first)
        names.insert(0, first)
    return names


def _timed(backends: Iterable[Backend], case: Case, device: torch.device) -> dict[str, float]:
    shape = (case.num_kv_heads, case.head_dim)
    q = torch.randn((case.rows, case.num_q_heads, case.head_dim), dtype=case.dtype, device=device)
    k, v = (torch.randn((case.keys, *shape), dtype=case.dtype, device=device) for _ in range(2))
    usable = [
        backend
        for backend in backends
        if backend.available(case.device_type) is None
        and backend.why_not(case) is None
        and backend.name != "reference"
    ]
    once: dict[str, float] = {}
    for backend in list(usable):
        try:
            for _ in range(WARM_UPS):
                backend.run(q, k, v, case)
            once[backend.name] = _seconds(partial(backend.run, q, k, v, case), 1, device)
        except RuntimeError:  # what its own check did not foresee: it is not a choice here
            usable.remove(backend)
    if not usable:
        return {}
    first = usable[0]
    heat = 1 + int(HEAT_S / once[first.name])
    _seconds(partial(first.run, q, k, v, case), heat, device)
    seconds: dict[str, list[float]] = {backend.name: [] for backend in usable}
    for _ in range(REPEATS):
        for backend in usable:
            count = 1 + int(SERIES_S / once[backend.name])
            took = _seconds(partial(backend.run, q, k, v, case), count, device)
            seconds[backend.name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Of one call, when it is called `count` times in a row."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        run()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1e3 / count


@lru_cache(maxsize=16)
def _device_key(index: int | None) -> str:
    versions = []
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return ", ".join((torch.cuda.get_device_name(index), *versions))


def _file() -> Path:
    return cache_folder() / "backends.json"


def _read() -> dict[str, dict[str, list[str]]]:
    """What the file holds; nothing where it cannot be read."""
    try:
        held = json.loads(_file().read_bytes())
        return {
            str(device): {str(k): [str(n) for n in names] for k, names in kinds.items()}
            for device, kinds in held.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _keep(device: str, orders: dict[str, list[str]]) -> None:
    """Whole or not at all; a folder that cannot be written costs a measurement next time."""
    held = _read()
    held.setdefault(device, {}).update(orders)
    _measured[device] = held[device]
    keep_whole(_file(), json.dumps(held, indent=2).encode())
