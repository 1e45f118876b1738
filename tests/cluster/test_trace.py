from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ringspan.attention.clocks import Event, Simulated
from ringspan.cluster.events import PrefillDone, PrefillProgress, PrefillResumed, PrefillTimings
from ringspan.cluster.messages import ChunkDone, Findings, PrefillPlan
from ringspan.cluster.trace import PrefillTrace, trace_of_simulated
from ringspan.errors import StoreError
from ringspan.types import Span


def chunk_done(rank: int, index: int, elapsed_s: float, exposed_s: tuple[float, ...]) -> ChunkDone:
    return ChunkDone(
        context_id="c",
        rank=rank,
        chunk_index=index,
        span=Span(512 * index, 512 * (index + 1)),
        rank_tokens=256,
        elapsed_s=elapsed_s,
        exchange_s=0.1,
        findings=Findings(exposed_s=exposed_s),
        sent_bytes=7,
        kv_bytes=9,
    )


def progress(index: int, at_s: float, ranks: tuple[ChunkDone, ...]) -> PrefillProgress:
    return PrefillProgress(
        context_id="c",
        chunk_index=index,
        num_chunks=2,
        span=Span(512 * index, 512 * (index + 1)),
        tokens_done=512 * (index + 1),
        num_tokens=1024,
        elapsed_s=at_s,
        chunk_s=max((rank.elapsed_s for rank in ranks), default=1.0),
        tokens_per_s=1.0,
        left_s=0.0,
        kv_bytes=0,
        sent_bytes=0,
        ranks=ranks,
    )


def slices(events: list[dict[str, Any]], rank: int, lane: str) -> list[dict[str, Any]]:
    return [e for e in events if e["ph"] == "X" and (e["pid"], e["cat"]) == (rank, lane)]


def test_each_rank_has_its_chunks_its_waits_and_its_pause() -> None:
    trace = PrefillTrace()
    trace.on_progress(
        progress(0, 2.0, (chunk_done(0, 0, 2.0, (0.0, 0.5)), chunk_done(1, 0, 1.5, ())))
    )
    trace.on_pause(
        PrefillResumed(
            context_id="c",
            chunk_index=1,
            num_chunks=2,
            reason="rank 1 died",
            replaced=(1,),
            recomputed_tokens=0,
            restored_pages=4,
            load_s=1.0,
            pause_s=3.0,
        )
    )
    trace.on_progress(progress(1, 6.0, (chunk_done(0, 1, 1.0, ()), chunk_done(1, 1, 1.0, ()))))
    plan = PrefillPlan(
        context_id="c", num_tokens=1024, page_tokens=128, chunk_tokens=512, layout="zigzag",
        scheme="ring", codec="raw",
    )  # fmt: skip
    timings = PrefillTimings(prefill_s=6.0, save_s=0.5)
    trace.on_done(PrefillDone(context_id="c", plan=plan, saved=True, timings=timings))
    events = trace.events()
    first, second = slices(events, 0, "compute")
    assert (first["ts"], first["dur"]) == (0.0, 1.5e6)
    assert first["name"] == "chunk 0 [0, 512)"
    (exposed,) = slices(events, 0, "exposed")
    assert (exposed["name"], exposed["ts"], exposed["dur"]) == ("step 1", 1.5e6, 0.5e6)
    assert (second["ts"], second["dur"]) == (5e6, 1e6)
    (pause,) = slices(events, 1, "pause")
    assert (pause["ts"], pause["dur"], pause["args"]["load_s"]) == (2e6, 3e6, 1.0)
    assert slices(events, 0, "pause") == []
    assert [e["ts"] for e in slices(events, 1, "write")] == [6e6]
    for rank in (0, 1):  # slices of a lane do not overlap
        for lane in ("compute", "exposed"):
            ends = 0.0
            for event in slices(events, rank, lane):
                assert event["ts"] >= ends - 1e-3
                ends = event["ts"] + event["dur"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"rank 0", "rank 1"}


def test_a_trace_file_is_what_perfetto_reads(tmp_path: Path) -> None:
    trace = PrefillTrace()
    trace.on_progress(progress(0, 2.0, ()))
    path = tmp_path / "trace.json"
    trace.write(path)
    read = msgspec.json.decode(path.read_bytes())
    assert {e["ph"] for e in read["traceEvents"]} == {"M", "X"}
    assert all(e["dur"] >= 0 for e in read["traceEvents"] if e["ph"] == "X")
    with pytest.raises(StoreError, match="cannot write the trace"):
        trace.write(tmp_path / "no" / "folder")


def test_the_simulated_clock_is_drawn_event_by_event() -> None:
    events = (
        Event(0, "attend", 0.0, 1.0, 0),
        Event(0, "send", 0.5, 0.75, 1, num_bytes=64, peer=1),
        Event(1, "wait", 0.2, 0.9, 1),
    )
    simulated = Simulated((1.0, 1.0), (0.0, 0.0), ((), ()), (64, 0), (0, 0), events)
    drawn = [e for e in trace_of_simulated(simulated) if e["ph"] == "X"]
    assert [(e["pid"], e["cat"], e["ts"], e["dur"]) for e in drawn] == [
        (0, "attend", 0.0, 1e6),
        (0, "send", 0.5e6, 0.25e6),
        (1, "wait", 0.2e6, pytest.approx(0.7e6)),
    ]
    assert drawn[1]["name"] == "send 1 to 1"
    assert drawn[1]["args"] == {"bytes": 64}
