"""Several hosts on this machine, for tests of what no single host shows."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ringspan.cluster.namespaces import Hosts, why_not

REQUIRED = "RINGSPAN_REQUIRE_HOSTS"
"""Set to 1 where these tests must run: then a machine that cannot have hosts is a failure."""


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Three with two CPUs each and a spare one, all in one Ray."""
    if reason := why_not():
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}")
        pytest.skip(reason)
    with Hosts((2, 2, 2, 2)) as hosts:
        yield hosts
