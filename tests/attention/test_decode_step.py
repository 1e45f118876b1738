"""Where a decode step finds its rows: what the device computes is what the host would say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ringspan.attention.compute import Rules
from ringspan.attention.decode_step import Cursor, DecodeStep, Shared, TailRows, _Swept
from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.tail import owned
from ringspan.types import Span, total_tokens

PAGE = 16
STARTS = (3, 16, 40, 95)
"""Lengths of the contexts: within a page, at its edge, in the second round of three ranks."""
CPU = torch.device("cpu")


def tail_rows(capacity: int) -> TailRows:
    bases = tuple(capacity * at for at in range(len(STARTS)))
    return TailRows(
        lambda layer: (torch.empty(0), torch.empty(0)), capacity * len(STARTS), bases, STARTS, PAGE
    )


def kept(start: int, stop: int, rank: int, world_size: int) -> int:
    return total_tokens(owned(Span(start, max(start, stop)), rank, world_size, PAGE))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_token_goes_to_the_row_behind_the_last_one_of_its_rank(world_size: int) -> None:
    tail = tail_rows(200)
    cursors = [Cursor(STARTS, tail, rank, world_size, CPU) for rank in range(world_size)]
    for step in range(120):
        for rank, cursor in enumerate(cursors):
            cursor.begin()
            for b, (start, base) in enumerate(zip(STARTS, tail.bases, strict=True)):
                position = start + step
                before = kept(start, position, rank, world_size)
                mine = position // PAGE % world_size == rank
                assert int(cursor.row[b]) == (base + before if mine else tail.num_rows)
                assert int(cursor.stop[b]) == base + before + mine
                for window in (None, 1, 20, 500):
                    floor = start if window is None else max(start, position - window + 1)
                    wanted = base + kept(start, floor, rank, world_size)
                    assert int(cursor.first(window)[b]) == wanted
            cursor.advance(torch.zeros(len(STARTS), dtype=torch.int64))


def test_a_session_at_rest_moves_and_keeps_nothing() -> None:
    cursor = Cursor(STARTS, tail_rows(50), 0, 1, CPU)
    cursor.active[1] = 0
    for _ in range(2):
        cursor.begin()
        cursor.advance(torch.tensor([5, 6, 7, 8]))
    assert cursor.where.tolist() == [5, 16, 42, 97]
    assert int(cursor.row[1]) == 200  # where nothing is read
    assert cursor.stop.tolist() == [2, 50, 102, 152]


def test_a_window_hides_the_first_keys_of_scattered_spans() -> None:
    spans = (Span(0, 16), Span(48, 64), Span(64, 71))
    shard = cast("Any", SimpleNamespace(spans=spans))
    positions = (71, 80, 131)
    swept = _Swept(Shared(shard, 1, 3), positions, CPU)
    held = [p for span in spans for p in range(span.start, span.stop)]
    for window in (1, 9, 17, 60, 500):
        seen = [sum(p > at - window for p in held) for at in positions[1:]]
        first = swept.first_row(min(positions[1:]) - window + 1)
        swept.forget()
        got = swept.firsts(torch.tensor(positions), window, first)
        assert [len(held) - first - int(n) for n in got] == seen


def test_tails_alone_are_attended_where_no_context_lies() -> None:
    """A rank may hold nothing of a context; rows of an empty tail see their own key alone."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.full((2 * 8 + 1, 2, 16), torch.nan) for _ in range(2))
    tail = TailRows(lambda layer: (keys, values), 16, (0, 8), (10, 33), PAGE)
    shard = cast("Any", SimpleNamespace(spans=(), num_tokens=0))
    step = DecodeStep(
        LoopbackWorld(1).transport(0, CPU), "auto", [Shared(shard, 0, 2)], tail, (10, 33), CPU
    )
    told: list[tuple[torch.Tensor, ...]] = []
    for _ in range(3):
        q = torch.randn((2, 4, 16), generator=generator)
        k, v = torch.randn((2, 2, 2, 16), generator=generator)
        told.append((k, v))
        step.begin()
        out = step.attend(Rules(0, 0.25), q, k, v)
        for b in range(2):
            past_k, past_v = (torch.stack([one[i][b] for one in told]) for i in range(2))
            for head in range(4):
                weights = torch.softmax(0.25 * past_k[:, head // 2] @ q[b, head], 0)
                torch.testing.assert_close(out[b, head], weights @ past_v[:, head // 2])
        step.cursor.advance(torch.zeros(2, dtype=torch.int64))
