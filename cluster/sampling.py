"""From logits to the next tokens, the same ones on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ringspan.attention.decode_step import Collectives
    from ringspan.cluster.messages import AnswerRequest


class Sampler:
    """One answer's choices. Its draws depend on its own seed and logits, and on nobody's beside."""

    def __init__(self, request: AnswerRequest) -> None:
        self._request = request
        self._generator = torch.Generator("cpu").manual_seed(request.seed)

    @property
    def greedy(self) -> bool:
        return self._request.temperature <= 0.0

    def draw(self, logits: torch.Tensor) -> int:
        """logits fp32 [vocabulary] -> token id."""
        return choose(logits, self._request.temperature, self._request.top_p, self._generator)


def greedy_tokens(logits: torch.Tensor, collectives: Collectives) -> torch.Tensor:
    """logits [B, vocabulary] -> int64 [B] on the same device: the likeliest tokens, rank 0's on
    every rank, so that rounding can never part them."""
    tokens = logits.argmax(-1)
    if collectives.world_size > 1:
        collectives.broadcast(tokens, 0)
    return tokens


def next_tokens(
    samplers: Sequence[Sampler | None],
    logits: torch.Tensor,
    greedy: torch.Tensor,
    collectives: Collectives,
) -> list[int]:
    """The next token of every row; rank 0 draws, the others hear of it.

    samplers: None for a row that is done. logits fp32 [B, vocabulary]; greedy int64 [B]: their
    `greedy_tokens`.
    """
    tokens: list[int] = greedy.tolist()
    drawing = [
        (row, sampler)
        for row, sampler in enumerate(samplers)
        if sampler is not None and not sampler.greedy
    ]
    if not drawing:
        return tokens
    if collectives.rank == 0:
        for row, sampler in drawing:
            tokens[row] = sampler.draw(logits[row])
    if collectives.world_size > 1:
        chosen = torch.tensor(tokens, dtype=torch.int64, device=greedy.device)
        collectives.broadcast(chosen, 0)
        tokens = chosen.tolist()
    return tokens


def choose(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Greedy at temperature 0; else a draw from the fewest tokens that hold `top_p` of the mass."""
    if temperature <= 0.0:
        return int(logits.argmax())
    probs, ids = torch.softmax(logits.cpu() / temperature, -1).sort(descending=True)
    kept = probs.cumsum(-1) - probs < top_p
    drawn = torch.multinomial(probs * kept, 1, generator=generator)
    return int(ids[drawn])
