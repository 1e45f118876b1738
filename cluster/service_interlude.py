"""What a service lets in between two chunks of a long prefill."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ringspan.cluster.service_jobs import Work
from ringspan.errors import RankLost

if TYPE_CHECKING:
    from ringspan.cluster.service_engine import Engine

LEAST_PLAY_S = 0.05
"""That an interlude lasts at least if there is work for it."""


class ServiceInterlude:
    """See `prefill_task.Interlude`."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self._engine, self._work = engine, work

    def wanted(self) -> bool:
        engine = self._engine
        return bool(
            engine.commands
            or engine.answering.jobs
            or any(job.unwanted or job.work == self._work.key for job in engine.waiting.jobs)
            or engine.next(self._work) is not None
        )

    def play(self) -> None:
        """As long as a chunk takes: answers and the prefill have half of the time each."""
        engine, work = self._engine, self._work
        until = time.monotonic() + max(LEAST_PLAY_S, work.chunk_s)
        while True:
            try:
                engine.sweep()
                if (job := engine.next(work)) is not None:
                    engine.begin(job, work)
                engine.answering.slice()
            except RankLost as error:
                engine.lose_answers(error)
                raise
            if time.monotonic() >= until or not self.wanted():
                return
