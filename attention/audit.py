"""An audit of a step: some rows computed again, from positions and keys alone, in fp32.

At one layer of a step every rank draws a few of its query rows. All ranks get these rows, attend
with them in fp32 to the keys that lie with them, and return the parts; the owner merges them and
compares with what the step gave. The mask is made anew from positions (no pieces, no scheme, no
backend), so that whatever went wrong between plan and kernel, on any rank, shows: a stale buffer, a
wrong hop, a wrong head, a race.

Cost: rows x all keys at one layer, well under a thousandth of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ringspan.attention.kv import cut_units
from ringspan.attention.layer import Layer
from ringspan.attention.layout import positions
from ringspan.errors import WrongAttention
from ringspan.kernels.merge import merge_many
from ringspan.types import Part

ROWS = 4
"""Drawn on each rank."""
TILE_KEYS = 16_384
"""Decoded and attended to at a time; a multiple of every page."""

ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 5e-3, torch.float64: 5e-3}
"""Of ||out - exact|| / ||exact|| over the drawn rows. A bf16 kernel rounds weights and results to 8
bits and stays near 3e-3; in fp32 it is the scores that are rounded, and where they are in the
thousands (the retriever's) weights are off by 4e-4. A missing page or a swapped head is off by
tenths."""


class AuditResult(NamedTuple):
    """What was found, over all audited layers and this rank's rows."""

    layers: int
    rows: int
    relative_error: float
    """The worst layer's ||out - exact|| / ||exact||."""
    max_error: float
    """The largest absolute difference of any element."""


class Audit:
    """Audits `layers` of one step with `rows` rows of each rank, drawn by `seed`."""

    def __init__(self, layers: frozenset[int], seed: int, rows: int = ROWS) -> None:
        self._layers, self._seed, self._rows = layers, seed, rows
        self._found: list[tuple[int, torch.Tensor, torch.Tensor, torch.dtype]] = []

    @classmethod
    def drawn(cls, seed: int, num_layers: int, rows: int) -> Audit | None:
        """Of one layer, drawn by `seed` as every rank draws it; None for no rows."""
        if not rows:
            return None
        layer = int(np.random.default_rng((seed, num_layers)).integers(num_layers))
        return cls(frozenset((layer,)), seed, rows)

    def wants(self, layer: int) -> bool:
        return layer in self._layers

    def check(self, layer: Layer, part: Part) -> None:
        """`part` is what the step gave for this rank's rows. All ranks call it. The comparison
        stays on the device until `result`."""
        drawn = [self._drawn(layer, rank) for rank in range(layer.world_size)]
        mine = torch.from_numpy(drawn[layer.rank]).to(layer.q.device)
        q = torch.zeros(
            (self._rows, *layer.q.shape[1:]), dtype=torch.float32, device=layer.q.device
        )
        q[: len(mine)] = layer.q[mine].float()
        all_q = layer.transport.all_gather(q).flatten(0, 1)  # [P * rows, Hq, D]
        away = _attend(layer, all_q, _row_positions(layer, drawn, self._rows))
        packed = torch.cat((away.out, away.lse[..., None]), -1)
        gathered = layer.transport.all_gather(packed).unflatten(1, (layer.world_size, self._rows))
        parts = [
            Part(one[..., :-1].contiguous(), one[..., -1].contiguous())
            for one in gathered[:, layer.rank, : len(mine)]
        ]
        exact = torch.empty_like(q[: len(mine)])
        if len(mine):
            merge_many(parts, exact, None, layer.rules.sinks)
            off = part.out[mine].float() - exact
            relative = off.norm() / exact.norm().clamp_min(1e-30)
            self._found.append((len(mine), relative, off.abs().max(), layer.q.dtype))

    def result(self) -> AuditResult:
        """Raises WrongAttention where an error is larger than the dtype explains."""
        worst, largest, rows = 0.0, 0.0, 0
        for count, relative, error, dtype in self._found:
            found = float(relative)
            if not found <= ALLOWED[dtype]:  # NaN never passes
                raise WrongAttention(
                    f"an audited layer is off by {found:.2g} of its value, allowed "
                    f"{ALLOWED[dtype]:.2g} in {str(dtype).removeprefix('torch.')}: nothing of this "
                    "step may be used; run `ringspan doctor --needles`"
                )
            worst, largest, rows = max(worst, found), max(largest, float(error)), rows + count
        return AuditResult(len(self._found), rows, worst, largest)

    def _drawn(self, layer: Layer, rank: int) -> np.ndarray:
        """Row numbers of `rank`, the same on every rank that asks. Its last row is one of them."""
        rows = layer.problem.rows(rank)
        if rows <= self._rows:
            return np.arange(rows)
        random = np.random.default_rng((self._seed, layer.rules.layer, rank))
        return np.append(random.choice(rows - 1, self._rows - 1, replace=False), rows - 1)


class _Rows(NamedTuple):
    """Which sequence each audited row belongs to, and its position; -1 where there is no row."""

    sequence: np.ndarray
    position: np.ndarray


def _row_positions(layer: Layer, drawn: list[np.ndarray], rows: int) -> _Rows:
    sequence = np.full((len(drawn), rows), -1)
    position = np.zeros((len(drawn), rows), dtype=np.int64)
    for rank, numbers in enumerate(drawn):
        deals = [deal[rank] for deal in layer.problem.queries]
        at = np.concatenate([positions(spans).numpy() for spans in deals])
        of = np.concatenate(
            [np.full(sum(s.tokens for s in spans), i) for i, spans in enumerate(deals)]
        )
        sequence[rank, : len(numbers)] = of[numbers]
        position[rank, : len(numbers)] = at[numbers]
    return _Rows(sequence.ravel(), position.ravel())


def _attend(layer: Layer, q: torch.Tensor, rows: _Rows) -> Part:
    """All audited rows over this rank's own keys: online softmax in fp32, tile by tile."""
    (hkv, dim), (num, hq, _) = layer.kv_shape, q.shape
    queries = (q * layer.rules.scale).view(num, hkv, hq // hkv, dim).permute(1, 0, 2, 3)
    queries = queries.reshape(hkv, num * (hq // hkv), dim)
    shape = queries.shape[:2]
    peak = q.new_full(shape, -torch.inf)
    total = q.new_zeros(shape)
    out = queries.new_zeros(queries.shape)
    begin = 0
    for _at, source in enumerate(layer.problem.sources):
        specs = source.codec.specs(hkv, dim, layer.q.dtype)
        tensors = layer.own[begin : begin + len(specs)]
        begin += len(specs)
        key_at = positions(source.held[layer.rank]).numpy()
        low, high = _visible(layer, key_at, rows, source.sequences)
        first_row = torch.from_numpy(low).to(q.device).repeat_interleave(hq // hkv)[None, :, None]
        last_row = torch.from_numpy(high).to(q.device).repeat_interleave(hq // hkv)[None, :, None]
        for k0 in range(0, int(high.max(initial=0)), TILE_KEYS):
            k1 = min(k0 + TILE_KEYS, len(key_at))
            keys, values = (
                torch.empty((k1 - k0, hkv, dim), dtype=layer.q.dtype, device=q.device)
                for _ in range(2)
            )
            source.codec.decode(cut_units(tensors, specs, k0, k1), keys, values)
            scores = queries @ keys.float().permute(1, 2, 0)
            if layer.rules.softcap:
                scores = layer.rules.softcap * torch.tanh(scores / layer.rules.softcap)
            number = torch.arange(k0, k1, device=q.device)
            scores.masked_fill_((number < first_row) | (number >= last_row), -torch.inf)
            new_peak = torch.maximum(peak, scores.amax(-1))
            pivot = torch.where(new_peak.isneginf(), 0.0, new_peak)
            weights = (scores - pivot[..., None]).exp_()
            shrink = (peak - pivot).exp()
            total = total * shrink + weights.sum(-1)
            out = out * shrink[..., None] + weights @ values.float().transpose(0, 1)
            peak = new_peak
    seen = total > 0
    out = out / torch.where(seen, total, 1.0)[..., None]
    lse = torch.where(seen, peak + torch.where(seen, total, 1.0).log(), -torch.inf)
    back = (hkv, num, hq // hkv)
    return Part(
        out.view(*back, dim).permute(1, 0, 2, 3).reshape(num, hq, dim),
        lse.view(back).permute(1, 0, 2).reshape(num, hq),
    )


def _visible(
    layer: Layer, key_at: np.ndarray, rows: _Rows, sequences: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """For each audited row the keys [low, high) that it may see of those held, which ascend."""
    if layer.problem.causal:
        high = np.searchsorted(key_at, rows.position, side="right")
    else:
        high = np.full(len(rows.position), len(key_at))
    low = np.zeros_like(high)
    if layer.rules.window is not None:
        low = np.searchsorted(key_at, rows.position - layer.rules.window + 1, side="left")
    hidden = ~np.isin(rows.sequence, sequences)
    high[hidden] = 0
    return low, high
