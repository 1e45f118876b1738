from __future__ import annotations

import argparse
from typing import Any

import pytest

from ringspan.deploy.bench.handoff import case_of, line_of, measure
from ringspan.errors import BadInput


def asked(**more: Any) -> argparse.Namespace:
    given: dict[str, Any] = {
        "senders": 2, "receivers": 1, "tokens": 1000, "layers": 2, "heads": 2, "head_dim": 64,
        "codec": "raw", "wire_codec": "", "device": "cpu", "repeats": 1,
    }  # fmt: skip
    return argparse.Namespace(**(given | more))


def test_a_row_says_what_share_of_the_link_was_reached() -> None:
    row = measure(case_of(asked()), 2, "python -m ...")
    assert row.payload_bytes == 1000 * 2 * 2 * 64 * 2 * 2  # layers, heads, D, K and V, bytes
    assert len(row.seconds) == len(row.link_seconds) == 2
    assert all(seconds > 0 for seconds in row.seconds + row.link_seconds)
    assert 0 < row.share < 10
    assert "2 to 1 ranks" in line_of(row)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"senders": 0}, "--senders 0: wanted at least 1"),
        ({"head_dim": -1}, "--head-dim -1: wanted at least 1"),
        ({"device": "cuda", "senders": 99}, r"99 \+ 1 ranks, a GPU each: this host has"),
    ],
)
def test_what_cannot_be_measured_is_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        case_of(asked(**more))
