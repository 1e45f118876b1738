"""The arithmetic of a step, in one place: what a scheme lets a device do.

Schemes move tensors and name pieces; whatever computes goes through a `Compute`. On a device that
is this class; on a simulated clock `simulate.SimulatedCompute` takes its place, so that a schedule
is timed by running the scheme itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ringspan.attention.kv import Codec
from ringspan.attention.local import attend, carrying
from ringspan.attention.mask import Piece
from ringspan.kernels.merge import merge_many
from ringspan.types import Part


class Rules(NamedTuple):
    """How one layer attends."""

    layer: int
    scale: float
    window: int | None = None
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    """[Hq] fp32 logits, one more term of each row's denominator; None where there are none."""


class Compute:
    """`backend`: a name of `local.BACKENDS`, or `auto`."""

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, rules: Rules
    ) -> Part:
        """One piece: q [T, Hq, D] are its rows, k and v [S, Hkv, D] its keys."""
        return attend(
            q, k, v,
            causal=piece.causal, offset=piece.offset, window=piece.window,
            softcap=rules.softcap, scale=rules.scale, backend=self.backend,
        )  # fmt: skip

    def carries(self, q: torch.Tensor) -> bool:
        """Whether the backend continues accumulators itself (`attend_into`)."""
        return carrying(self.backend, q)

    def attend_into(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        piece: Piece,
        rules: Rules,
        into: Part,
    ) -> None:
        """As `attend`, continuing the fp32 accumulators `into` of the same rows."""
        attend(
            q, k, v,
            causal=piece.causal, offset=piece.offset, window=piece.window,
            softcap=rules.softcap, scale=rules.scale, backend=self.backend, into=into,
        )  # fmt: skip

    def decode(
        self, codec: Codec, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor
    ) -> None:
        codec.decode(tensors, k, v)

    def merge(
        self,
        parts: Sequence[Part],
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Parts over disjoint keys of the same rows into one; see `kernels.merge.merge_many`."""
        merge_many(parts, out, lse, sinks)
