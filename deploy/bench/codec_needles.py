"""Needles at a narrow margin: how fine a noise on K makes a retrieved value wrong.

The retriever (attention/models/retriever.py) finds a value by matching its key's code with K in
half of the dimensions; in the others its queries are zero. Its own margin adds to K what is the
same for all tokens, and a codec that takes a page's mean off is not disturbed by it at all. So here
the other half of K is filled with what differs from token to token, the token's own code turned by
the same rotation, `clutter` times as large:

    k = (R previous_code, clutter R current_code)      q = (R code, 0)
    clutter = sqrt(1 - margin^2) / margin              margin: the matched share of |k|

Exact scores are those without clutter; noise of relative size e on K is e / margin of what is
matched. The needle is missed where 64 codes' worth of match no longer stands out of it. Real keys
are like that: most of a key does not concern the query at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ringspan.attention.models.load import load_model
from ringspan.attention.models.needles import plant
from ringspan.attention.models.retriever import CODE
from ringspan.deploy.bench.codec_peers import Options, PeerJob, load_arrays, run_peers
from ringspan.deploy.bench.codec_runs import Model, Protocol, codec_run
from ringspan.specs import ModelSpec

MARGINS = (1.0, 0.25, 0.0625, 0.03125, 0.015625, 0.00390625)
NEEDLES = 256
RETRIEVER = "retriever:q=4,kv=2"


class NeedleCount(msgspec.Struct, frozen=True, kw_only=True):
    margin: float
    found: int
    planted: int


class Needles:
    """Keys are the forced tokens, behind the haystack, and each one's value must be the likeliest
    next token. The tail is raw for all."""

    def __init__(
        self,
        margins: tuple[float, ...],
        protocol: Protocol,
        device: str,
        threads: int,
        scratch: Path,
    ) -> None:
        self._margins, self._device, self._threads = margins, device, threads
        self._scratch = scratch
        haystack = protocol.prefill
        self._hay = plant(haystack, min(NEEDLES, haystack // 16))
        self._ids = np.concatenate((self._hay.token_ids, self._hay.keys)).astype(np.int32)
        self._protocol = msgspec.structs.replace(protocol, tokens=len(self._ids))

    def of_codec(self, name: str) -> tuple[NeedleCount, ...]:
        """At each margin."""
        if not self._margins:
            return ()
        found = []
        model = Model(RETRIEVER, self._device, self._threads)
        try:
            for margin in self._margins:
                add_clutter(model.transformer, margin)
                run = codec_run(model, self._protocol, self._ids, name, sealed=False)
                found.append(self._count(margin, run.hidden, model.head))
        finally:
            model.close()
        return tuple(found)

    def of_peers(
        self, python: Path, caches: Mapping[str, Options]
    ) -> dict[str, tuple[NeedleCount, ...]]:
        """Each cache's counts, at each margin."""
        found: dict[str, tuple[NeedleCount, ...]] = dict.fromkeys(caches, ())
        if not self._margins:
            return found
        ids = self._scratch / "needles.npy"
        np.save(ids, self._ids)
        spec = ModelSpec(name=RETRIEVER, dtype="float32")
        model = load_model(spec, torch.device("cpu")).model
        head = model.get_output_embeddings().weight.detach()
        for margin in self._margins:
            add_clutter(model, margin)
            folder = self._scratch / "retriever"
            model.save_pretrained(folder)
            job = PeerJob(
                model=str(folder),
                token_ids=str(ids),
                prefill=self._protocol.prefill,
                block=self._protocol.block,
                caches=dict(caches),
                out=str(self._scratch),
                keep_kv=False,
                threads=self._threads,
            )
            for done in run_peers(python, job):
                hidden, _ = load_arrays(job, done.cache)
                count = self._count(margin, torch.from_numpy(hidden), head)
                found[done.cache] += (count,)
        return found

    def _count(self, margin: float, hidden: torch.Tensor, head: torch.Tensor) -> NeedleCount:
        best = (hidden @ head.T).argmax(-1).numpy()
        return NeedleCount(
            margin=margin,
            found=int((best == self._hay.values).sum()),
            planted=len(self._hay.values),
        )


def add_clutter(model: Any, margin: float) -> None:
    """In the dimensions of K that no query of the retriever's second layer reads; whatever clutter
    was there is replaced."""
    clutter = math.sqrt(1.0 - margin**2) / margin
    attention = model.model.layers[1].self_attn
    read = attention.q_proj.weight[: attention.head_dim].abs().sum(1) > 0  # [D]
    current, previous = slice(0, CODE), slice(CODE, 2 * CODE)  # parts of the residual stream
    with torch.inference_mode(False), torch.no_grad():
        for head in attention.k_proj.weight.view(-1, attention.head_dim, model.config.hidden_size):
            matched = head[read, previous]
            head[~read, current] = clutter * matched
