"""A few seconds of measuring: is this device as fast as it should be?

Not a benchmark (see the README's table for those): one shape each, the median of a few runs. The
units stand in the names.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ringspan.attention.local import attend

REPEATS = 5


def measure_device(device: torch.device) -> dict[str, float]:
    """Matmul, causal attention and memory speed of one device; on a GPU its host link too."""
    return {
        "matmul_tflops": _matmul_tflops(device),
        "attention_tflops": _attention_tflops(device),
        "copy_gb_per_s": _copy_gb_per_s(device),
        **(_host_link_gb_per_s(device) if device.type == "cuda" else {}),
    }


def _matmul_tflops(device: torch.device) -> float:
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2.0 * n**3 / _median_s(lambda: a @ b, device) / 1e12


def _attention_tflops(device: torch.device) -> float:
    """Causal, GQA 4:1 at D 128 on a GPU (32 q heads, 16,384 tokens); 8 heads of 64 on a CPU."""
    gpu = device.type == "cuda"
    tokens, q_heads, kv_heads, head_dim = (16_384, 32, 8, 128) if gpu else (1024, 8, 2, 64)
    dtype = torch.bfloat16 if gpu else torch.float32
    q = torch.randn(tokens, q_heads, head_dim, device=device, dtype=dtype)
    k = torch.randn(tokens, kv_heads, head_dim, device=device, dtype=dtype)
    v = torch.randn(tokens, kv_heads, head_dim, device=device, dtype=dtype)
    scale = head_dim**-0.5
    elapsed_s = _median_s(lambda: attend(q, k, v, causal=True, offset=0, scale=scale), device)
    pairs = tokens * (tokens + 1) / 2
    return 4.0 * q_heads * head_dim * pairs / elapsed_s / 1e12


def _copy_gb_per_s(device: torch.device) -> float:
    """Read plus write, within the device's memory."""
    num_bytes = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_s(lambda: target.copy_(source), device) / 1e9


def _host_link_gb_per_s(device: torch.device) -> dict[str, float]:
    num_bytes = 2**28
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
    board = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    to_device = _median_s(lambda: board.copy_(host, non_blocking=True), device)
    to_host = _median_s(lambda: host.copy_(board, non_blocking=True), device)
    return {
        "host_to_device_gb_per_s": num_bytes / to_device / 1e9,
        "device_to_host_gb_per_s": num_bytes / to_host / 1e9,
    }


def _median_s(operation: Callable[[], object], device: torch.device) -> float:
    """Of `REPEATS` runs, two to warm up first (compilation, clocks)."""
    for _ in range(2):
        operation()
    times = []
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        operation()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
