from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.errors import BadInput, StoreError, TooLarge
from ringspan.kvstore.evict import (
    HALF_LIFE_S,
    Candidate,
    Quota,
    eviction_order,
    log2_value,
    over_quota,
    quota_victims,
    recompute_s,
    value,
    victims,
)
from ringspan.kvstore.folder import Store

NOW_S = 10_000.0


def candidate(key: str, **changes: object) -> Candidate:
    made = Candidate(key, "ten", 0, 100, 1.0, None, NOW_S)
    return made._replace(**changes)  # type: ignore[arg-type]


def keys(chosen: list[Candidate]) -> list[str]:
    return [one.key for one in chosen]


def test_later_pages_cost_more_as_attention_does() -> None:
    def cost(position: int) -> float:
        return recompute_s(
            position,
            128,
            linear_flops_per_token=1.5e10,
            attention_flops_per_pair=4.0 * 128 * 32 * 32,
            flops_per_s=6e14,
        )

    assert cost(0) == pytest.approx((128 * 1.5e10 + 128 * 129 / 2 * 524288) / 6e14)
    assert cost(8191) - cost(8190) == pytest.approx(cost(1) - cost(0))
    assert cost(8191) == pytest.approx((128 * 1.5e10 + 128 * 524288 * (8191 * 128 + 64.5)) / 6e14)
    with pytest.raises(ValueError, match="flops_per_s 0"):
        recompute_s(0, 1, linear_flops_per_token=1, attention_flops_per_pair=1, flops_per_s=0)


def test_the_cheapest_to_have_again_goes_first() -> None:
    order = eviction_order(
        [
            candidate("dear", recompute_s=9.0),
            candidate("cheap", recompute_s=0.5),
            candidate("elsewhere too", recompute_s=9.0, refetch_s=0.1),
            candidate("slow elsewhere", recompute_s=2.0, refetch_s=5.0),
            candidate("large", recompute_s=9.0, size_bytes=10_000),
            candidate("read now", recompute_s=0.0, in_use=1),
        ],
        NOW_S,
    )
    assert keys(order) == ["large", "elsewhere too", "cheap", "slow elsewhere", "dear"]


def test_what_was_not_used_for_long_loses_worth() -> None:
    fresh = candidate("fresh", recompute_s=1.0)
    old = candidate("old", recompute_s=3.0, last_used_s=NOW_S - 2 * HALF_LIFE_S)
    assert value(old, NOW_S) == pytest.approx(0.75 * value(fresh, NOW_S))
    assert keys(eviction_order([fresh, old], NOW_S)) == ["old", "fresh"]
    assert value(fresh._replace(last_used_s=NOW_S + 5), NOW_S) == value(fresh, NOW_S)
    assert value(fresh._replace(last_used_s=-1e300), NOW_S) >= 0.0


def test_a_prefix_is_what_is_left_of_equals() -> None:
    pages = [candidate(f"p{i}", position=i) for i in range(5)]
    assert keys(victims(pages, 250, NOW_S)) == ["p4", "p3", "p2"]


def test_nothing_goes_when_not_enough_can() -> None:
    pages = [candidate("a"), candidate("b", in_use=2, size_bytes=70)]
    assert victims(pages, 0, NOW_S) == []
    assert keys(victims(pages, 100, NOW_S)) == ["a"]
    with pytest.raises(
        TooLarge, match="101 bytes are to be freed, 100 can be: 70 bytes are in use"
    ):
        victims(pages, 101, NOW_S)


def test_a_quota_is_kept_by_its_own_namespace_alone() -> None:
    quotas = [Quota("a", 1000), Quota("b", 1000)]
    assert over_quota({"a": 900, "b": 100, "c": 10**9}, quotas, {"a": 250}) == {"a": 150}
    assert over_quota({"a": 1300}, quotas) == {"a": 300}
    with pytest.raises(BadInput, match="1001 bytes are more than the quota of 1000 bytes"):
        over_quota({}, quotas, {"b": 1001})
    pages = [
        candidate("a1", namespace="a", recompute_s=9.0),
        candidate("a2", namespace="a", recompute_s=8.0),
        candidate("b1", namespace="b", recompute_s=0.0),
    ]
    assert keys(quota_victims(pages, {"a": 150}, NOW_S)) == ["a2", "a1"]


candidates = st.lists(
    st.builds(
        Candidate,
        key=st.text("abc", min_size=1, max_size=3),
        namespace=st.sampled_from(["x", "y"]),
        position=st.integers(0, 9),
        size_bytes=st.integers(0, 50),
        recompute_s=st.floats(0, 10),
        refetch_s=st.none() | st.floats(0, 10),
        last_used_s=st.floats(0, NOW_S),
        in_use=st.integers(0, 1),
    ),
    max_size=12,
    unique_by=lambda c: c.key,
)


@given(candidates, st.integers(0, 300), st.randoms())
def test_victims_free_enough_and_none_in_vain(
    found: list[Candidate], need_bytes: int, order: object
) -> None:
    free_bytes = sum(c.size_bytes for c in found if not c.in_use)
    if free_bytes < need_bytes:
        with pytest.raises(TooLarge):
            victims(found, need_bytes, NOW_S)
        return
    going = victims(found, need_bytes, NOW_S)
    assert not any(c.in_use for c in going)
    assert sum(c.size_bytes for c in going) >= need_bytes
    assert need_bytes == 0 or sum(c.size_bytes for c in going[:-1]) < need_bytes
    shuffled = list(found)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert victims(shuffled, need_bytes, NOW_S) == going
    worst = max((log2_value(c, NOW_S) for c in going), default=-math.inf)
    staying = [c for c in found if c not in going and not c.in_use]
    assert all(log2_value(c, NOW_S) >= worst for c in staying)


def test_of_two_that_nobody_used_for_months_the_older_goes_first() -> None:
    fresh = Candidate("b", "x", 0, 100, 1.0, None, 100 * 86400.0)
    old, cheap = fresh._replace(key="c", last_used_s=0.0), fresh._replace(key="a", recompute_s=0.0)
    order = eviction_order([fresh, old, cheap], 200 * 86400.0)
    assert keys(order) == ["a", "c", "b"]


def test_a_store_stays_within_its_quota(tmp_path: Path) -> None:
    for folder, size in (("contexts/" + "a" * 16, 700), ("staging/" + "b" * 16 + "-1", 200)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rank-0.seg").write_bytes(bytes(size))
    store = Store(tmp_path, quota_bytes=1000)
    assert store.used_bytes() == 900
    store.check_room(100)
    with pytest.raises(StoreError, match=r"needs 1.01e-07 GB .* 9e-07 GB of a quota of 1e-06 GB"):
        store.check_room(101)
    Store(tmp_path).check_room(101)
    with pytest.raises(BadInput, match="quota of 0 bytes: wanted 1 or more"):
        Store(tmp_path, quota_bytes=0)
