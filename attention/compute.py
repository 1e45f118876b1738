"""The arithmetic of a step, in one place: what a scheme lets a device do.

Schemes move tensors and name pieces; whatever computes goes through a `Compute`. On a device that
is this class; on a simulated clock `simulate.SimulatedCompute` takes its place, so that a schedule
is timed by running the scheme itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ringspan.attention.kv import AttendsInPlace, Codec
from ringspan.attention.local import attend, carrying
from ringspan.attention.mask import Piece
from ringspan.attention.staging import Staging
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


class _Side:
    """A stream for every second piece, and where its last one ends. Events are used again: a wait
    takes the event as it stands when it is enqueued."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.done = torch.cuda.Stream(device), torch.cuda.Event()
        self.busy = False
        """Since the last join."""


class Compute:
    """`backend`: a name of `local.BACKENDS`, or `auto`.

    With `alternate`, pieces run on two streams in turn, so that one fills the multiprocessors that
    the last wave of the one before leaves idle (8,192 rows of 32 heads are 15.5 waves of an H200:
    they take as long as 16). What they read must stay, and what they give may be read, only behind
    `join`.
    """

    def __init__(self, backend: str = "auto", alternate: bool = False) -> None:
        self.backend, self._alternate = backend, alternate
        self._sides: tuple[_Side, ...] = ()
        self._next = 0
        self._staging = Staging()

    def join(self) -> None:
        """The current stream goes on behind all pieces."""
        for side in self._sides:
            if side.busy:
                torch.cuda.current_stream().wait_event(side.done)
                side.busy = False

    @contextmanager
    def fenced(self) -> Iterator[None]:
        """Within, work is enqueued behind all pieces so far, but the current stream does not wait
        for it: for exchanges that overwrite what pieces have read."""
        busy = [side for side in self._sides if side.busy]
        if not busy:
            yield
            return
        self._here.record()
        self._fence.wait_event(self._here)
        for side in busy:
            self._fence.wait_event(side.done)
        with torch.cuda.stream(self._fence):
            yield

    @contextmanager
    def _aside(self, like: torch.Tensor) -> Iterator[None]:
        if not (self._alternate and like.is_cuda):
            yield
            return
        if not self._sides:
            self._sides = (_Side(like.device), _Side(like.device))
            self._fence, self._here = torch.cuda.Stream(like.device), torch.cuda.Event()
        side = self._sides[self._next]
        self._next = 1 - self._next
        self._here.record()
        side.stream.wait_event(self._here)
        with torch.cuda.stream(side.stream):
            yield
            side.done.record()
        side.busy = True

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        piece: Piece,
        rules: Rules,
        by_rule: bool = False,
    ) -> Part:
        """One piece: q [T, Hq, D] are its rows, k and v [S, Hkv, D] its keys. See `join`.

        by_rule: the backend by the fixed order, not by what was measured on this machine.
        """
        with self._aside(q):
            return attend(
                q, k, v,
                causal=piece.causal, offset=piece.offset, window=piece.window,
                softcap=rules.softcap, scale=rules.scale, backend=self.backend, by_rule=by_rule,
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

    def attend_encoded(
        self,
        codec: Codec,
        q: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        piece: Piece,
        rules: Rules,
    ) -> Part | None:
        """As `attend`, over the codes as they lie; None where the codec cannot, or where decoding
        is faster. `tensors` [units, ...] hold the keys that the piece counts."""
        if piece.causal or piece.window is not None or not isinstance(codec, AttendsInPlace):
            return None
        if not codec.serves(q, tensors):
            return None
        # On the current stream: calls share the workspace that their splits are merged from.
        return codec.attend(
            q, tensors, first=piece.k0, stop=piece.k1, scale=rules.scale, softcap=rules.softcap
        )

    def next_place(self) -> int:
        """Of the two for decoded keys (staging.py), the one to `decode` to."""
        return self._staging.take()

    def decode(
        self,
        codec: Codec,
        tensors: tuple[torch.Tensor, ...],
        k: torch.Tensor,
        v: torch.Tensor,
        place: int,
    ) -> None:
        """Start decoding to k, v [T, Hkv, D], the memory of `place`; see `decoded`."""
        self._staging.fill(place, k.device, lambda: codec.decode(tensors, k, v))

    def decoded(self, place: int) -> None:
        """Pieces from now on may read what was decoded to `place`."""
        self._staging.filled(place)

    def has_read(self, place: int) -> None:
        """No piece after those so far reads `place` before it is decoded to again."""
        self._staging.read(place, [side.stream for side in self._sides if side.busy])

    def merge(
        self,
        parts: Sequence[Part],
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Parts over disjoint keys of the same rows into one; see `kernels.merge.merge_many`."""
        self.join()
        merge_many(parts, out, lse, sinks)
