"""How fast is a prefill, beside the transformers model in one process on the same tokens?

    ringspan bench prefill --model smollm2 --tokens 2048,8192 --ranks 1,2 --json rows.jsonl

First the answer is checked: the token that follows must be the one transformers gives (or one whose
logit is as large within float error). Then both run in turn, `--repeats` times; one JSON row each
with minimum, median and maximum, and the ratio pair by pair. On a CPU the one process gets as many
threads as all the ranks together.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

import ringspan
from ringspan.attention.models.facts import prefill_flops
from ringspan.cluster.controller import Controller
from ringspan.cluster.messages import Findings, GangSpec, ModelFacts, PrefillPlan, RankReady
from ringspan.cluster.planner import PrefillOptions
from ringspan.deploy.bench.baseline import Baseline, BaselineSpec
from ringspan.deploy.gangs import open_gang, open_ray
from ringspan.deploy.machine import Hardware, hardware, versions
from ringspan.errors import RingspanError

BASELINE_TIMEOUT_S = 3600.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case. Times in seconds; the ratio is ringspan's time over transformers', pair by pair."""

    benchmark: str = "prefill"
    command: str
    tokens: int
    repeats: int
    min_s: float
    median_s: float
    max_s: float
    tokens_per_s: float
    tflops_per_s: float
    all_s: tuple[float, ...]
    baseline_s: tuple[float, ...] = ()
    median_ratio: float | None = None
    predicted_s: float | None = None
    """By the plan, of the last run; None where speeds were not measured."""
    findings: Findings = Findings()
    """Of the last run."""
    plan: PrefillPlan
    facts: ModelFacts
    ranks: tuple[RankReady, ...]
    hardware: Hardware
    versions: dict[str, str]

    @property
    def devices(self) -> int:
        """Loopback ranks share one."""
        return 1 if self.ranks[0].transport == "loopback" else len(self.ranks)


def bench_prefill(
    specs: Sequence[GangSpec],
    options: PrefillOptions,
    schemes: Sequence[str],
    lengths: Sequence[int],
    token_ids: np.ndarray,
    *,
    repeats: int,
    baseline: bool,
    local: bool,
    command: str,
) -> Iterator[Row]:
    """Every gang, length and scheme, one row each, as they come.

    token_ids int32 [n + 1], n the largest of `lengths`: of each length so many are prefilled, and
    the next one is asked with. A gang is started once, and the transformers model once a length.
    """
    with open_ray(local):
        for spec in specs:
            with open_gang(spec, local) as gang:
                controller = Controller(gang)
                for length in lengths:
                    ids = token_ids[: length + 1]
                    started = _Peer(spec, gang.ready, ids) if baseline else contextlib.nullcontext()
                    with started as peer:
                        for scheme in schemes:
                            asked = msgspec.structs.replace(options, scheme=scheme)
                            yield _row(controller, gang.ready, asked, ids, peer, repeats, command)


def _row(
    controller: Controller,
    ready: tuple[RankReady, ...],
    options: PrefillOptions,
    token_ids: np.ndarray,
    peer: _Peer | None,
    repeats: int,
    command: str,
) -> Row:
    context, question = token_ids[:-1], (int(token_ids[-1]),)
    times: list[float] = []
    theirs: list[float] = []
    for repeat in range(repeats + 1):  # the first one warms up, and is checked
        done = controller.prefill(context, options, reuse=False)
        if repeat == 0:
            session = controller.begin_session(done.context_id)
            [answer] = controller.ask(session, done.context_id, question, max_tokens=1)
            if peer is not None:
                peer.check(answer.token_id)
        else:
            times.append(done.timings.prefill_s)
        if peer is not None and (took := peer.run()) and repeat:
            theirs.append(took)
    controller.drop(done.context_id)
    median_s = statistics.median(times)
    return Row(
        command=command,
        tokens=len(context),
        repeats=repeats,
        min_s=min(times),
        median_s=median_s,
        max_s=max(times),
        tokens_per_s=len(context) / median_s,
        tflops_per_s=prefill_flops(controller.facts, len(context)) / median_s / 1e12,
        all_s=tuple(times),
        baseline_s=tuple(theirs),
        median_ratio=_median_ratio(times, theirs),
        predicted_s=done.plan.predicted_s or None,
        findings=done.findings,
        plan=done.plan,
        facts=controller.facts,
        ranks=ready,
        hardware=hardware(),
        versions=versions(),
    )


def _median_ratio(times: Sequence[float], theirs: Sequence[float]) -> float | None:
    if not theirs:
        return None
    return statistics.median(a / b for a, b in zip(times, theirs, strict=True))


class _Peer:
    """The transformers model in a process of its own, which answers a line with a line."""

    def __init__(self, spec: GangSpec, ready: Sequence[RankReady], token_ids: np.ndarray) -> None:
        threads = spec.threads * spec.world_size or os.cpu_count() or 1
        self._asked = BaselineSpec(
            model=spec.model,
            device=ready[0].device,
            threads=threads,
            token_ids=tuple(token_ids.tolist()),
        )

    def __enter__(self) -> _Peer:
        # The process finds the package where this one found it, installed or not.
        paths = [str(Path(ringspan.__file__).resolve().parent.parent)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ringspan.deploy.bench.baseline"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            self._first = self._ask(msgspec.json.encode(self._asked))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def check(self, token_id: int) -> None:
        """Refuses to time what is wrong."""
        best = self._first.logits
        if token_id not in best:
            raise RingspanError(
                f"bench prefill: ringspan's next token is {token_id}, transformers' is one of "
                f"{sorted(best)}: no time is reported for a wrong answer"
            )

    def run(self) -> float:
        return self._ask(b"again").elapsed_s

    def _ask(self, line: bytes) -> Baseline:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RingspanError(
                f"bench prefill: the transformers process ended with {process.wait(10)}"
            )
        return msgspec.json.decode(answer, type=Baseline)
