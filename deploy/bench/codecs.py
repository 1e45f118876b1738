"""What does a codec lose, beside what users would take instead, at the same bits?

    ringspan bench codecs --model smollm2 --tokens 8192 --peers-python PEERS/bin/python \
        --json rows.jsonl --markdown table.md --plots plots/

Every codec of the registry through our classes (`codec_runs`), and transformers' quantised caches
in an environment of their own (`codec_peers`): the first half of a real text is prefilled, the rest
forced through in blocks, and the final hidden states are compared with those of the exact run in
fp32 (`codec_loss`). Their first update hands back K and V unquantised and their chunks are not cut,
so that their prefill is exact where ours attends over decoded pages from its second chunk on.

Checked before anything is compared: our exact run and the one of transformers with a cache that is
not quantised give the same hidden states within float error; K and V that a peer hands back are of
the right shape.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from ringspan.attention.models.load import load_model, pretrained_location
from ringspan.deploy.bench.codec_loss import PageLoss, TokenLoss, page_loss, token_loss
from ringspan.deploy.bench.codec_needles import NeedleCount, Needles
from ringspan.deploy.bench.codec_peers import CACHES, EXACT_PEER, PeerJob, load_arrays, run_peers
from ringspan.deploy.bench.codec_runs import (
    Bits,
    Exact,
    Forced,
    Model,
    Protocol,
    codec_run,
    exact_run,
    mean_bits,
    round_trip,
)
from ringspan.deploy.machine import Hardware, hardware, versions
from ringspan.errors import RingspanError
from ringspan.specs import ModelSpec

SAME = 1e-3
"""Of |h - h'| / |h|: our exact run and transformers' are both fp32 and differ in the order of
sums; a smollm2 gives 2e-6, the retriever, whose scores are in the thousands, 1e-4."""


class CodecRow(msgspec.Struct, frozen=True, kw_only=True):
    """One codec or cache."""

    benchmark: str = "codecs"
    command: str
    system: str
    """`ringspan` or `transformers`."""
    codec: str
    tail: str
    """What of the forced tokens is not encoded: `raw` all, `sealed` the open page; of the peers
    `residual` fewer than 128, or `none`."""
    model: str
    text: str
    """What the tokens are."""
    protocol: Protocol
    bits: Bits
    loss: TokenLoss
    pages: PageLoss | None
    needles: tuple[NeedleCount, ...]
    seconds: float
    device: str
    hardware: Hardware
    versions: dict[str, str]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run of the benchmark."""

    model: str
    protocol: Protocol
    codecs: tuple[str, ...]
    margins: tuple[float, ...]
    peers_python: Path | None
    device: str
    threads: int
    text: str
    command: str


def bench_codecs(asked: Asked, token_ids: np.ndarray) -> Iterator[CodecRow]:
    """A row for each codec and tail, then for each peer, as they come.

    token_ids int32 [protocol.tokens]. Raises RingspanError where exact runs differ.
    """
    with tempfile.TemporaryDirectory(prefix="ringspan-codecs-") as folder:
        scratch = Path(folder)
        needles = Needles(asked.margins, asked.protocol, asked.device, asked.threads, scratch)
        model = Model(asked.model, asked.device, asked.threads)
        try:
            asked.protocol.check(model.page_tokens)
            exact = exact_run(model, asked.protocol, token_ids)
            compare = _Comparison(asked, model, exact, token_ids)
            for name in asked.codecs:
                pages = compare.pages(round_trip(model, exact, name))
                found = needles.of_codec(name)
                for tail in ("sealed", "raw"):
                    run = codec_run(model, asked.protocol, token_ids, name, sealed=tail == "sealed")
                    yield compare.row("ringspan", name, tail, run, pages, found)
            if asked.peers_python is not None:
                yield from _peer_rows(asked, compare, needles, scratch)
        finally:
            model.close()


