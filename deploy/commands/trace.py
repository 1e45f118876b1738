"""`ringspan trace`: the record of a run (`--json`) as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ringspan.deploy.record import RunRecord, read_record
from ringspan.deploy.watching import check_files
from ringspan.errors import BadInput

Record = Annotated[Path, typer.Argument(help="A record that a command wrote with --json.")]
Output = Annotated[Path, typer.Argument(help="The trace to write.")]


def trace(record: Record, output: Output) -> None:
    """Draw a run: its phases, and the chunks of its prefill by the slowest rank (what each rank did
    is in `ringspan prefill --trace FILE`)."""
    from ringspan.cluster.trace import write_trace

    check_files(trace=output)
    try:
        run = read_record(record)
    except OSError as error:
        raise BadInput(f"cannot read the record {record}: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise BadInput(f"{record} is no record of a run: {error}") from None
    events = trace_of_record(run)
    if len(events) <= 1:
        raise BadInput(f"{record} has no phases to draw: it ended with {run.outcome}")
    write_trace(events, output)
    print(f"{len(events)} events in {output}: open it with https://ui.perfetto.dev", flush=True)


def trace_of_record(run: RunRecord) -> list[dict[str, Any]]:
    """Phases one behind the other; under `prefill` its chunks, with what was predicted of them."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": run.command}}
    ]
    at_s = 0.0
    for phase in run.phases:
        events.append(_slice(0, phase.name, at_s, phase.elapsed_s, {}))
        if phase.name == "prefill" and run.prefill is not None:
            events += _chunks(run, at_s)
        at_s += phase.elapsed_s
    return events


def _chunks(run: RunRecord, at_s: float) -> list[dict[str, Any]]:
    assert run.prefill is not None
    spans = run.plan.chunks if run.plan is not None else ()
    predicted = dict(enumerate(run.prefill.predicted_chunk_s))
    found = []
    for index, seconds in enumerate(run.prefill.chunk_s):
        args: dict[str, float] = {"predicted_s": predicted.get(index, 0.0)}
        name = f"chunk {index}"
        if index < len(spans):
            name += f" [{spans[index].start}, {spans[index].stop})"
        found.append(_slice(1, name, at_s, seconds, args))
        at_s += seconds
    return found


def _slice(
    lane: int, name: str, at_s: float, length_s: float, args: dict[str, float]
) -> dict[str, Any]:
    return {
        "name": name, "cat": "run", "ph": "X", "ts": at_s * 1e6, "dur": length_s * 1e6,
        "pid": 0, "tid": lane, "args": args,
    }  # fmt: skip
