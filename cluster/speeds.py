"""How fast this device is: measured once in seconds, kept in the user's cache folder.

A GPU under its power cap is fast for a tenth of a second and then slower: an H200 gives 700 TFLOP/s
at first and 640 to 660 when warm. So the device is heated first, long calls are repeated for
`LATE_S` and only their later half counts. Short calls are queued behind other work, so that what is
measured is the device and not the host that launches them; the host's time is taken apart.

The cache (`$RINGSPAN_CACHE`/speeds) has one file for each device, versions of torch and of the
backends, our own code, heads and model shape. One that cannot be read counts as none.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import msgspec
import torch

import ringspan
from ringspan.attention.choice import PACKAGES
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.cost import (
    LARGE_GEMM_ROWS,
    SMALL_GEMM_ROWS,
    DensePoint,
    Sample,
    Speeds,
    fit_attention,
    mlp_width,
    model_shape,
)
from ringspan.attention.mask import Piece
from ringspan.attention.models.cache import cache_folder, keep_whole
from ringspan.cluster.device import product_name
from ringspan.cluster.messages import ModelFacts
from ringspan.kvstore.codecs.registry import CODECS
from ringspan.types import Part

TILE_ROWS = 128
"""Of FlashAttention 4, cuDNN and our kernels on data-centre GPUs."""

GPU_SHAPES = (
    (8192, 32_768, False),
    (16_384, 16_384, True),
    (8192, 8192, False),
    (4096, 8192, True),
    (4096, 2048, False),
    (2048, 4096, False),
    (1024, 2048, True),
    (1024, 1024, False),
)
"""(rows, keys, causal), the longest first: it heats."""
CPU_SHAPES = (
    (64, 64, True),
    (64, 512, False),
    (256, 256, True),
    (256, 1024, False),
    (512, 512, True),
    (1024, 2048, False),
)
"""Ascending: what would take longer than CPU_CALL_S is left out."""
HEAT_S = 0.4
LATE_S = 0.3
SHORT_S = 2e-3
"""A call that takes less is queued behind other work."""
SHORT_CALLS = 40
CPU_CALL_S = 0.25
CPU_SHAPE_S = 0.05
"""For each shape on a CPU."""
DENSE_ROWS = {"cuda": (16, 2048, 16_384), "cpu": (1, 64, 256)}
DENSE_CALL_S = {"cuda": 1.5, "cpu": 0.5}
"""A larger number of rows is left out if it would take longer."""


class _Cached(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: dict[str, str]
    speeds: Speeds


def speeds_key(
    device: torch.device, facts: ModelFacts, backend: str, threads: int | None = None
) -> dict[str, str]:
    """Everything that the speeds depend on. threads: of a CPU rank; None: what torch has now."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    on_cpu = device.type == "cpu"
    return {
        "device": product_name(device),
        "threads": str(threads or torch.get_num_threads()) if on_cpu else "",
        "backend": backend,
        "code": _code_digest(),
        "model": model_shape(facts),
        **versions,
    }


def cached_speeds(key: dict[str, str]) -> Speeds | None:
    try:
        found = msgspec.json.decode(_path(key).read_bytes(), type=_Cached)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None
    return found.speeds if found.key == key else None


def keep_speeds(key: dict[str, str], speeds: Speeds) -> None:
    """Whole or not at all. A folder that cannot be written costs a measurement next time."""
    data = msgspec.json.format(msgspec.json.encode(_Cached(key=key, speeds=speeds)), indent=2)
    keep_whole(_path(key), data)


def speeds_of(
    device: torch.device,
    facts: ModelFacts,
    backend: str,
    dense: Callable[[int], None],
) -> Speeds:
    """From the cache, or measured and put there. dense(rows) takes so many rows through the whole
    model without attention."""
    key = speeds_key(device, facts, backend)
    speeds = cached_speeds(key)
    if speeds is None:
        speeds = measure_speeds(device, facts, backend, dense)
        keep_speeds(key, speeds)
    return speeds


