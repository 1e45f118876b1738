"""From logits to the next token, the same one on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ringspan.attention.transport import Transport
    from ringspan.cluster.messages import AnswerRequest


class Sampler:
    """Rank 0 chooses; the others hear of it, so that rounding can never part them."""

    def __init__(self, request: AnswerRequest, transport: Transport, device: torch.device) -> None:
        self._request, self._transport, self._device = request, transport, device
        self._generator = torch.Generator("cpu").manual_seed(request.seed)

    def next(self, logits: torch.Tensor) -> int:
        """logits fp32 [vocabulary] -> token id."""
        token = torch.zeros(1, dtype=torch.int64, device=self._device)
        if self._transport.rank == 0:
            token[0] = choose(
                logits, self._request.temperature, self._request.top_p, self._generator
            )
        if self._transport.world_size > 1:
            self._transport.broadcast(token, 0)
        return int(token.item())


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
