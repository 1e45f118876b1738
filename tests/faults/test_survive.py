"""A gang of six ranks on three hosts: what it stores is what one process stores, and a fault of a
rank, a node, a link or the controller changes no bit of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ringspan.attention.models.needles import plant
from ringspan.cluster.controller import Controller
from ringspan.cluster.local_gang import LocalGang
from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.namespaces import Hosts
from ringspan.cluster.planner import PrefillOptions
from ringspan.deploy.jobs.survive import FAULTS, RANKS, Run, one_run, row_of
from ringspan.kvstore.folder import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TOKENS, NEEDLES = 2560, 6


@pytest.fixture(scope="module")
def given() -> dict[str, object]:
    return {"tokens": TOKENS, "needles": NEEDLES, "model": "retriever"}


@pytest.fixture(scope="module")
def calm(hosts: Hosts, given: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Run:
    store = tmp_path_factory.mktemp("calm") / "store"
    return one_run(hosts, "none", {**given, "store": str(store)})


@pytest.mark.slow
def test_six_ranks_on_three_hosts_store_what_one_process_does(calm: Run, tmp_path: Path) -> None:
    ranks = calm.of("ready")[0]["ranks"]
    assert len(ranks) == RANKS
    assert len({host for host, _ in ranks}) == 3
    assert calm.of("done")[0]["found"] == NEEDLES
    spec = GangSpec(world_size=RANKS, model=ModelSpec(name="retriever"), device="cpu", threads=1)
    store = Store(tmp_path)
    with LocalGang(spec) as gang:
        options = PrefillOptions(chunk_tokens=calm.of("done")[0]["chunk_tokens"])
        tokens = plant(TOKENS, NEEDLES, 7).token_ids
        done = Controller(gang, store).prefill(np.asarray(tokens), options)
    pages = [page.xxh3 for page in store.manifest(done.context_id).pages]
    assert pages == calm.of("done")[0]["pages"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_no_bit(
    fault: str, hosts: Hosts, given: dict[str, object], calm: Run, tmp_path: Path
) -> None:
    found = one_run(hosts, fault, {**given, "store": str(tmp_path / "store")})
    row = row_of(fault, found, calm)
    assert row["pages_equal"]
    assert row["needles_found"] == NEEDLES
    assert row["recomputed_tokens"] <= row["chunk_tokens"]
    assert row["hit"]
    if fault != "link":  # a link that comes back in time is only waited for
        assert row["faults_seen"] == 1
    if fault not in ("link", "controller"):  # a new controller has to start first
        assert row["detected_s"] <= 5.0
