"""What a codec loses: figures of one run beside the exact one. Pure functions of tensors.

    KL_i        sum over the vocabulary of p log(p / q), p of the exact run, q of the lossy one, at
                token i; in nats
    perplexity  exp of the mean of -log q(next token)
    SQNR        10 log10(|x|^2 / |x - x'|^2) in dB, of one layer's K (or V); mean over layers
                that lose anything
    attention   |o - o'| / |o| of softmax(scale q K^T) V with K' and V' in K's and V's place, for
                some queries that stand behind all the keys; median and largest over layers
    hidden      |h - h'| / |h| of the final hidden states, over all tokens

hidden  [T, hidden]  fp32, behind the model's last norm
head    [V, hidden]  fp32, the matrix that turns them into logits
k, v    [T, Hkv, D]  fp32         q [R, Hq, D]  fp32
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import torch

ROWS = 256
"""Rows of logits at once: 50 MB at a vocabulary of 49,152."""


class TokenLoss(msgspec.Struct, frozen=True, kw_only=True):
    """Over the forced tokens."""

    kl_mean: float
    """Nats."""
    kl_p99: float
    kl_max: float
    perplexity: float
    exact_perplexity: float
    same_best: float
    """Share of tokens where the likeliest next token is the exact run's."""
    hidden_error: float


class PageLoss(msgspec.Struct, frozen=True, kw_only=True):
    """Of K and V at the end of the prefill, encoded from the exact ones and decoded."""

    k_sqnr_db: float | None
    """None where no layer loses anything."""
    v_sqnr_db: float | None
    attention_error: float
    """Median over layers."""
    attention_error_max: float


class Queries(NamedTuple):
    """Of one layer, for the attention error."""

    q: torch.Tensor
    scale: float
    softcap: float
    window: int | None


def token_loss(
    exact: torch.Tensor, lossy: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor
) -> TokenLoss:
    """exact, lossy: hidden states of the tokens `token_ids` int64 [T], at least two of them."""
    if exact.shape != lossy.shape or len(exact) != len(token_ids) or len(token_ids) < 2:
        raise ValueError(
            f"hidden states {tuple(exact.shape)} and {tuple(lossy.shape)} of {len(token_ids)} "
            "tokens: expected both [T, hidden], T at least 2"
        )
    kl, nll, exact_nll, same = [], 0.0, 0.0, 0
    for rows in torch.arange(len(token_ids)).split(ROWS):
        log_p, log_q = ((h[rows] @ head.T).log_softmax(-1) for h in (exact, lossy))
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        known = rows[rows + 1 < len(token_ids)]
        after = token_ids[known + 1, None].to(log_p.device)
        exact_nll -= float(log_p[: len(known)].gather(1, after).double().sum())
        nll -= float(log_q[: len(known)].gather(1, after).double().sum())
    every, count = torch.cat(kl).double(), len(token_ids) - 1
    return TokenLoss(
        kl_mean=float(every.mean()),
        kl_p99=float(every.quantile(0.99)),
        kl_max=float(every.max()),
        perplexity=float(torch.tensor(nll / count, dtype=torch.float64).exp()),
        exact_perplexity=float(torch.tensor(exact_nll / count, dtype=torch.float64).exp()),
        same_best=same / len(token_ids),
        hidden_error=relative_error(lossy, exact),
    )


def page_loss(
    layers: Iterable[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Queries]],
) -> PageLoss:
    """Of each layer: exact (k, v), decoded (k, v), queries."""
    k_db, v_db, errors = [], [], []
    for (k, v), (k_back, v_back), queries in layers:
        k_db.append(sqnr_db(k, k_back))
        v_db.append(sqnr_db(v, v_back))
        errors.append(relative_error(attended(queries, k_back, v_back), attended(queries, k, v)))
    return PageLoss(
        k_sqnr_db=_mean(k_db),
        v_sqnr_db=_mean(v_db),
        attention_error=statistics.median(errors),
        attention_error_max=max(errors),
    )


def attended(queries: Queries, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[R, Hq, D]: the queries stand right behind the last key and see all keys in their window."""
    q, scale, softcap, window = queries
    if window is not None:
        k, v = k[-window:], v[-window:]
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # [Hq, T, D]
    scores = scale * (q.transpose(0, 1) @ k.transpose(1, 2))
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    return (scores.softmax(-1) @ v).transpose(0, 1)


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def sqnr_db(exact: torch.Tensor, x: torch.Tensor) -> float:
    """inf where nothing is lost."""
    error = relative_error(x, exact)
    return -20 * math.log10(error) if error else math.inf


def _mean(layers_db: Sequence[float]) -> float | None:
    lossy = [db for db in layers_db if not math.isinf(db)]
    return statistics.fmean(lossy) if lossy else None
