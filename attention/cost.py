"""What a device and a link cost: seconds of a kernel, of a move of bytes, of an exchange. Pure.

Attention: tiles of `tile_rows` rows of one head go to `units` processors (a GPU's SMs) in waves:

    seconds = fixed_s + tile_s * waves + pair_s * pairs * waves / fill
    fill    = ceil(rows / tile_rows) * Hq / units      tiles a unit
    waves   = ceil(fill)                               full rectangles: equal tiles, whole waves
              max(fill + 1/2, keys / mean keys a row)  causal: the long tiles start first

A rectangle of few tiles among others leaves units idle that the piece on the other stream takes
(`Compute` alternates two): of those `attend_s` counts max(fill, ceil(fill) / 2) waves. 64 calls of
128 to 256 rows over 131,072 keys (pass-q over eight loopback ranks) took 1.65 times the time of one
large call on an H200; whole waves would be 3.0, pairs of half waves are 1.5.

pairs counts (query, key, head); of a causal block also what its diagonal tiles compute in vain, and
its pair_s is its own. The constants are the non-negative least squares of relative errors over a
few measured shapes. On thirteen shapes of FlashAttention 4 on a warm H200 (2,048 to 131,072 rows,
570 to 655 TFLOP/s) the fit is off by at most 3.1 %.

Everything else is bytes over a rate, or two points joined by a line. Host seconds stand beside
device seconds where a device runs asynchronously: small shapes are bound by the calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ringspan.errors import UnknownName
from ringspan.specs import ModelFacts

FEW_ROWS, MANY_KEYS = 64, 16_384
"""Below so many rows over so many keys a call reads keys and does little else."""
STREAMS = 2
"""Of `Compute`, in turn for its pieces."""
SMALL_GEMM_ROWS, LARGE_GEMM_ROWS = 512, 16_384


class Sample(NamedTuple):
    """One measured attention call; causal: rows are the last of the keys."""

    rows: int
    keys: int
    causal: bool
    seconds: float


class AttentionFit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fixed_s: float
    tile_s: float
    pair_s: float
    """Of one query, key and head, on the whole device."""
    causal_pair_s: float
    units: int = 1
    tile_rows: int = 1

    def seconds(
        self,
        rows: int,
        keys: int,
        pairs: float,
        causal: bool,
        heads: int,
        *,
        streams: int = 1,
    ) -> float:
        """pairs: (query, key) pairs that are seen, of one head. streams: how many calls may run
        side by side."""
        if not rows or not pairs:
            return 0.0
        waves, work = self._terms(rows, keys, pairs, causal, heads)
        fill = math.ceil(rows / self.tile_rows) * heads / self.units
        if not causal and streams > 1 and waves > (shared := max(fill, waves / streams)):
            waves, work = shared, work * shared / waves
        pair_s = self.causal_pair_s if causal else self.pair_s
        return self.fixed_s + self.tile_s * waves + pair_s * work

    def _terms(
        self, rows: int, keys: int, pairs: float, causal: bool, heads: int
    ) -> tuple[float, float]:
        fill = math.ceil(rows / self.tile_rows) * heads / self.units
        if self.units == 1:
            waves = fill
        elif causal:
            waves = max(fill + 0.5, rows * keys / pairs)
        else:
            waves = float(math.ceil(fill))
        computed = min(pairs + rows * self.tile_rows / 2, rows * keys) if causal else pairs
        return waves, computed * heads * waves / fill


class DensePoint(msgspec.Struct, frozen=True, array_like=True):
    """The whole model without attention takes `seconds` for `rows` rows of one rank."""

    rows: int
    seconds: float


class Speeds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one device does, measured on it or assumed (`source` says which)."""

    device_name: str
    source: str
    dtype: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    attention: AttentionFit
    scan_bytes_per_s: float
    """K and V read by a call of few rows over many keys."""
    copy_bytes_per_s: float
    """Read plus written."""
    merge_bytes_per_s: float
    """Read plus written, by the n-way merge of parts."""
    decode_bytes_per_s: dict[str, float] = {}
    """K and V as they come out, by codec."""
    encode_bytes_per_s: dict[str, float] = {}
    """K and V as they go in, by codec."""
    gemm_flops_per_s: float
    """At LARGE_GEMM_ROWS rows."""
    small_gemm_flops_per_s: float
    """At SMALL_GEMM_ROWS rows."""
    attend_call_s: float = 0.0
    """Host time of one attention call; 0 where the host waits for the device anyway."""
    call_s: float = 0.0
    """Host time of any other small operation."""
    dense: tuple[DensePoint, ...] = ()
    """Measured with the model of `dense_shape`, ascending rows."""
    dense_shape: str = ""

    def attend_s(
        self, rows: int, keys: int, pairs: float, causal: bool, heads: int, kv_heads: int
    ) -> float:
        """Device seconds of one attention call; heads may be a share of the model's."""
        if rows < FEW_ROWS and keys >= MANY_KEYS:
            width = {"float32": 4}.get(self.dtype, 2)
            read_s = 2 * keys * kv_heads * self.head_dim * width / self.scan_bytes_per_s
            return self.attention.fixed_s + max(read_s, self.attention.pair_s * pairs * heads)
        return self.attention.seconds(rows, keys, pairs, causal, heads, streams=STREAMS)

    def copy_s(self, num_bytes: float) -> float:
        """Of moving `num_bytes`: they are read and written."""
        return 2 * num_bytes / self.copy_bytes_per_s

    def merge_s(self, num_bytes: float) -> float:
        """num_bytes: read and written together."""
        return num_bytes / self.merge_bytes_per_s

    def decode_s(self, codec: str, num_bytes: float) -> float:
        """num_bytes of K and V that come out. An unmeasured codec counts as a copy."""
        return num_bytes / self.decode_bytes_per_s.get(codec, self.copy_bytes_per_s / 2)

    def encode_s(self, codec: str, num_bytes: float) -> float:
        return num_bytes / self.encode_bytes_per_s.get(codec, self.copy_bytes_per_s / 2)

    def dense_s(self, facts: ModelFacts, rows: int) -> float:
        """Everything of `rows` rows through the model but attention and KV: measured with this
        model where it was, else matmuls by the GEMM rate and the rest by bytes."""
        if not rows:
            return 0.0
        if self.dense and self.dense_shape == model_shape(facts):
            return _interpolated(self.dense, rows)
        gemm = _interpolated(
            (
                DensePoint(SMALL_GEMM_ROWS, SMALL_GEMM_ROWS / self.small_gemm_flops_per_s),
                DensePoint(LARGE_GEMM_ROWS, LARGE_GEMM_ROWS / self.gemm_flops_per_s),
            ),
            rows,
        )
        moved = rows * facts.num_layers * elementwise_bytes(facts)
        return gemm * facts.flops_per_token + moved / self.copy_bytes_per_s

    def dense_host_s(self, facts: ModelFacts) -> float:
        """Host seconds of launching the model without attention once; 0 where not known."""
        if not self.attend_call_s or not self.dense or self.dense_shape != model_shape(facts):
            return 0.0
        return self.dense[0].seconds

    def floor_s(self, pairs: float) -> float:
        """(query, key) pairs of a layer at the kernel's full rate."""
        return self.attention.pair_s * pairs * self.num_q_heads


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rank sends and receives, each direction on its own."""

    latency_s: float
    bytes_per_s: float
    call_s: float = 0.0
    """Host time of starting one exchange and waiting for it."""
    shared_device: bool = False
    """The ranks take turns on one device, and exchanges are copies on it (loopback)."""
    overlaps: bool = True
    """An exchange goes on while the rank computes."""

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


def link_from(small_bytes: int, small_s: float, large_bytes: int, large_s: float) -> Link:
    """The line through two measured exchanges."""
    slope = max(large_s - small_s, 1e-3 * large_s) / (large_bytes - small_bytes)
    return Link(latency_s=max(0.0, small_s - slope * small_bytes), bytes_per_s=1 / slope)


def fit_attention(
    samples: Sequence[Sample], heads: int, units: int, tile_rows: int
) -> AttentionFit:
    """The constants that fit measured calls best. Wants full and causal ones, four in all."""
    import numpy as np

    if len(samples) < 4 or len({sample.causal for sample in samples}) < 2:
        raise ValueError(f"{len(samples)} measured shapes, wanted at least 4, full and causal ones")
    if wrong := [sample for sample in samples if sample.causal and sample.rows > sample.keys]:
        raise ValueError(f"{wrong[0]}: a causal shape's rows are the last of its keys")
    shape = AttentionFit(
        fixed_s=0, tile_s=0, pair_s=0, causal_pair_s=0, units=units, tile_rows=tile_rows
    )
    rows = []
    for sample in samples:
        pairs = sample.rows * sample.keys
        if sample.causal:
            pairs -= sample.rows * (sample.rows - 1) // 2
        waves, work = shape._terms(sample.rows, sample.keys, pairs, sample.causal, heads)
        terms = (1.0, waves, 0.0, work) if sample.causal else (1.0, waves, work, 0.0)
        rows.append([term / sample.seconds for term in terms])
    matrix = np.array(rows)
    scale = matrix.max(axis=0)  # columns differ by twelve orders of magnitude
    matrix /= scale
    found: tuple[float, list[float]] | None = None
    # Non-negative by trying every support that has the pairs in it: there are four.
    for some in ((), (0,), (1,), (0, 1)):
        support = [*some, 2, 3]
        values = np.linalg.lstsq(matrix[:, support], np.ones(len(rows)), rcond=None)[0]
        error = float(((matrix[:, support] @ values - 1) ** 2).sum())
        if (values > 0).all() and (found is None or error < found[0]):
            full = [0.0] * 4
            for at, value in zip(support, values, strict=True):
                full[at] = float(value / scale[at])
            found = error, full
    assert found is not None  # the pairs alone are positive
    fixed_s, tile_s, pair_s, causal_pair_s = found[1]
    return AttentionFit(
        fixed_s=fixed_s,
        tile_s=tile_s,
        pair_s=pair_s,
        causal_pair_s=causal_pair_s,
        units=units,
        tile_rows=tile_rows,
    )


def model_shape(facts: ModelFacts) -> str:
    """Models of one shape and dtype take the same time without attention."""
    return (
        f"{facts.family} {facts.num_layers}x{facts.hidden_size} q{facts.num_q_heads} "
        f"kv{facts.num_kv_heads} d{facts.head_dim} {facts.flops_per_token:.0f} {facts.dtype}"
    )


def mlp_width(facts: ModelFacts) -> float:
    """Of one layer, as if dense: not in the facts, but a layer's parameters are its attention's
    four matrices and the MLP's three."""
    attention = (2 * facts.num_q_heads + 2 * facts.num_kv_heads) * facts.head_dim
    layer_params = facts.flops_per_token / 2 / max(facts.num_layers, 1)
    return max(layer_params / facts.hidden_size - attention, 0.0) / 3


