"""The needle run: plant keys and values, prefill over a gang, ask every key.

The retriever's weights are constructed so that each answer is exact at any length; a page that is
lost, misplaced or damaged on any road is a missed needle.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import numpy as np

from ringspan.attention.models.facts import prefill_flops
from ringspan.attention.models.needles import Haystack, plant
from ringspan.cluster.controller import Controller
from ringspan.cluster.gang import Gang
from ringspan.cluster.messages import GangSpec
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.stored import Description
from ringspan.deploy.gangs import open_gang, open_ray
from ringspan.deploy.progress import bytes_words, meter
from ringspan.deploy.record import Needles, RunRecord, prefilled
from ringspan.kvstore.folder import Store

LINK_GPU_BYTES, LINK_CPU_BYTES = 2**28, 2**24
LINK_REPEATS = 5


def run_needles(
    record: RunRecord,
    spec: GangSpec,
    wanted: PrefillOptions,
    *,
    num_tokens: int,
    num_needles: int,
    seed: int,
    local: bool,
    store: Path | None,
    reopen_ranks: int | None,
) -> Needles:
    """With a store the context is saved, the gang ended, and a new one of `reopen_ranks` ranks
    opens it; the context is then removed. Figures go into the record."""
    haystack = plant(num_tokens, num_needles, seed)
    folder = None if store is None else Store(store)
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_ray(local))
        gang = _started(record, "start", spec, local, stack)
        record.ranks = gang.ready
        _measure_link(record, gang)
        controller = Controller(gang, folder)
        name = _prefill(record, controller, haystack, wanted)
        if folder is not None:
            stack.callback(_remove, folder, name)
            controller.close()
            again = msgspec.structs.replace(spec, world_size=reopen_ranks or spec.world_size)
            controller = Controller(_started(record, "restart", again, local, stack), folder)
            with record.phase("open"):
                controller.open(name)
        with record.phase("ask"):
            answers = _ask_all(controller, name, haystack)
    missed = np.flatnonzero(np.asarray(answers) != haystack.values)
    return Needles(
        tokens=num_tokens,
        planted=num_needles,
        found=num_needles - len(missed),
        missed_positions=tuple(int(haystack.positions[i]) for i in missed),
    )


def tell_link(record: RunRecord, spec: GangSpec, local: bool) -> None:
    """The gang's link without any needles."""
    with open_ray(local), open_gang(spec, local) as gang:
        record.ranks = gang.ready
        _measure_link(record, gang)


def _measure_link(record: RunRecord, gang: Gang) -> None:
    """GB/s of one ring exchange, per direction and rank; the slowest rank's median."""
    if gang.world_size == 1:
        return
    ready = gang.ready[0]
    num_bytes = LINK_CPU_BYTES if ready.device == "cpu" else LINK_GPU_BYTES
    taken = gang.call(
        "measure_link", num_bytes, LINK_REPEATS, timeout_s=60.0, what="measuring the link"
    )
    speed = record.measured["link_gb_per_s"] = float(num_bytes / max(taken) / 1e9)
    print(f"speed      {'link_gb_per_s':24} {speed:,.3g}  ({ready.transport})", flush=True)


def _started(
    record: RunRecord, phase: str, spec: GangSpec, local: bool, stack: contextlib.ExitStack
) -> Gang:
    with record.phase(phase):
        return stack.enter_context(open_gang(spec, local))


def _prefill(
    record: RunRecord, controller: Controller, haystack: Haystack, wanted: PrefillOptions
) -> str:
    num_tokens = len(haystack.token_ids)
    with meter(
        "prefill", num_tokens, work=lambda tokens: prefill_flops(controller.facts, tokens)
    ) as progress:
        done = controller.prefill(
            haystack.token_ids,
            wanted,
            description=Description(title="needles of ringspan doctor"),
            on_event=lambda event: progress.update(
                event.tokens_done, f"KV {bytes_words(event.kv_bytes)}"
            ),
            again=True,
        )
    record.context_id, record.plan = done.context_id, done.plan
    record.add_phase("prefill", done.timings.prefill_s)
    record.add_phase("save", done.timings.save_s)
    record.prefill = prefilled(done, record.ranks)
    return done.context_id


def _ask_all(controller: Controller, name: str, haystack: Haystack) -> list[int]:
    """The token that follows each key, in a session of its own."""
    answers: list[int] = []
    with meter("ask", len(haystack.keys), "needles") as progress:
        for key in haystack.keys:
            session = controller.begin_session(name)
            [answer] = controller.ask(session, name, (int(key),), max_tokens=1)
            controller.end_session(session)
            answers.append(answer.token_id)
            progress.update(len(answers))
    return answers


def _remove(folder: Store, name: str) -> None:
    if name in folder.ids():
        folder.remove(name)
