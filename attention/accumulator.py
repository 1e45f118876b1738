"""The parts of some query rows, gathered as they come and merged once.

Merging two parts at a time reads and writes fp32 accumulators at every hop: at 4,096 rows over
2,048 keys these bytes alone take a quarter of the attention's own time on an H200 (168 MB at 4 TB/s
beside 0.18 ms). So parts are kept as they come
(in the compute dtype, as the kernels give them) and merged n ways at the end, each read once; only
when they would take more than `HELD_BYTES` are they folded into fp32. A backend that carries
accumulators needs neither: it continues the fp32 part where the last piece left it.

Order: parts are merged in the order of their keys' ranks and rows, not of their arrival, so the
result does not depend on timing. With `deterministic` they are never folded in between nor carried.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from ringspan.attention.compute import Compute, Rules
from ringspan.attention.mask import Piece
from ringspan.types import Part

HELD_BYTES = 3 << 30
"""Of parts waiting for the merge, before they are folded; planners count with it."""


class _Held(NamedTuple):
    """A part of rows [q0, q1); `order` fixes its place in the merge."""

    order: tuple[int, int, int]
    q0: int
    q1: int
    part: Part

    @property
    def nbytes(self) -> int:
        return self.part.out.nbytes + self.part.lse.nbytes


class Accumulator:
    """q [T, Hq, D]: the rows. Valid for one layer."""

    def __init__(
        self, compute: Compute, rules: Rules, q: torch.Tensor, deterministic: bool = False
    ) -> None:
        self._compute, self._rules, self.q = compute, rules, q
        self._deterministic = deterministic
        self._held: list[_Held] = []
        self._folded: Part | None = None

    def over(
        self, k: torch.Tensor, v: torch.Tensor, piece: Piece, order: tuple[int, int, int]
    ) -> None:
        """Attend to one piece. order: rank of the keys, their source, their first row there."""
        rows = slice(piece.q0, piece.q1)
        keys = slice(piece.k0, piece.k1)
        arguments = (self.q[rows], k[keys], v[keys], piece, self._rules)
        if not self._deterministic and self._compute.carries(self.q):
            into = self._fold()
            self._compute.attend_into(*arguments, Part(into.out[rows], into.lse[rows]))
            return
        part = self._compute.attend(*arguments, by_rule=self._deterministic)
        self.add(piece.q0, piece.q1, part, order)

    def add(self, q0: int, q1: int, part: Part, order: tuple[int, int, int]) -> None:
        """A part of rows [q0, q1), computed here or elsewhere. Its tensors must stay as they are
        until `finish`."""
        self._held.append(_Held(order, q0, q1, part))
        if self._deterministic or len(self._held) < 3:
            return
        if sum(held.nbytes for held in self._held) > HELD_BYTES:
            self._fold()

    def finish(self, dtype: torch.dtype) -> Part:
        """The merged part, out in `dtype`; rows that saw no key are 0 with lse -inf."""
        whole = len(self._held) == 1 and self._held[0].q1 - self._held[0].q0 == self.q.shape[0]
        if whole and self._folded is None and self._rules.sinks is None:
            self._compute.join()
            part = self._held[0].part  # often the only one: nothing is copied or merged
            return part if part.out.dtype == dtype else Part(part.out.to(dtype), part.lse)
        merged = self._new(dtype)
        self._merge_into(*merged, self._rules.sinks)
        return merged

    def _new(self, dtype: torch.dtype) -> Part:
        """Memory for a part of all rows; lse with tokens side by side, as the kernels give it."""
        rows, heads, _ = self.q.shape
        out = torch.empty(self.q.shape, dtype=dtype, device=self.q.device)
        lse = torch.empty((heads, rows), dtype=torch.float32, device=self.q.device)
        return Part(out, lse.t())

    def _fold(self) -> Part:
        """All parts so far, in fp32."""
        if self._folded is not None and not self._held:
            return self._folded
        folded = self._new(torch.float32) if self._folded is None else self._folded
        self._merge_into(*folded, None)
        self._folded, self._held = folded, []
        return self._folded

    def _merge_into(self, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> None:
        """Every run of rows that the same parts cover is one n-way merge."""
        held = sorted(self._held, key=lambda one: one.order)
        edges = sorted({0, self.q.shape[0], *(e for one in held for e in (one.q0, one.q1))})
        for q0, q1 in itertools.pairwise(edges):
            parts = [] if self._folded is None else [_rows(self._folded, q0, q1)]
            parts += [
                _rows(one.part, q0 - one.q0, q1 - one.q0)
                for one in held
                if one.q0 <= q0 and q1 <= one.q1
            ]
            if not parts:
                out[q0:q1].zero_()
                lse[q0:q1].fill_(-torch.inf)
                if sinks is not None:
                    lse[q0:q1] = sinks
                continue
            self._compute.merge(parts, out[q0:q1], lse[q0:q1], sinks)


def _rows(part: Part, q0: int, q1: int) -> Part:
    return Part(part.out[q0:q1], part.lse[q0:q1])
