"""Which road repairs a range: by predicted seconds, the survivors read once."""

from __future__ import annotations

from ringspan.kvstore.repair_plan import LostRange, RepairRates, explain, joined, plan_repairs
from ringspan.types import Span

FIRST = Span(0, 128)


def flops(span):
    return 1e9 * span.tokens


def roads(lost, rates, survivors_bytes=0):
    return [choice.road for choice in plan_repairs(lost, rates, flops, survivors_bytes)]


def test_a_copy_is_nearer_than_parity_which_reads_the_stripe():
    lost = [LostRange(FIRST, 1_000_000, ("host",), stripe_pages=4)]
    choice = plan_repairs(lost, RepairRates(1e9), flops, 0)[0]
    assert (choice.road, choice.seconds) == ("host", 1e-3)
    assert choice.others == (("parity", 4e-3), ("recompute", None))


def test_a_slow_copy_is_left_for_parity():
    lost = [LostRange(FIRST, 1_000_000, ("remote",), stripe_pages=4)]
    assert roads(lost, RepairRates(1e9, {"remote": 1e8})) == ["parity"]


def test_what_nobody_has_is_computed_though_nothing_is_known_of_speeds():
    choice = plan_repairs([LostRange(FIRST, 1, ())], RepairRates(1e9), flops, 1 << 40)[0]
    assert (choice.road, choice.seconds, choice.others) == ("recompute", None, ())


def test_computing_pays_where_it_is_faster_by_more_than_reading_the_survivors():
    lost = [LostRange(FIRST, 10_000_000, ("remote",))]
    rates = RepairRates(1e9, {"remote": 1e6}, flops_s=128e9)  # 10 s against 1 s
    assert roads(lost, rates, survivors_bytes=8_000_000_000) == ["recompute"]
    assert roads(lost, rates, survivors_bytes=10_000_000_000) == ["remote"]


def test_survivors_that_must_be_read_anyway_cost_nothing_more():
    lost = [LostRange(FIRST, 10_000_000, ("remote",)), LostRange(Span(256, 384), 1, ())]
    rates = RepairRates(1e9, {"remote": 1e6}, flops_s=128e9)
    assert roads(lost, rates, survivors_bytes=1 << 50) == ["recompute", "recompute"]


def test_pages_that_can_be_had_alike_are_one_range():
    pages = [
        LostRange(Span(0, 128), 10, ("host",)),
        LostRange(Span(128, 256), 10, ("host",)),
        LostRange(Span(256, 300), 5, ()),
        LostRange(Span(512, 640), 10, ()),
    ]
    assert [one.span for one in joined(pages)] == [Span(0, 256), Span(256, 300), Span(512, 640)]
    assert joined(pages)[0].payload_bytes == 20


def test_the_plan_reads_as_a_line_a_range():
    choices = plan_repairs([LostRange(FIRST, 1_000_000, ("host",), 3)], RepairRates(1e9), flops, 0)
    assert explain(choices) == (
        "pages [0, 128): host, 0.001 s; parity 0.003 s; recompute not predicted"
    )
