"""What share of the link does a hand-off between gangs reach?

    python -m ringspan.deploy.bench.handoff --senders 1 --receivers 1 [--device cuda] [--json ROWS]

A context of synthetic KV that is complete goes from some processes to others: gathered, summed,
sent, filled in, summed again. Beside it, in the same processes and in turn with it, parcels of the
same sizes go over the same roads with none of that: the link. Both are answered parcel by parcel,
two on their way. What arrives is compared bit for bit with what was made, or there is no row.

On GPUs every process has one of its own, the senders the first ones.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import torch

from ringspan.deploy.machine import Hardware, hardware, versions
from ringspan.errors import BadInput, RingspanError, WrongAttention
from ringspan.kvstore.handoff import PARCEL_BYTES, WINDOW
from ringspan.kvstore.handoff_case import (
    RECEIVER,
    SENDER,
    HandoffCase,
    RankEnded,
    ended_of,
    joiner,
    save_ended,
    send_case,
    started,
    take_case,
)
from ringspan.kvstore.pair import Room, Sent

TIMEOUT_S = 600.0


class HandoffRow(msgspec.Struct, frozen=True, kw_only=True):
    """One case."""

    benchmark: str = "handoff"
    case: HandoffCase
    payload_bytes: int
    seconds: tuple[float, ...]
    """Of each hand-off, first parcel to last page verified, the slowest receiver's."""
    link_seconds: tuple[float, ...]
    """Of the same bytes as bare parcels."""
    share: float
    """Median of link_seconds over median of seconds."""
    hardware: Hardware
    versions: dict[str, str]
    command: str