def measure_speeds(
    device: torch.device, facts: ModelFacts, backend: str, dense: Callable[[int], None]
) -> Speeds:
    """Up to 6 s on a GPU, 3 s on a CPU. The device's caching allocator is emptied afterwards."""
    clock = _GpuClock(device) if device.type == "cuda" else _CpuClock()
    dtype: torch.dtype = getattr(torch, facts.dtype)
    bench = _Bench(device, facts, dtype, Compute(backend))
    with torch.inference_mode():
        if isinstance(clock, _GpuClock):
            clock.heat(bench.attend(*GPU_SHAPES[0]))
            samples = [Sample(*s, clock.seconds(bench.attend(*s))) for s in GPU_SHAPES]
            attend_call_s = clock.call_s(bench.attend(128, 128, False))
            call_s = clock.call_s(bench.copy(1024))
        else:
            samples = clock.samples(bench)
            attend_call_s = call_s = 0.0
        gpu = device.type == "cuda"
        units, tile_rows = 1, 1
        if gpu:
            units = torch.cuda.get_device_properties(device).multi_processor_count
            tile_rows = TILE_ROWS
        scan_keys = 131_072 if gpu else 16_384
        copied = 2**28 if gpu else 2**24
        parts, part_rows = 4, 8192 if gpu else 256
        kv_rows = 65_536 if gpu else 2048
        scan_s = clock.seconds(bench.attend(16, scan_keys, False))
        itemsize = dtype.itemsize
        kv_bytes = 2 * facts.num_kv_heads * facts.head_dim * itemsize
        merged = (parts + 1) * part_rows * facts.num_q_heads * facts.head_dim * itemsize
        merged += parts * part_rows * facts.num_q_heads * 4
        encode, decode = {}, {}
        for name in CODECS:
            into, back = bench.code(name, kv_rows)
            encode[name] = kv_rows * kv_bytes / clock.seconds(into)
            decode[name] = kv_rows * kv_bytes / clock.seconds(back)
        hidden, width = facts.hidden_size, max(int(mlp_width(facts)), 128)
        large, small = (LARGE_GEMM_ROWS, SMALL_GEMM_ROWS) if gpu else (512, 128)
        rates = [
            2 * rows * hidden * width / clock.seconds(bench.gemm(rows, hidden, width))
            for rows in (large, small)
        ]
        speeds = Speeds(
            device_name=product_name(device),
            source="measured",
            dtype=facts.dtype,
            num_q_heads=facts.num_q_heads,
            num_kv_heads=facts.num_kv_heads,
            head_dim=facts.head_dim,
            attention=fit_attention(samples, facts.num_q_heads, units, tile_rows),
            scan_bytes_per_s=scan_keys * kv_bytes / scan_s,
            copy_bytes_per_s=2 * copied / clock.seconds(bench.copy(copied)),
            merge_bytes_per_s=merged / clock.seconds(bench.merge(parts, part_rows)),
            decode_bytes_per_s=decode,
            encode_bytes_per_s=encode,
            gemm_flops_per_s=rates[0],
            small_gemm_flops_per_s=rates[1],
            attend_call_s=attend_call_s,
            call_s=call_s,
            dense=_dense_points(clock, dense, DENSE_ROWS[device.type], DENSE_CALL_S[device.type]),
            dense_shape=model_shape(facts),
        )
    if gpu:
        torch.cuda.empty_cache()
    return speeds


class _Bench:
    """What is measured, on random numbers: zeros would draw less power and run faster."""

    def __init__(
        self, device: torch.device, facts: ModelFacts, dtype: torch.dtype, compute: Compute
    ) -> None:
        self.device, self.facts, self.dtype, self.compute = device, facts, dtype, compute

    def attend(self, rows: int, keys: int, causal: bool) -> Callable[[], object]:
        facts = self.facts
        q = self._random(rows, facts.num_q_heads, facts.head_dim)
        k, v = (self._random(keys, facts.num_kv_heads, facts.head_dim) for _ in range(2))
        piece = Piece(0, rows, 0, keys, causal, keys - rows if causal else 0)
        rules = Rules(0, facts.head_dim**-0.5)
        return lambda: self.compute.attend(q, k, v, piece, rules)

    def merge(self, parts: int, rows: int) -> Callable[[], object]:
        facts = self.facts
        shape = (rows, facts.num_q_heads, facts.head_dim)
        some = [
            Part(
                self._random(*shape),
                torch.randn(shape[:2], dtype=torch.float32, device=self.device),
            )
            for _ in range(parts)
        ]
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        return lambda: self.compute.merge(some, out)

    def copy(self, num_bytes: int) -> Callable[[], object]:
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def code(self, name: str, rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
        facts, chosen = self.facts, CODECS[name]
        k, v = (self._random(rows, facts.num_kv_heads, facts.head_dim) for _ in range(2))
        specs = chosen.specs(facts.num_kv_heads, facts.head_dim, self.dtype)
        into = tuple(
            torch.empty((spec.units(rows), *spec.shape), dtype=spec.dtype, device=self.device)
            for spec in specs
        )
        return lambda: chosen.encode(k, v, into), lambda: chosen.decode(into, k, v)

    def gemm(self, rows: int, hidden: int, width: int) -> Callable[[], object]:
        a, b = self._random(rows, hidden), self._random(width, hidden).t()
        return lambda: a @ b

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)


