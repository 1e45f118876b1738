"""From logits to the next tokens, the same ones on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from ringspan.attention.decode_step import Collectives
    from ringspan.cluster.messages import AnswerRequest


class Sampler:
    """One answer's choices. Its draws depend on its own seed and logits, and on nobody's beside."""

    def __init__(self, request: AnswerRequest) -> None:
        self._request = request
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        self.told = 0
        """Tokens of the answer so far."""

    @property
    def greedy(self) -> bool:
        """The next token is the likeliest one, whichever that is."""
        return self._request.temperature <= 0.0 and not self._forbidden

    @property
    def _forbidden(self) -> tuple[int, ...]:
        return self._request.stop_ids if self.told < self._request.min_tokens else ()

    def draw(self, logits: torch.Tensor) -> int:
        """logits fp32 [vocabulary] -> token id."""
        if self._forbidden:
            logits = logits.index_fill(
                0, torch.tensor(self._forbidden, device=logits.device), -math.inf
            )
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


class Logprobs(NamedTuple):
    """Of one token that was chosen."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """Likeliest tokens and theirs, the likeliest first."""


def logprobs_of(
    logits: torch.Tensor, tokens: Sequence[int], wanted: Sequence[int]
) -> list[Logprobs | None]:
    """logits fp32 [B, vocabulary] that the tokens were chosen from; wanted: alternatives of each
    row, 0 where nothing is asked for. Of temperature 1, whatever the tokens were drawn with."""
    rows = [row for row, count in enumerate(wanted) if count]
    told: list[Logprobs | None] = [None] * len(wanted)
    if not rows:
        return told
    logp = logits[rows].log_softmax(-1)
    most = min(max(wanted), logits.shape[-1])
    values, ids = logp.topk(most, -1)
    chosen = logp.gather(1, torch.tensor([[tokens[row]] for row in rows], device=logp.device))
    for row, own, top, who in zip(
        rows, chosen[:, 0].tolist(), values.tolist(), ids.tolist(), strict=True
    ):
        told[row] = Logprobs(own, tuple(zip(who, top, strict=True))[: wanted[row]])
    return told


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
