"""The gang a command runs on: in a Ray, or all in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from ringspan.cluster.gang import Gang
from ringspan.cluster.messages import GangSpec


@contextmanager
def open_gang(spec: GangSpec, local: bool) -> Iterator[Gang]:
    """Started when entered, ended when left. `local`: loopback ranks without any Ray."""
    if local:
        from ringspan.cluster.local_gang import LocalGang

        with LocalGang(msgspec.structs.replace(spec, transport="loopback")) as gang:
            yield gang
        return
    from ringspan.cluster.ray_cluster import connect
    from ringspan.cluster.ray_gang import RayGang

    with connect(), RayGang(spec) as gang:
        yield gang
