from __future__ import annotations

from ringspan.cluster.board import MOST_REPORTS, SILENT_S, Board, Report, Reporter
from ringspan.cluster.events import PrefillPaused, PrefillProgress, PrefillResumed
from ringspan.types import Span


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def progress(index: int) -> PrefillProgress:
    return PrefillProgress(
        context_id="c",
        chunk_index=index,
        num_chunks=4,
        span=Span(128 * index, 128 * (index + 1)),
        tokens_done=128 * (index + 1),
        num_tokens=512,
        elapsed_s=1.0,
        tokens_per_s=128.0,
        left_s=3.0,
        kv_bytes=1,
        sent_bytes=0,
    )


def test_a_report_that_is_not_renewed_is_gone() -> None:
    clock = Clock()
    board = Board(clock)
    board.put(Report(source="b:2", command="old"))
    clock.now_s = SILENT_S - 1
    board.put(Report(source="a:1", command="new"))
    assert [(seen.report.source, seen.age_s) for seen in board.look()] == [
        ("a:1", 0.0),
        ("b:2", SILENT_S - 1),
    ]
    clock.now_s = SILENT_S + 1
    assert [seen.report.source for seen in board.look()] == ["a:1"]
    board.end("a:1")
    board.end("a:1")
    assert board.look() == ()


def test_the_board_takes_only_so_many() -> None:
    board = Board(Clock())
    for number in range(MOST_REPORTS + 5):
        board.put(Report(source=f"{number}", command="x"))
    board.put(Report(source="0", command="still heard"))
    assert len(board.look()) == MOST_REPORTS
    assert board.look()[0].report.command == "still heard"


def test_a_reporter_is_sparing_but_tells_faults_and_the_end_at_once() -> None:
    clock, told, gone = Clock(), [], []
    reporter = Reporter(Report(source="a:1", command="x"), told.append, gone.append, clock)
    assert len(told) == 1
    for index in range(3):
        reporter.on_progress(progress(index))
    assert len(told) == 1
    clock.now_s = 1.0
    reporter.on_progress(progress(2))
    assert told[-1].prefill is not None
    assert told[-1].prefill.tokens_done == 384
    paused = PrefillPaused(context_id="c", chunk_index=3, num_chunks=4, reason="rank 1 died")
    reporter.on_pause(paused)
    assert (told[-1].faults, told[-1].last_fault) == (1, "rank 1 died")
    assert told[-1].prefill is not None
    assert told[-1].prefill.paused == "rank 1 died"
    reporter.on_pause(
        PrefillResumed(
            context_id="c", chunk_index=3, num_chunks=4, reason="rank 1 died", replaced=(1,),
            recomputed_tokens=0, restored_pages=0, load_s=0.0, pause_s=1.0,
        )
    )  # fmt: skip
    assert told[-1].prefill is not None
    assert (told[-1].prefill.paused, told[-1].faults) == ("", 1)
    reporter.on_progress(progress(3))
    assert told[-1].prefill is not None
    assert told[-1].prefill.tokens_done == 512
    reporter.end()
    assert gone == ["a:1"]


def test_a_run_goes_on_where_nobody_takes_its_reports() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("Ray is away")

    reporter = Reporter(Report(source="a:1", command="x"), broken, broken, Clock())
    reporter.on_progress(progress(3))
    reporter.end()