def _peer_rows(
    asked: Asked, compare: _Comparison, needles: Needles, scratch: Path
) -> Iterator[CodecRow]:
    assert asked.peers_python is not None
    found = needles.of_peers(asked.peers_python, CACHES)
    ids = scratch / "ids.npy"
    np.save(ids, compare.token_ids)
    job = PeerJob(
        model=_folder(asked.model, scratch / "model"),
        token_ids=str(ids),
        prefill=asked.protocol.prefill,
        block=asked.protocol.block,
        caches=CACHES,
        out=str(scratch),
        keep_kv=True,
        threads=asked.threads,
    )
    for done in run_peers(asked.peers_python, job):
        hidden, kv = load_arrays(job, done.cache)
        assert kv is not None
        run = Forced(torch.from_numpy(hidden), mean_bits(list(done.bits)), done.seconds)
        if done.cache == EXACT_PEER:
            compare.check_exact(run)
        back = ((torch.from_numpy(k), torch.from_numpy(v)) for k, v in map(np.array, kv))
        tail = {EXACT_PEER: "none", "fp8": "none"}.get(done.cache, "residual")
        yield compare.row(
            "transformers", done.cache, tail, run, compare.pages(back), found[done.cache]
        )
        for path in scratch.glob(f"{done.cache}.*.npy"):
            path.unlink()


class _Comparison:
    """The exact run, and what others are beside it."""

    def __init__(self, asked: Asked, model: Model, exact: Exact, token_ids: np.ndarray) -> None:
        self._asked, self._exact = asked, exact
        self._head = model.head
        self._device = str(model.runtime.device)
        self.token_ids = token_ids

    def pages(self, back: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> PageLoss:
        """back: K and V of each layer as the codec or cache gives them back."""
        exact = self._exact
        return page_loss(
            (kv, tuple(x.to(kv[0].device) for x in lossy), queries)
            for kv, lossy, queries in zip(exact.kv, back, exact.queries, strict=True)
        )

    def check_exact(self, run: Forced) -> None:
        error = float((run.hidden - self._exact.forced.hidden).norm() / run.hidden.norm())
        if not error < SAME:
            raise RingspanError(
                f"bench codecs: transformers' final hidden states without quantisation differ from "
                f"ours by {error:.1e} of their size, wanted less than {SAME:g}: nothing is compared"
            )

    def row(
        self,
        system: str,
        name: str,
        tail: str,
        run: Forced,
        pages: PageLoss | None,
        needles: tuple[NeedleCount, ...],
    ) -> CodecRow:
        asked = self._asked
        forced_ids = torch.from_numpy(self.token_ids[asked.protocol.prefill :].astype(np.int64))
        return CodecRow(
            command=asked.command,
            system=system,
            codec=name,
            tail=tail,
            model=asked.model,
            text=asked.text,
            protocol=asked.protocol,
            bits=run.bits,
            loss=token_loss(self._exact.forced.hidden, run.hidden, self._head, forced_ids),
            pages=pages,
            needles=needles,
            seconds=run.seconds,
            device=self._device,
            hardware=hardware(),
            versions=versions(),
        )


def _folder(name: str, scratch: Path) -> str:
    """Where the peers load the model from, weights in fp32 as ours."""
    location = pretrained_location(name)
    if location is not None and Path(location).is_dir():
        return location
    loaded = load_model(ModelSpec(name=name, dtype="float32"), torch.device("cpu"))
    loaded.model.save_pretrained(scratch)
    return str(scratch)


def append(row: CodecRow, path: Path) -> None:
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")


def read(path: Path) -> list[CodecRow]:
    """Rows that `append` wrote."""
    return [msgspec.json.decode(line, type=CodecRow) for line in path.read_bytes().splitlines()]


def at_equal_bits(rows: Sequence[CodecRow], slack: float = 0.1) -> list[tuple[CodecRow, CodecRow]]:
    """(peer, ours) for every quantised cache. Ours is the sealed codec of the least KL among those
    of at most the peer's bits and `slack` more, both means over the run; a peer for which there is
    none is left out."""
    ours = [row for row in rows if row.system == "ringspan" and row.tail == "sealed"]
    pairs = []
    for peer in rows:
        if peer.system == "ringspan" or peer.codec == EXACT_PEER:
            continue
        fitting = [row for row in ours if row.bits.mean <= peer.bits.mean + slack]
        if fitting:
            pairs.append((peer, min(fitting, key=lambda row: row.loss.kl_mean)))
    return pairs
