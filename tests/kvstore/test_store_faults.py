"""The store under faults: a seeded simulation of the shipped classes, and that it can fail."""

from __future__ import annotations

from collections import Counter

import pytest

from ringspan.kvstore import supply, transfer
from ringspan.kvstore.catalog import Catalog, Recent
from ringspan.kvstore.directory import Directory
from ringspan.kvstore.faults.chance import Broken
from ringspan.kvstore.faults.simulate import Run, simulate
from ringspan.kvstore.guard import Guard
from ringspan.kvstore.records import Published

SEEDS = (0, 1, 2, 3)
FAULTS = 2500
"""Of each seed; 10,000 in all."""

KINDS = {
    "clock jump", "disk error", "disk full", "flip at rest", "flip in flight", "kill",
    "kill host store", "lost write", "message delayed", "message dropped", "message late",
    "message overtaken", "message twice", "power cut", "remote error", "short read", "short write",
    "wire delay", "wire drop", "wire flip", "wire reset",
}  # fmt: skip
"""That must have been met."""


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "faults", [FAULTS // 4, pytest.param(FAULTS, id="ten thousand", marks=pytest.mark.slow)]
)
def test_no_wrong_kv_is_served_and_no_context_is_lost(faults):
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        report = simulate(faults, seed)
        assert (report.wrong, report.lost) == (0, 0)
        assert 0 < report.repair_mean_s <= report.repair_max_s < 60.0
        kinds.update(report.faults)
        counts.update(report.counts)
    assert kinds.total() >= faults * len(SEEDS)
    assert len(KINDS - set(kinds)) <= (0 if faults == FAULTS else 2)  # some are rare
    assert counts["reads"] > faults // 5
    for became in ("refused", "repaired", "recomputed", "repaired by parity"):
        assert counts[became] > 0, became


def test_a_seed_gives_the_same_run_again():
    first, again = simulate(200, seed=11), simulate(200, seed=11)
    assert (first.digest, first.faults, first.counts) == (again.digest, again.faults, again.counts)
    assert simulate(200, seed=12).digest != first.digest


# that it would see it


def until_broken(prepared=None, seeds=range(6), faults=1000) -> str:
    """What the simulator says, from the first seed that meets it."""
    for seed in seeds:
        said = broken_by(seed, prepared, faults)
        if said:
            assert f"seed {seed}, step" in said
            assert 1 <= said.count("\n  step ") <= 20
            return said
    pytest.fail("the simulator saw nothing")


def broken_by(seed, prepared, faults) -> str:
    try:
        simulate(faults, seed, prepared)
    except Broken as broken:
        return str(broken)
    return ""


def test_it_sees_pages_that_are_served_unverified(monkeypatch):
    monkeypatch.setattr(supply, "verify_payload", lambda header, payload: None)
    monkeypatch.setattr(transfer, "verify_sums", lambda header, sums: None)
    assert "wrong KV served" in until_broken()


def test_it_sees_a_publish_before_its_files_are_on_the_disk():
    def forget_syncs(run: Run) -> None:
        run.world.disk.forget_syncs = "store/staging"

    assert "though no bit of its index turned over" in until_broken(forget_syncs)


def test_it_sees_a_journal_that_is_not_synced():
    def forget_syncs(run: Run) -> None:
        run.world.disk.forget_syncs = "directory.journal"

    assert "has forgotten what it had answered" in until_broken(forget_syncs)


def test_it_sees_a_page_that_is_visible_before_it_is_whole(monkeypatch):
    def stage_and_show(self, record):
        stage(self, record)
        self._publish(Published(record.holder, record.epoch, record.write))

    stage = Catalog._stage
    monkeypatch.setattr(Catalog, "_stage", stage_and_show)
    assert "visible before it is whole" in until_broken()


def test_it_sees_an_epoch_that_is_over_and_counts(monkeypatch):
    monkeypatch.setattr(Directory, "_alive", lambda self, name, epoch: self._catalog.holders[name])
    assert "of an epoch that is over" in until_broken()


def test_it_sees_a_reference_that_is_taken_up_again(monkeypatch):
    monkeypatch.setattr(Recent, "__contains__", lambda self, name: False)
    assert "references, wanted" in until_broken()


def test_it_sees_copies_that_go_under_a_lease(monkeypatch):
    monkeypatch.setattr(Guard, "check_leases", lambda self, on, what: None)
    assert "under lease" in until_broken()