def elementwise_bytes(facts: ModelFacts) -> float:
    """Read and written by one token in one layer outside matmuls and attention, kernels fused.

    Two norms (2 H each) and two residual sums (3 H each), rotary q and k, the gated product (3 F).
    """
    width = 4 if facts.dtype == "float32" else 2
    rotary = 2 * (facts.num_q_heads + facts.num_kv_heads) * facts.head_dim
    return width * (10 * facts.hidden_size + rotary + 3 * mlp_width(facts))


class Machine(NamedTuple):
    """A device that is not here, in bf16 at head_dim 128."""

    name: str
    memory_bytes: int
    units: int
    attention_flops_per_s: float
    gemm_flops_per_s: float
    copy_bytes_per_s: float
    link: Link
    source: str


MACHINES = {
    "h200": Machine(
        "NVIDIA H200", 141 * 10**9, 132, 664e12, 670e12, 4.3e12,
        Link(latency_s=80e-6, bytes_per_s=373e9),
        "FlashAttention 4 and matmuls measured warm at the power cap, device copies measured; "
        "link as two H100 over NVLink by NCCL, measured",
    ),
    "h100": Machine(
        "NVIDIA H100 80GB HBM3", 80 * 2**30, 132, 690e12, 740e12, 3.02e12,
        Link(latency_s=80e-6, bytes_per_s=373e9),
        "FlashAttention 4, matmuls, device copies and NCCL over NVLink measured on one and two",
    ),
    "a100": Machine(
        "NVIDIA A100 80GB", 80 * 2**30, 108, 225e12, 250e12, 1.7e12,
        Link(latency_s=80e-6, bytes_per_s=230e9),
        "attention by https://arxiv.org/abs/2307.08691 (up to 230 TFLOP/s forward); matmuls and "
        "copies as four fifths of the data sheet's 312 TFLOP/s and 2.04 TB/s, NVLink as three "
        "quarters of its 300 GB/s each way",
    ),
}  # fmt: skip
"""Machines that were measured or published; whoever plans with one is told that it is assumed."""

