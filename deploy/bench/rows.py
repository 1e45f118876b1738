"""The JSON rows of every benchmark: written one a line as they come, read back for plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from ringspan.deploy.bench.attention import AttentionRow
from ringspan.deploy.bench.plots import Point
from ringspan.deploy.bench.prefill import Row as PrefillRow
from ringspan.errors import BadInput

BenchRow = AttentionRow | PrefillRow


class _Kind(msgspec.Struct):
    """What every row says of itself."""

    benchmark: str


ROWS: dict[str, type[AttentionRow] | type[PrefillRow]] = {
    "attention": AttentionRow,
    "prefill": PrefillRow,
}


def append_row(row: BenchRow, path: Path) -> None:
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")


def read_rows(paths: Iterable[Path]) -> list[BenchRow]:
    """Raises BadInput, with file and line, for what is no row of ours."""
    rows: list[BenchRow] = []
    for path in paths:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}; wanted rows that --json wrote") from None
        for number, line in enumerate(lines, 1):
            try:
                kind = msgspec.json.decode(line, type=_Kind).benchmark
                rows.append(msgspec.json.decode(line, type=ROWS[kind]))
            except (msgspec.DecodeError, KeyError) as error:
                raise BadInput(
                    f"{path}, line {number} is no row of a benchmark of this version: {error}"
                ) from None
    return rows


def points_of(rows: Iterable[BenchRow]) -> list[Point]:
    return [_attention(row) if isinstance(row, AttentionRow) else _prefill(row) for row in rows]


def _attention(row: AttentionRow) -> Point:
    case = row.case
    cached = f", on {case.cached:,} cached" if case.cached else ""
    limit = f" ({row.gpu.power_limit_w:.0f} W)" if row.gpu is not None else ""
    return Point(
        benchmark=row.benchmark,
        series=f"{case.scheme} ({case.transport})",
        setting=cached,
        tokens=case.tokens,
        ranks=case.ranks,
        seconds=row.seconds.median,
        ideal_s=row.ideal_s,
        devices=row.devices,
        exposed_s=row.exposed_s,
        machine=(
            f"attention of one layer, {case.num_q_heads}/{case.num_kv_heads} heads of "
            f"{case.head_dim}, {case.dtype}: {row.ranks[0].device_name}{limit}"
        ),
    )


def _prefill(row: PrefillRow) -> Point:
    return Point(
        benchmark=row.benchmark,
        series=f"{row.plan.scheme} ({row.ranks[0].transport})",
        setting="",
        tokens=row.tokens,
        ranks=len(row.ranks),
        seconds=row.median_s,
        ideal_s=None,
        devices=row.devices,
        exposed_s=row.findings.exposed_s,
        machine=f"prefill of {row.facts.name}, {row.facts.dtype}: {row.ranks[0].device_name}",
    )
