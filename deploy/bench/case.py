"""One case of `bench attention`: what is attended to, by which scheme and how many ranks. Pure."""

from __future__ import annotations

import msgspec

from ringspan.attention.kv import PLAIN
from ringspan.attention.layout import Deal, deal
from ringspan.attention.problem import Problem, Source
from ringspan.attention.schemes.table import SCHEMES, why_not
from ringspan.types import Span, coalesce, page_tokens_for

TORCH_SCHEMES = {"torch-all-gather": "allgather", "torch-all-to-all": "alltoall"}
"""torch's context_parallel and the rotations it has, named beside our schemes."""


class AttentionCase(msgspec.Struct, frozen=True, kw_only=True):
    """One layer's attention of `tokens` new tokens behind `cached` ones."""

    tokens: int
    cached: int = 0
    ranks: int = 1
    scheme: str = "ring"
    transport: str = "loopback"
    """`nccl`, `copy-engine`, `gloo` or `loopback`."""
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    layout: str = "zigzag"
    causal: bool = True
    window: int | None = None
    dtype: str = "bfloat16"
    backend: str = "auto"
    """Of the engine; the kernel it is compared with is always the fastest there is."""
    repeats: int = 5
    seed: int = 0

    @property
    def keys(self) -> int:
        return self.cached + self.tokens

    @property
    def devices(self) -> int:
        """Loopback ranks share one."""
        return 1 if self.transport == "loopback" else self.ranks

    @property
    def text(self) -> str:
        cached = f" on {self.cached:,} cached" if self.cached else ""
        ranks = f"{self.ranks} rank{'s' * (self.ranks != 1)}"
        return f"{self.tokens:,} tokens{cached}, {ranks}, {self.scheme}"

    def dealt(self) -> Deal:
        """The new tokens of each rank. torch deals by its own head-tail rule, token by token."""
        if self.scheme not in TORCH_SCHEMES:
            page_tokens = page_tokens_for(self.head_dim)
            return deal(self.layout, Span(self.cached, self.keys), self.ranks, page_tokens)
        part = self.tokens // (2 * self.ranks)
        ends = [(rank, 2 * self.ranks - 1 - rank) for rank in range(self.ranks)]
        return tuple(coalesce(Span(i * part, (i + 1) * part) for i in two) for two in ends)

    def problem(self) -> Problem:
        """The cached tokens were dealt as one chunk before; a rank's keys are one block, as an
        exact codec keeps them."""
        dealt = self.dealt()
        page_tokens = page_tokens_for(self.head_dim)
        cached = deal(self.layout, Span(0, self.cached), self.ranks, page_tokens)
        held = tuple(coalesce((*old, *new)) for old, new in zip(cached, dealt, strict=True))
        return Problem([dealt], [Source(held, PLAIN)], self.causal)

    def flops(self) -> float:
        """Two matrix products over every pair of a query and a key that it sees."""
        problem = self.problem()
        pairs = sum(problem.pairs(rank, self.window) for rank in range(self.ranks))
        return 4.0 * self.num_q_heads * self.head_dim * pairs

    def why_not(self) -> str | None:
        """The reason why the scheme cannot take the case at all, or None."""
        if self.scheme in SCHEMES:
            return why_not(self.scheme, self.num_q_heads, self.num_kv_heads, self.ranks)
        if self.transport != "nccl":
            return (
                "torch's context_parallel dispatches CUDA attention between real ranks only, this "
                f"is {self.transport}"
            )
        if self.ranks < 2:
            return "torch's context_parallel wants at least 2 ranks"
        if not self.causal or self.cached or self.window is not None:
            return "torch's context_parallel balances plain causal attention only"
        if self.tokens % (2 * self.ranks):
            return f"torch's context_parallel wants tokens in multiples of {2 * self.ranks}"
        return None
