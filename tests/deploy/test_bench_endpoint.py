"""`ringspan bench endpoint`: real sockets, an engine at a fixed pace."""

from __future__ import annotations

import msgspec
import pytest
from typer.testing import CliRunner

from ringspan.deploy.bench.endpoint import (
    EndpointRow,
    Read,
    Times,
    _lags_s,
    _request_s,
    _token_s,
    bench_endpoint,
    markdown,
)
from ringspan.deploy.bench.endpoint_server import Emitted
from ringspan.deploy.commands.bench import app
from ringspan.deploy.machine import hardware, versions
from ringspan.errors import BadInput


def test_what_the_engine_takes_is_not_the_endpoints() -> None:
    emitted = Emitted(asked_s=10.0, tokens_s=[11.0, 12.0, 13.0])
    read = Read("one", sent_s=9.75, tokens_s=[11.5, 12.25, 13.75])
    assert _request_s(read, emitted) == pytest.approx(0.75)
    assert _token_s(read, pace_s=1.0) == pytest.approx(0.125)
    assert _lags_s(read, emitted) == pytest.approx([0.5, 0.25, 0.75])


def test_every_token_of_every_stream_is_timed() -> None:
    row = bench_endpoint(3, 5, 10, pace_s=0.01, rounds=2, command="here")
    assert (row.streams, row.requests, row.tokens) == (3, 6, 5)
    assert 0 < row.lag_ms.median <= row.lag_ms.p99 <= row.lag_ms.max
    assert row.request_ms.median > 0
    assert row.cpu_ms_a_token > 0
    assert msgspec.json.decode(msgspec.json.encode(row), type=EndpointRow) == row
    assert "3 streams at once, 6 requests of 10 token ids" in markdown(row)


def test_a_missed_target_is_told_by_the_row(row: EndpointRow) -> None:
    assert row.met
    slow = Times(median=1.5, p99=2.0, max=2.0)
    assert not msgspec.structs.replace(row, token_ms=slow).met
    assert not msgspec.structs.replace(row, request_ms=Times(median=31.0, p99=31.0, max=31.0)).met


@pytest.fixture
def row() -> EndpointRow:
    little = Times(median=0.5, p99=0.6, max=0.7)
    return EndpointRow(
        streams=8, requests=8, tokens=4, prompt_tokens=9, pace_ms=20.0, request_ms=little,
        token_ms=little, lag_ms=little, cpu_ms_a_token=0.2, command="here",
        versions=versions(), hardware=hardware(),
    )  # fmt: skip


@pytest.mark.parametrize("numbers", [("--tokens", "1"), ("--streams", "0"), ("--pace", "0")])
def test_numbers_that_cannot_be_measured_are_refused(numbers: tuple[str, str]) -> None:
    result = CliRunner().invoke(app, ["endpoint", *numbers])
    assert isinstance(result.exception, BadInput)
    assert "wanted at least 1; --tokens at least 2" in str(result.exception)