_TILE_OVERHEAD_KEYS = 130
"""A tile's prologue and epilogue cost as much as so many of its keys (fit of the H200's shapes)."""
_NARROW_HEADS = 2 / 3
"""Of the time at head_dim 128 is the least that narrower heads take: exponentials do not shrink
(https://arxiv.org/abs/2407.08608, figure 5: 64 against 128)."""
_CODING_SHARE = 0.25
"""Of the copy rate: K and V bytes a second that codecs give or take, which are read or written
beside their codes."""


def machine(name: str) -> Machine:
    if name.lower() not in MACHINES:
        raise UnknownName("device", name, tuple(MACHINES))
    return MACHINES[name.lower()]


def assumed_speeds(name: str, facts: ModelFacts) -> Speeds:
    """Speeds of a machine of the table for a model's heads; `source` begins with "assumed"."""
    found = machine(name)
    dim = max(facts.head_dim / 128, _NARROW_HEADS)
    slow = 8.0 if facts.dtype == "float32" else 1.0  # no tensor cores for exact fp32
    pair_s = slow * dim * 4 * 128 / found.attention_flops_per_s
    rows = 128
    coding = dict.fromkeys(
        ("int8", "fp8", "int4", "nuq4", "bf16"), _CODING_SHARE * found.copy_bytes_per_s
    )
    return Speeds(
        device_name=found.name,
        source=f"assumed: {found.source}",
        dtype=facts.dtype,
        num_q_heads=facts.num_q_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        attention=AttentionFit(
            fixed_s=2e-6,
            tile_s=_TILE_OVERHEAD_KEYS * rows * found.units * pair_s,
            pair_s=pair_s,
            causal_pair_s=pair_s,
            units=found.units,
            tile_rows=rows,
        ),
        scan_bytes_per_s=0.9 * found.copy_bytes_per_s,
        copy_bytes_per_s=found.copy_bytes_per_s,
        merge_bytes_per_s=0.9 * found.copy_bytes_per_s,
        decode_bytes_per_s=coding,
        encode_bytes_per_s=coding,
        gemm_flops_per_s=found.gemm_flops_per_s / slow,
        small_gemm_flops_per_s=0.6 * found.gemm_flops_per_s / slow,
        attend_call_s=1.4e-4,
        call_s=1.5e-5,
    )


def _interpolated(points: Sequence[DensePoint], rows: int) -> float:
    """On the line through the two points around `rows`; beyond the last one its line goes on, and
    nothing takes less than the first."""
    if rows <= points[0].rows or len(points) == 1:
        return points[0].seconds * (1.0 if rows <= points[0].rows else rows / points[0].rows)
    upper = next((i for i, point in enumerate(points) if point.rows >= rows), len(points) - 1)
    low, high = points[upper - 1], points[upper]
    slope = max(high.seconds - low.seconds, 0.0) / (high.rows - low.rows)
    return low.seconds + slope * (rows - low.rows)
