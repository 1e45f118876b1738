"""Attention on this device: one table of backends, and the choice among them.

    attend(q [T, Hq, D], k [S, Hkv, D], v [S, Hkv, D], mask) -> Part(out [T, Hq, D], lse [T, Hq])

Row i sees key j iff (not causal or j <= i + offset) and
(window is None or i + offset - j < window). lse is the natural log, fp32, -inf (and out 0) where a
row saw no key. Each backend's own convention is converted in its file, nowhere else.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ringspan.attention import choice
from ringspan.attention.backends.case import Backend, Case, Mask, canonical_blocks
from ringspan.attention.backends.cpu_flash import CPU_FLASH
from ringspan.attention.backends.cudnn import CUDNN
from ringspan.attention.backends.fa4 import FA4
from ringspan.attention.backends.reference import REFERENCE
from ringspan.attention.backends.triton_flash import TRITON
from ringspan.attention.cost import FEW_ROWS, MANY_KEYS
from ringspan.errors import BadInput, UnknownName
from ringspan.types import Part

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (FA4, CUDNN, TRITON, CPU_FLASH, REFERENCE)
}
"""Best first."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    offset: int,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
    into: Part | None = None,
    by_rule: bool = False,
) -> Part:
    """Attention of q over k and v, on the device where they lie.

    q [T, Hq, D]; k, v [S, Hkv, D], Hkv a divisor of Hq; one floating dtype; the last axis
    contiguous, the others strided at will. `window` counts the keys a row sees up to and with its
    own. out comes in q.dtype, or in fp32 where that saves a rounding. `into`: the fp32 part of
    these rows over other keys, continued in place; only for backends that carry (`carrying`).
    `by_rule`: `auto` goes by the fixed order, whatever was measured here.
    Raises ValueError for shapes that do not fit together, UnknownName for a backend that does not
    exist, BadInput for a named backend that cannot serve the case.
    """
    _check(q, k, v, window)
    rows, keys = q.shape[0], k.shape[0]
    blocks = tuple(canonical_blocks(rows, keys, Mask(causal, offset, window))) if keys else ()
    done: list[Part] = []
    for block in blocks:
        q_block = q[block.row_start : block.row_stop]
        k_block = k[block.key_start : block.key_stop]
        v_block = v[block.key_start : block.key_stop]
        case = case_of(q_block, k_block, block.mask, softcap, scale)
        chosen = choose(case, backend, by_rule)
        if into is None:
            done.append(chosen.run(q_block, k_block, v_block, case))
        else:
            if chosen.run_into is None:
                raise BadInput(
                    f"attention backend {chosen.name!r} does not carry accumulators; use one of "
                    f"{', '.join(name for name, b in BACKENDS.items() if b.run_into)}"
                )
            rows_of = slice(block.row_start, block.row_stop)
            chosen.run_into(
                q_block, k_block, v_block, case, Part(into.out[rows_of], into.lse[rows_of])
            )
    if into is not None:
        return into
    if len(done) == 1 and blocks[0].row_stop - blocks[0].row_start == rows:
        return done[0]
    if not blocks:
        _named(backend)
    out_dtype = torch.float32 if any(part.out.dtype == torch.float32 for part in done) else q.dtype
    out = q.new_zeros(q.shape, dtype=out_dtype)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for block, part in zip(blocks, done, strict=True):
        out[block.row_start : block.row_stop] = part.out
        lse[block.row_start : block.row_stop] = part.lse
    return Part(out, lse)


def carrying(backend: str, q: torch.Tensor) -> bool:
    """Whether `attend` with this backend would continue accumulators: only where it is named.

    `auto` takes the fastest kernel for each piece, whose parts are merged once at the end.
    """
    named = _named(backend)
    return named is not None and named.run_into is not None


def case_of(q: torch.Tensor, k: torch.Tensor, mask: Mask, softcap: float, scale: float) -> Case:
    return Case(
        device_type=q.device.type,
        capability=_capability(q.device.index) if q.is_cuda else None,
        dtype=q.dtype,
        rows=q.shape[0],
        keys=k.shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        mask=mask,
        softcap=softcap,
        scale=scale,
    )


@lru_cache(maxsize=4096)
def choose(case: Case, backend: str = "auto", by_rule: bool = False) -> Backend:
    """The backend that serves `case`: the named one, or the best that can."""
    named = _named(backend)
    if named is not None:
        reason = named.available(case.device_type) or named.why_not(case)
        if reason is not None:
            raise BadInput(
                f"attention backend {backend!r} cannot serve {_describe(case)}: {reason}; "
                "choose another, or 'auto'"
            )
        return named
    for name in _order(case, by_rule):
        candidate = BACKENDS[name]
        if candidate.available(case.device_type) is None and candidate.why_not(case) is None:
            return candidate
    return REFERENCE


def explain(device_type: str) -> tuple[tuple[str, bool, str], ...]:
    """(name, usable, reason) of every backend on this device type, best first."""
    rows = []
    for backend in BACKENDS.values():
        reason = backend.available(device_type)
        rows.append((backend.name, reason is None, reason or "usable"))
    return tuple(rows)


def measure_backends(
    device: torch.device, dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """Times the backends of a GPU for calls with these heads, once a machine (choice.py)."""

    def in_order(case: Case) -> list[Backend]:
        return [BACKENDS[name] for name in dict.fromkeys(_order(case, by_rule=True))]

    if choice.measure(in_order, device, dtype, num_q_heads, num_kv_heads, head_dim):
        choose.cache_clear()


def _order(case: Case, by_rule: bool) -> tuple[str, ...]:
    """Which backend to try first: as measured on this machine, else by what was measured before.

    One H100, 32 q and 8 kv heads of 128, bf16: full prefill FA4 704, cuDNN 649, Triton 513 TFLOP/s;
    one row over a million keys cuDNN 1.39 ms (3.08 TB/s), FA4 10.2 ms (it does not split keys on
    Hopper). cuDNN plans anew for each shape, so it pays only where keys are many.
    """
    if not by_rule and (measured := choice.order(case)) is not None:
        return (*measured, *BACKENDS)
    if case.rows < FEW_ROWS and case.keys >= MANY_KEYS:
        return ("cudnn", "triton", *BACKENDS)
    return tuple(BACKENDS)


def _named(backend: str) -> Backend | None:
    if backend == "auto":
        return None
    if backend not in BACKENDS:
        raise UnknownName("attention backend", backend, ["auto", *BACKENDS])
    return BACKENDS[backend]


@lru_cache(maxsize=64)
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _describe(case: Case) -> str:
    return (
        f"{case.rows} rows over {case.keys} keys, {case.num_q_heads} q and {case.num_kv_heads} kv "
        f"heads of {case.head_dim}, {str(case.dtype).removeprefix('torch.')} on {case.device_type}"
    )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not "
            "[T, Hq, D], [S, Hkv, D], [S, Hkv, D]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} q heads are no multiple of {k.shape[1]} kv heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}, expected one")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v lie on {q.device}, {k.device}, {v.device}, expected one device")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected None or at least 1 key")
