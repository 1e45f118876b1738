"""Where ranks go, and what is refused before anyone waits."""

from __future__ import annotations

import pytest

from ringspan.cluster.placement import GangNeed, NodeView, place_gang
from ringspan.errors import BadInput, TooLarge

LAPTOP = (NodeView("a", 2, 0),)
GPU_HOST = (NodeView("g", 16, 4),)


def need(world_size: int, **kwargs: object) -> GangNeed:
    fields: dict[str, object] = {"device": "auto", "threads": 0, "one_process": False}
    return GangNeed(world_size=world_size, **(fields | kwargs))  # type: ignore[arg-type]


def test_cores_are_dealt_evenly_on_a_machine_without_gpus() -> None:
    place = place_gang(LAPTOP, need(2))
    assert (place.device, place.num_bundles, place.threads) == ("cpu", 2, 1)
    assert place.bundle == {"CPU": 1.0}
    assert place_gang(LAPTOP, need(1)).bundle == {"CPU": 2.0}


def test_a_rank_takes_one_gpu_where_there_are_any() -> None:
    place = place_gang(GPU_HOST, need(4))
    assert (place.device, place.bundle["GPU"], place.strategies) == ("cuda", 1.0, ("STRICT_PACK",))
    assert place.bundle["CPU"] * 4 <= 16


def test_loopback_takes_one_device_for_all_ranks() -> None:
    place = place_gang((NodeView("g", 4, 1),), need(8, one_process=True))
    assert (place.num_bundles, place.bundle["GPU"]) == (1, 1.0)


def test_more_threads_than_cores_are_the_callers_choice() -> None:
    place = place_gang(LAPTOP, need(2, threads=5))
    assert (place.threads, place.bundle) == (5, {"CPU": 1.0})


@pytest.mark.parametrize(
    ("nodes", "asked", "text"),
    [
        (LAPTOP, need(4), "4 ranks asked for, the cluster has 2 CPUs: ask for at most 2"),
        (GPU_HOST, need(5), "5 ranks asked for, the cluster has 4 GPUs: ask for at most 4"),
        (LAPTOP, need(1, device="cuda"), "1 rank asked for, the cluster has 0 GPUs"),
        ((NodeView("a", 8, 0), NodeView("b", 0, 2)), need(2), "0 with a GPU and a CPU of the same"),
    ],
)
def test_more_ranks_than_devices_are_refused_with_both_numbers(
    nodes: tuple[NodeView, ...], asked: GangNeed, text: str
) -> None:
    with pytest.raises(TooLarge, match=text):
        place_gang(nodes, asked)


def test_one_node_is_tried_before_several() -> None:
    hosts = (NodeView("a", 16, 8), NodeView("b", 16, 8))
    assert place_gang(hosts, need(8)).strategies == ("STRICT_PACK", "PACK")
    assert place_gang(hosts, need(16)).strategies == ("PACK",)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(BadInput, match="unknown device 'tpu'"):
        place_gang(LAPTOP, need(1, device="tpu"))