class _GpuClock:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
        self._work: Callable[[], object] = lambda: a @ a

    def heat(self, fn: Callable[[], object]) -> None:
        began = time.perf_counter()
        while time.perf_counter() - began < HEAT_S:
            fn()
            torch.cuda.synchronize(self._device)

    def seconds(self, fn: Callable[[], object]) -> float:
        """Device seconds of one call, late in a series."""
        fn()
        once = self._series(fn, 1, 0)
        if once < SHORT_S:
            # Enough work ahead of the series that the host has launched all of it before it begins.
            ahead = 1 + int(2 * SHORT_CALLS * self._host_s(fn) / 1.5e-3)
            return self._series(fn, SHORT_CALLS, ahead)
        count = max(2, int(LATE_S / once))
        self._series(fn, count // 2, 0)
        return self._series(fn, count - count // 2, 0)

    def call_s(self, fn: Callable[[], object]) -> float:
        """Host seconds of one call."""
        fn()
        return self._host_s(fn)

    def _host_s(self, fn: Callable[[], object]) -> float:
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        for _ in range(SHORT_CALLS // 2):
            fn()
        taken = (time.perf_counter() - began) / (SHORT_CALLS // 2)
        torch.cuda.synchronize(self._device)
        return taken

    def _series(self, fn: Callable[[], object], count: int, ahead: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        for _ in range(ahead):
            self._work()
        first.record()
        for _ in range(count):
            fn()
        last.record()
        torch.cuda.synchronize(self._device)
        return first.elapsed_time(last) / 1e3 / count

    def once(self, fn: Callable[[], object]) -> float:
        """Host and device together, one call."""
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        fn()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - began


class _CpuClock:
    def seconds(self, fn: Callable[[], object]) -> float:
        """The median of a few calls, the first left out."""
        fn()
        taken = [self.once(fn)]
        while sum(taken) < CPU_SHAPE_S and len(taken) < 50:
            taken.append(self.once(fn))
        return statistics.median(taken)

    def once(self, fn: Callable[[], object]) -> float:
        began = time.perf_counter()
        fn()
        return time.perf_counter() - began

    def samples(self, bench: _Bench) -> list[Sample]:
        samples: list[Sample] = []
        for rows, keys, causal in CPU_SHAPES:
            if len(samples) >= 3:
                last = samples[-1]
                if last.seconds * rows * keys / (last.rows * last.keys) > CPU_CALL_S:
                    break
            samples.append(
                Sample(rows, keys, causal, self.seconds(bench.attend(rows, keys, causal)))
            )
        return samples


def _dense_points(
    clock: _GpuClock | _CpuClock,
    dense: Callable[[int], None],
    sizes: tuple[int, ...],
    most_s: float,
) -> tuple[DensePoint, ...]:
    """The best of two calls each, after one that warms up."""
    points: list[DensePoint] = []
    for rows in sizes:
        # A few rows take nearly as long as hundreds: only from there on does time grow with rows.
        if len(points) > 1 and points[-1].seconds * rows / points[-1].rows > most_s:
            break
        try:
            first = clock.once(lambda rows=rows: dense(rows))  # type: ignore[misc]
            taken = [clock.once(lambda rows=rows: dense(rows)) for _ in range(2)]  # type: ignore[misc]
        except torch.OutOfMemoryError:
            break
        points.append(DensePoint(rows, min(taken)))
        if first > most_s:
            break
    return tuple(points)


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Of the package's own sources that run on a device."""
    digest = hashlib.sha256(ringspan.__version__.encode())
    root = Path(ringspan.__file__).parent
    for folder in ("attention", "kernels", "kvstore/codecs"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _path(key: dict[str, str]) -> Path:
    name = hashlib.sha256(msgspec.json.encode(key, order="deterministic")).hexdigest()[:24]
    return cache_folder() / "speeds" / f"{name}.json"
