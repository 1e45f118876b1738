"""Who is named when several ranks complain at once."""

from __future__ import annotations

import pickle

import pytest

from ringspan.cluster.faults import (
    Fault,
    FaultKind,
    Member,
    RanksFailed,
    blame,
    fault_of,
    is_benign,
)
from ringspan.errors import (
    BadInput,
    CorruptPage,
    PeerTimeout,
    RankLost,
    RingspanError,
    StoreError,
    TooLarge,
    UnknownName,
)

MEMBERS = (Member("alpha", 11), Member("alpha", 12), Member("beta", 13))
DIED = Fault(2, FaultKind.DIED, "its process is gone")
FAILED = fault_of(1, ValueError("shapes\nand more"))
SILENT = Fault(2, FaultKind.SILENT, "waited 9.0 s")
PEER = fault_of(0, PeerTimeout("rank 0 lost rank 2"))


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        (
            [PEER, FAILED, DIED],
            "rank 2 (host beta, pid 13) died in chunk 3: its process is gone",
        ),
        (
            [PEER, FAILED],
            "rank 1 (host alpha, pid 12) failed in chunk 3: ValueError: shapes",
        ),
        (
            [PEER, SILENT],
            "rank 2 (host beta, pid 13) did not answer in chunk 3: waited 9.0 s; "
            "rank 0 says: rank 0 lost rank 2",
        ),
        ([PEER], "rank 0 (host alpha, pid 11) lost a peer in chunk 3: rank 0 lost rank 2"),
    ],
)
def test_the_gravest_fault_is_named_whatever_came_first(faults: list[Fault], text: str) -> None:
    error = blame(faults, MEMBERS, "chunk 3")
    assert type(error) is RankLost
    assert str(error) == text


def test_all_dead_ranks_are_named() -> None:
    both = [DIED, Fault(0, FaultKind.DIED, "its process is gone")]
    assert "rank 0 (host alpha, pid 11) and rank 2 (host beta, pid 13)" in str(
        blame(both, MEMBERS, "chunk 3")
    )


@pytest.mark.parametrize("error", [TooLarge("no room"), UnknownName("codec", "x", ["raw"])])
def test_what_the_caller_did_wrong_keeps_its_type_and_text(error: BadInput) -> None:
    raised = blame([fault_of(1, error), PEER], MEMBERS, "chunk 3")
    assert (type(raised), str(raised)) == (type(error), str(error))


@pytest.mark.parametrize("kind", [StoreError, CorruptPage])
def test_a_damaged_page_or_disk_keeps_its_type_and_gets_the_rank(
    kind: type[RingspanError],
) -> None:
    raised = blame([fault_of(1, kind("disk full"))], MEMBERS, "saving")
    assert type(raised) is kind
    assert str(raised) == "rank 1 (host alpha, pid 12) in saving: disk full"


def test_a_gang_goes_on_only_after_errors_that_leave_its_ranks_in_step() -> None:
    assert is_benign([fault_of(0, StoreError("full")), fault_of(1, BadInput("no"))])
    assert not is_benign([fault_of(0, StoreError("full")), DIED])
    assert not is_benign([FAILED])


def test_faults_survive_pickling() -> None:
    error = RanksFailed((FAILED, fault_of(1, UnknownName("codec", "x", ["raw"]))))
    again = pickle.loads(pickle.dumps(error))
    assert [fault.text for fault in again.faults] == [fault.text for fault in error.faults]
    assert isinstance(again.faults[1].error, UnknownName)
    assert "shapes" in str(again)
