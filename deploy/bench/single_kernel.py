"""The fastest single kernel on this machine: what every engine is compared with.

One call over the whole sequence on one device, with no ranks, hops or merges. Every backend that
can serve the shape is timed on that very shape, and the best is taken.
"""

from __future__ import annotations

import statistics
from functools import cached_property
from typing import NamedTuple

import torch

from ringspan.attention.backends.case import Mask, canonical_blocks
from ringspan.attention.local import BACKENDS, attend, case_of
from ringspan.deploy.bench.case import AttentionCase
from ringspan.deploy.bench.timing import LONG_CALL_S, Run, Side, calls_of, in_turn
from ringspan.errors import RingspanError

FULL_TOKENS = {"cuda": 32_768, "cpu": 1_024}
"""Of the attention without a mask that gives the device's best rate."""


class Whole(NamedTuple):
    """The whole sequence: q [T, Hq, D] of the new tokens, k and v [S, Hkv, D] of all."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Kernel(NamedTuple):
    """The fastest, and what it was chosen from."""

    name: str
    run: Run
    seconds: dict[str, float]
    """Of one call of each backend, where there was a choice."""
    left_out: dict[str, str]
    """Why the others were not timed."""


class Yardstick:
    """A case's whole sequence and the best kernels over it; kept while cases have its shape."""

    def __init__(self, case: AttentionCase, device: torch.device) -> None:
        self.shape, self._case, self._device = shape_of(case), case, device
        self.whole = random_sequence(case, device)

    @cached_property
    def kernel(self) -> Kernel:
        return best_kernel(self.whole, self._case.causal, self._case.window)

    @cached_property
    def full_case(self) -> AttentionCase:
        """Every query sees every key, at a size where kernels are at their best: the rate that
        this device can have."""
        return AttentionCase(
            tokens=FULL_TOKENS[self._device.type],
            num_q_heads=self._case.num_q_heads,
            num_kv_heads=self._case.num_kv_heads,
            head_dim=self._case.head_dim,
            dtype=self._case.dtype,
            causal=False,
        )

    @cached_property
    def full_kernel(self) -> Kernel:
        return best_kernel(random_sequence(self.full_case, self._device), False, None)


def shape_of(case: AttentionCase) -> tuple[object, ...]:
    """What the whole sequence and its kernels depend on."""
    return (
        case.tokens, case.cached, case.num_q_heads, case.num_kv_heads, case.head_dim,
        case.causal, case.window, case.dtype, case.seed,
    )  # fmt: skip


def random_sequence(case: AttentionCase, device: torch.device) -> Whole:
    """Normal random numbers by the case's seed."""
    generator = torch.Generator(device).manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def rand(tokens: int, heads: int) -> torch.Tensor:
        shape = (tokens, heads, case.head_dim)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    return Whole(
        rand(case.tokens, case.num_q_heads),
        rand(case.keys, case.num_kv_heads),
        rand(case.keys, case.num_kv_heads),
    )


def best_kernel(whole: Whole, causal: bool, window: int | None) -> Kernel:
    """Raises RingspanError where no backend but the definition can do it."""
    usable, left_out = _candidates(whole, causal, window)
    runs = {name: _runner(whole, causal, window, name) for name in usable}
    seconds: dict[str, float] = {}
    for name, run in runs.items() if len(runs) > 1 else ():
        try:
            seconds[name] = _seconds(run, whole.q.device)
        except Exception as error:  # a kernel that does not build for this GPU: many types
            left_out[name] = str(error).strip().partition("\n")[0] or type(error).__name__
    if not usable or (len(usable) > 1 and not seconds):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise RingspanError(f"no kernel to compare with on {whole.q.device.type} ({reasons})")
    best = min(seconds, key=seconds.__getitem__) if seconds else usable[0]
    return Kernel(best, runs[best], seconds, left_out)


def _candidates(whole: Whole, causal: bool, window: int | None) -> tuple[list[str], dict[str, str]]:
    """Backends that can serve the shape, and why the others cannot."""
    q, k, _ = whole
    [block] = canonical_blocks(q.shape[0], k.shape[0], _mask(whole, causal, window))
    rows = q[block.row_start : block.row_stop]
    keys = k[block.key_start : block.key_stop]
    shape = case_of(rows, keys, block.mask, 0.0, q.shape[2] ** -0.5)
    usable, left_out = [], {}
    for name, backend in BACKENDS.items():
        reason: str | None = "it is the definition, not a kernel"
        if name != "reference":
            reason = backend.available(q.device.type) or backend.why_not(shape)
        if reason is None:
            usable.append(name)
        else:
            left_out[name] = reason
    return usable, left_out


def _runner(whole: Whole, causal: bool, window: int | None, name: str) -> Run:
    q, k, v = whole
    mask = _mask(whole, causal, window)

    def run(calls: int) -> None:
        for _ in range(calls):
            attend(q, k, v, **mask._asdict(), scale=q.shape[2] ** -0.5, backend=name)

    return run


def _mask(whole: Whole, causal: bool, window: int | None) -> Mask:
    """The last query sits on the last key."""
    return Mask(causal, whole.k.shape[0] - whole.q.shape[0] if causal else 0, window)


def _seconds(run: Run, device: torch.device) -> float:
    """Enough to rank kernels: one sample of what takes long, three of what does not."""
    side = Side("kernel", run)
    calls = calls_of([side], device)
    [times] = in_turn([side], calls, 1, device)
    if times[0] < LONG_CALL_S:
        [more] = in_turn([side], calls, 2, device)
        times += more
    return statistics.median(times)