def case_of(arguments: argparse.Namespace) -> HandoffCase:
    """Raises BadInput."""
    for name in ("senders", "receivers", "tokens", "layers", "heads", "head_dim", "repeats"):
        if getattr(arguments, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise BadInput(f"{option} {getattr(arguments, name)}: wanted at least 1")
    if arguments.device == "cuda" and (
        torch.cuda.device_count() < arguments.senders + arguments.receivers
    ):
        raise BadInput(
            f"{arguments.senders} + {arguments.receivers} ranks, a GPU each: this host has "
            f"{torch.cuda.device_count()}; use fewer, or --device cpu"
        )
    return HandoffCase(
        name="bench",
        senders=arguments.senders,
        receivers=arguments.receivers,
        num_tokens=arguments.tokens,
        chunk_tokens=arguments.tokens,
        codec=arguments.codec,
        wire_codec=arguments.wire_codec,
        num_layers=arguments.layers,
        num_kv_heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype="bfloat16",
        device=arguments.device,
        timeout_s=60.0,
    )


def measure(case: HandoffCase, repeats: int, command: str) -> HandoffRow:
    """Raises WrongAttention where what arrived is not what was sent, RingspanError."""
    with tempfile.TemporaryDirectory(prefix="ringspan-bench-") as name:
        folder = Path(name)
        with started(_rank, case.senders, case.receivers, case, repeats, name) as processes:
            until = time.monotonic() + TIMEOUT_S
            for (side, rank), process in processes.items():
                process.join(max(0.1, until - time.monotonic()))
                if process.exitcode != 0:
                    raise RingspanError(f"{side} rank {rank} ended with {process.exitcode}")
        whole_s, bare_s, size = [], [], 0
        for index in range(repeats + 1):
            again = _case(case, index)
            ends = [ended_of(again, RECEIVER, rank, folder) for rank in range(case.receivers)]
            if not all(end is not None and end.right for end in ends):
                raise WrongAttention(f"what arrived is not what was sent: {ends}")
            size = sum(end.moved.payload_bytes for end in ends if end is not None)
            whole_s.append(max(end.moved.elapsed_s for end in ends if end is not None))
            bare = [(folder / f"bare-{index}-{rank}").read_text() for rank in range(case.receivers)]
            bare_s.append(max(map(float, bare)))
    return HandoffRow(
        case=case,
        payload_bytes=size,
        seconds=tuple(whole_s[1:]),  # the first of both made connections
        link_seconds=tuple(bare_s[1:]),
        share=statistics.median(bare_s[1:]) / statistics.median(whole_s[1:]),
        hardware=hardware(),
        versions=versions(),
        command=command,
    )


def _case(case: HandoffCase, index: int) -> HandoffCase:
    return msgspec.structs.replace(case, name=f"{case.name}-{index}", epoch=index + 1)


def _rank(side: str, rank: int, case: HandoffCase, repeats: int, folder: str) -> None:
    """A process: link and hand-off in turn."""
    torch.set_num_threads(1)
    if case.device == "cuda":
        index = rank if side == SENDER else case.senders + rank
        torch.cuda.set_device(index)
        case = msgspec.structs.replace(case, device=f"cuda:{index}")
    for index in range(repeats + 1):
        again, where = _case(case, index), Path(folder)
        seconds = _bare(msgspec.structs.replace(again, name=f"bare-{index}"), side, rank, where)
        if side == SENDER:
            moved = send_case(again, rank, where, lambda _: None)
            save_ended(RankEnded(moved=moved), again, side, rank, folder)
        else:
            (where / f"bare-{index}-{rank}").write_text(repr(seconds))
            save_ended(take_case(again, rank, where), again, side, rank, folder)


def _bare(case: HandoffCase, side: str, rank: int, folder: Path) -> float:
    """The bytes of the hand-off as parcels without pages; seconds from the first to the last."""
    plan = case.plan(side)
    pair_bytes = plan.form.bytes_of(case.num_tokens) // (case.senders * case.receivers)
    device = torch.device(case.device)
    sizes = [PARCEL_BYTES[device.type]] * (pair_bytes // PARCEL_BYTES[device.type])
    if pair_bytes % PARCEL_BYTES[device.type]:
        sizes.append(pair_bytes % PARCEL_BYTES[device.type])
    join = joiner(case, side, rank, folder)
    peers = case.receivers if side == SENDER else case.senders
    taken = [0.0] * peers

    def run(peer: int) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        road = join(peer)
        room = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        sent: list[Sent] = []
        begun: list[float] = [time.perf_counter()] if side == SENDER else []

        def into(size: int) -> Room:
            def take(note: bytes) -> torch.Tensor:
                begun.append(time.perf_counter())  # when the first one is announced, as above
                return room[:size]

            return take

        for number, size in enumerate(sizes):
            if side == SENDER:
                if number >= WINDOW:
                    road.recv(_nothing)
                sent.append(road.send(b"pages", room[:size]))
            else:
                road.recv(into(size))
                sent.append(road.send(b"taken"))
        if side == SENDER:
            for _ in range(min(WINDOW, len(sizes))):
                road.recv(_nothing)
        taken[peer] = time.perf_counter() - begun[0]
        for one in sent:
            one.wait()
        if side == RECEIVER:  # the sender ends the road once it has read the last answer
            road.recv(_nothing)
        else:
            road.send(b"end").wait()
            time.sleep(0.2)
        road.close()

    threads = [threading.Thread(target=run, args=(peer,)) for peer in range(peers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(taken)


def _nothing(note: bytes) -> None:
    return None


def line_of(row: HandoffRow) -> str:
    case, took = row.case, statistics.median(row.seconds)
    return (
        f"{case.senders} to {case.receivers} ranks, {row.payload_bytes / 1e6:,.0f} MB of "
        f"{case.sent_codec}: {row.payload_bytes / took / 1e9:.2f} GB/s, link "
        f"{row.payload_bytes / statistics.median(row.link_seconds) / 1e9:.2f} GB/s, "
        f"{100 * row.share:.0f} %"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--senders", type=int, default=1)
    parser.add_argument("--receivers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--wire-codec", default="")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "ringspan.deploy.bench.handoff", *sys.argv[1:]])
    try:
        row = measure(case_of(arguments), arguments.repeats, command)
    except RingspanError as error:
        print(f"ringspan: {error}", file=sys.stderr)
        return error.exit_status
    if arguments.json is not None:
        with arguments.json.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
    print(line_of(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
