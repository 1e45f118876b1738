"""The gang a command runs on: in a Ray, or all in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import msgspec

from ringspan.cluster.gang import Gang
from ringspan.cluster.messages import GangSpec


def open_ray(local: bool) -> AbstractContextManager[None]:
    """The Ray to work in, for as long as it is entered; none for `local`."""
    if local:
        return nullcontext()
    from ringspan.cluster.ray_cluster import connect

    return connect()


@contextmanager
def open_gang(spec: GangSpec, local: bool) -> Iterator[Gang]:
    """Started when entered, ended when left. `local`: loopback ranks without any Ray."""
    if local:
        from ringspan.cluster.local_gang import LocalGang

        with LocalGang(msgspec.structs.replace(spec, transport="loopback")) as gang:
            yield gang
        return
    from ringspan.cluster.ray_gang import RayGang

    with open_ray(local), RayGang(spec) as ray_gang:
        yield ray_gang
