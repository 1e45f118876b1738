"""Token after token for several sessions at once: one forward of fixed shapes a step.

The first steps run launch by launch, and compile and measure whatever has to be; on a GPU the next
one is captured as a CUDA graph and replayed from then on. Where it cannot be captured, steps go on
as they began, and one line of the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ringspan.attention.captured import Captured, capture, why_not_captured
from ringspan.attention.decode_step import Collectives, DecodeStep, Shared, TailRows
from ringspan.attention.group import synchronize
from ringspan.cluster.device import on_device
from ringspan.cluster.runtime import Runtime
from ringspan.cluster.sampling import greedy_tokens
from ringspan.kvstore.shard import ContextShard

WARM_STEPS = 2
"""Tokens that are taken launch by launch before a capture: the second finds everything compiled."""
WORTH_STEPS = 8
"""Tokens still to come that make up for a capture: it goes through the model once on the host."""

log = logging.getLogger(__name__)


class Decoding:
    """B sessions' next tokens. contexts: whose rows are neighbours, in the order of the rows;
    positions: of each row's next token; ids: these tokens; max_steps: how many may follow."""

    def __init__(
        self,
        runtime: Runtime,
        contexts: Sequence[Shared],
        tail: TailRows,
        positions: Sequence[int],
        ids: Sequence[int],
        max_steps: int,
    ) -> None:
        self._runtime, self._left, self._done = runtime, max_steps, 0
        with on_device(runtime.device), torch.inference_mode():
            self._step = DecodeStep(
                runtime.transport, runtime.spec.backend, contexts, tail, positions, runtime.device
            )
            self._step.cursor.ids.copy_(torch.tensor(ids))
        self._captured: Captured | None = None
        # Only what stays where it is may be read by a graph.
        in_place = all(isinstance(one.shard, ContextShard) for one in contexts)
        self._moving = "" if in_place else "a context is streamed from host memory"
        why_not = why_not_captured(runtime.transport, runtime.device)
        self._tried = why_not is not None or not runtime.captures
        self._logits = self._greedy = torch.empty(0)

    @property
    def is_captured(self) -> bool:
        return self._captured is not None

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes every row's token through the model: logits fp32 [B, vocabulary] and the likeliest
        next tokens int64 [B], which become the rows' tokens unless `draw` says otherwise. Both are
        valid until the next step."""
        runtime = self._runtime
        with on_device(runtime.device), torch.inference_mode():
            if not self._tried and self._done >= WARM_STEPS and self._left >= WORTH_STEPS:
                self._capture()
            if self._captured is None:
                self._compute(runtime.transport)
            else:
                self._captured.replay()
                synchronize(runtime.transport, runtime.device)
        self._done, self._left = self._done + 1, self._left - 1
        return self._logits, self._greedy

    def draw(self, ids: Sequence[int]) -> None:
        """Other tokens than the likeliest, for all rows."""
        with on_device(self._runtime.device), torch.inference_mode():
            self._step.cursor.ids.copy_(torch.tensor(ids))

    def rest(self, rows: Sequence[int]) -> None:
        """These rows are done: they move and keep nothing from now on."""
        with on_device(self._runtime.device), torch.inference_mode():
            for row in rows:
                self._step.cursor.active[row].zero_()

    def _compute(self, collectives: Collectives) -> None:
        step = self._step
        cursor, step.transport = step.cursor, collectives
        step.begin()
        logits = self._runtime.forward(cursor.ids, cursor.where, step, logits=True, last_only=False)
        self._logits = logits.float()
        self._greedy = greedy_tokens(self._logits, collectives)
        cursor.advance(self._greedy)

    def _capture(self) -> None:
        self._tried = True
        eager = self._logits, self._greedy
        self._captured, reason = capture(self._compute, self._runtime.transport, self._moving)
        self._step.transport = self._runtime.transport
        if self._captured is None:
            self._logits, self._greedy = eager
            log.warning("decode steps run launch by launch: %s", reason)
