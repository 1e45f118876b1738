"""What a command leaves for those who look at it: a trace, metrics, decisions, the status board."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ringspan.deploy.record import RunRecord
from ringspan.errors import BadInput

if TYPE_CHECKING:
    from ringspan.cluster.board import Reporter
    from ringspan.cluster.events import PauseEvent, PrefillDone, PrefillProgress
    from ringspan.cluster.messages import PrefillPlan, RankReady

log = logging.getLogger(__name__)


class Watching:
    """One prefill's onlookers. trace, metrics, decisions: files to write, or None."""

    def __init__(
        self,
        trace: Path | None,
        metrics: Path | None,
        decisions: Path | None,
        reporter: Reporter | None,
    ) -> None:
        from ringspan.cluster.metrics import DecisionLog, Metrics
        from ringspan.cluster.slow import SlowRanks
        from ringspan.cluster.trace import PrefillTrace

        self._trace_path, self._metrics_path = trace, metrics
        self._trace, self.metrics, self._reporter = PrefillTrace(), Metrics(), reporter
        self._slow = SlowRanks()
        self._log = None if decisions is None else DecisionLog(decisions, metrics=self.metrics)

    def planned(self, plan: PrefillPlan) -> None:
        """The plan is a decision; the prefill begins."""
        self.metrics.prefill_began()
        if self._log is not None:
            self._log.write("plan", plan.context_id, plan)

    def on_event(self, event: PrefillProgress) -> None:
        self._trace.on_progress(event)
        self.metrics.prefill_progress(event)
        self._paces(event)
        if self._reporter is not None:
            self._reporter.on_progress(event)

    def _paces(self, event: PrefillProgress) -> None:
        """A rank that holds up the others is told by name: a gang's own pace does not show it."""
        changed = self._slow.add(event.ranks)
        self.metrics.paces(self._slow.ratios, len(self._slow.slow))
        for rank in changed:
            if rank.rank in self._slow.slow:
                log.warning(
                    "rank %d is slow: busy %.1f times as long a token as the median rank, in chunk "
                    "%d of context %s", rank.rank, rank.ratio, rank.chunk_index, event.context_id
                )  # fmt: skip
            if self._log is not None:
                self._log.write("slow", event.context_id, rank._asdict())

    def on_pause(self, event: PauseEvent) -> None:
        self._trace.on_pause(event)
        self.metrics.prefill_paused(event)
        if self._log is not None:
            self._log.write("fault", event.context_id, event)
        if self._reporter is not None:
            self._reporter.on_pause(event)

    def ended(self, done: PrefillDone) -> None:
        self._trace.on_done(done)
        self.metrics.prefill_ended(done)

    def failed(self, context_id: str, error: BaseException) -> None:
        self.metrics.prefill_failed(context_id, error)

    def write(self) -> None:
        """The files; whatever became of the prefill."""
        from ringspan.cluster.metrics import write_metrics

        if self._trace_path is not None:
            self._trace.write(self._trace_path)
        if self._metrics_path is not None:
            write_metrics(self.metrics, self._metrics_path)


@contextmanager
def watching(
    record: RunRecord,
    ranks: Sequence[RankReady],
    plan: PrefillPlan,
    *,
    local: bool,
    trace: Path | None = None,
    metrics: Path | None = None,
    decisions: Path | None = None,
) -> Iterator[Watching]:
    """Around a prefill of this plan. local: there is no Ray to report to."""
    reporter = None if local else _reporter(record, ranks)
    watch = Watching(trace, metrics, decisions, reporter)
    watch.planned(plan)
    try:
        yield watch
    except BaseException as error:
        watch.failed(plan.context_id, error)
        raise
    finally:
        if reporter is not None:
            reporter.end()
        watch.write()


def check_files(
    trace: Path | None = None, metrics: Path | None = None, decisions: Path | None = None
) -> None:
    """BadInput for a file that could not be written, before the run rather than after it."""
    for option, path in (("--trace", trace), ("--metrics", metrics), ("--decisions", decisions)):
        if path is None:
            continue
        if path.is_dir():
            raise BadInput(f"{option} {path} is a folder; wanted a file")
        if not path.parent.is_dir():
            raise BadInput(f"{option} {path}: there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise BadInput(f"{option} {path}: no right to write in {path.parent}")


def _reporter(record: RunRecord, ranks: Sequence[RankReady]) -> Reporter | None:
    """To the cluster's board; None where there is none to be had."""
    from ringspan.cluster.board import Report
    from ringspan.cluster.board_actor import ray_reporter

    report = Report(
        source=f"{socket.gethostname()}:{os.getpid()}",
        command=record.command,
        model=str(record.asked.get("model") or ""),
        ranks=tuple(f"{rank.device} of {rank.host}" for rank in ranks),
        transport=ranks[0].transport if ranks else "",
    )
    with suppress(Exception):  # nothing depends on it
        return ray_reporter(report)
    return None
