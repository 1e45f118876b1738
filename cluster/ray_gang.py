"""A gang of Ray actors. The one place where ranks become actors, and where Ray's errors end.

All actors come from one placement group, which this module makes and removes. A rank that dies is
not restarted: its group is broken anyway, and the controller builds a new gang.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import ringspan
from ringspan.cluster.faults import Fault, Member, first_line, to_replace
from ringspan.cluster.gang import Mended, RankFactory, stream_in_step
from ringspan.cluster.host import LoopbackHost, RankHost
from ringspan.cluster.messages import GangSpec, RankReady, TokenChunk
from ringspan.cluster.placement import GangNeed, NodeView, Place, place_gang
from ringspan.cluster.processes import wait_gone
from ringspan.cluster.ray_pending import RayPending
from ringspan.errors import RankLost, RingspanError, TooLarge

PLACEMENT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 2.0
"""For a live node to take a connection."""
MOVE_TIMEOUT_S = 10.0
"""For room on other nodes; it is there, or somebody else has to end first."""
LEAVE_GRACE_S = 5.0
"""Beyond the longest wait for a peer, for a survivor to leave a broken group."""
PUT_BYTES = 1 << 16
"""Arguments with a buffer larger than this are put into the object store once, for all ranks."""


class RayGang:
    """Starts its actors when it is entered, kills them when it is left. Needs `ray.init`.

    With transport `loopback` one actor on one device holds all the ranks.
    """

    def __init__(
        self,
        spec: GangSpec,
        *,
        rank_class: RankFactory | None = None,
        placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.spec = spec
        self.world_size = spec.world_size
        self.ready: tuple[RankReady, ...] = ()
        self.lost = False
        self.faults: tuple[Fault, ...] = ()
        self._rank_class = rank_class
        self._placement_timeout_s = placement_timeout_s
        self._start_timeout_s = start_timeout_s
        self._groups: list[PlacementGroup] = []
        """The first holds a bundle for every actor, later ones those that had to move."""
        self._bundle_of: dict[int, tuple[PlacementGroup, int]] = {}
        self._node_of: list[str] = [""] * spec.world_size
        self._place: Place | None = None
        self._actors: list[Any] = []
        self._ranks_of: list[tuple[int, ...]] = []
        self.members: list[Member | None] = [None] * spec.world_size

    def start(self) -> Self:
        """Reserve, start the actors, join them into one group. TooLarge before any waiting when
        the cluster can never hold the gang."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def submit(self, method: str, *args: Any, what: str) -> RayPending:
        return self._submit("invoke", method, *map(_shared, args), what=what)

    def call(self, method: str, *args: Any, timeout_s: float, what: str) -> list[Any]:
        return self.submit(method, *args, what=what).result(timeout_s)

    def stream(self, method: str, *args: Any, timeout_s: float, what: str) -> Iterator[TokenChunk]:
        return stream_in_step(self, method, args, timeout_s, what)

    def mend(self, timeout_s: float) -> Mended:
        """New actors in the places of those that are gone, on other nodes where theirs is gone
        too. Survivors leave the broken group and join the new one."""
        if self._place is None or self.spec.transport == "loopback":
            raise RankLost("ranks of one process are lost together: start a new gang")
        began = time.monotonic()

        def left() -> float:
            return max(began + timeout_s - time.monotonic(), 0.1)

        faults, self.faults = self.faults, ()
        failed = to_replace(faults)
        self._end([self._actors[rank] for rank in failed], failed)
        self.lost = False
        silent = self._silent([r for r in range(self.world_size) if r not in failed], left())
        self._end([self._actors[rank] for rank in silent], silent)
        gone = sorted(failed | silent)
        load_s = 0.0
        if gone:
            self._move(self._place, gone)
            for rank in gone:
                self._actors[rank] = self._make_actor(self._place, rank)
            self._begin_hosts(gone, left)
            loaded = self._submit_to(gone, "invoke", "load", what="loading the model")
            new = dict(zip(gone, loaded.result(left()), strict=True))
            load_s = time.monotonic() - began
            self.ready = tuple(
                _like(new[rank], before) if rank in new else before
                for rank, before in enumerate(self.ready)
            )
        joining = self.submit("join", self._rendezvous(left), what="joining the group anew")
        joining.result(left())
        return Mended(tuple(gone), load_s, time.monotonic() - began)

    def _move(self, place: Place, ranks: Sequence[int]) -> None:
        """Reservations for ranks whose node is gone, on other nodes. Ray moves a lost bundle itself
        when it takes the node for dead, which can be a minute later, and starts actors there until
        then. Where nothing is free elsewhere that is what is waited for."""
        there = {self._node_of[rank] for rank in ranks}
        dead = [node for node in there if not is_answering(node)]
        moved = [rank for rank in ranks if self._node_of[rank] in dead]
        if not moved:
            return
        elsewhere = {"ray.io/node-id": f"!in({','.join(dead)})"}
        group = placement_group(
            [dict(place.bundle) for _ in moved],
            strategy="PACK",
            bundle_label_selector=[elsewhere for _ in moved],
        )
        if not group.wait(MOVE_TIMEOUT_S):
            remove_placement_group(group)
            return
        self._groups.append(group)
        self._bundle_of.update({rank: (group, index) for index, rank in enumerate(moved)})

    def _silent(self, ranks: Sequence[int], left_s: float) -> set[int]:
        """Those of the ranks that do not leave the broken group when they are told to. What they
        were at ends first, at the latest when their wait for a peer does."""
        leaving = self._submit_to(ranks, "invoke", "leave", "a rank was lost", what="leaving")
        _, faults = leaving.gather(min(left_s, self.spec.timeout_s + LEAVE_GRACE_S))
        return {fault.rank for fault in faults}

    def _end(self, actors: Sequence[Any], ranks: Collection[int]) -> None:
        """Kills the actors and waits until they are gone, as far as that can be seen."""
        for actor in actors:
            ray.kill(actor, no_restart=True)
        if actors:  # a killed actor answers with an error
            probes = [actor.where.remote() for actor in actors]
            ray.wait(probes, num_returns=len(probes), timeout=CLOSE_TIMEOUT_S)
        members = [self.members[rank] for rank in ranks]
        here = [m.pid for m in members if m is not None and m.host == socket.gethostname()]
        wait_gone(here, CLOSE_TIMEOUT_S)  # the answer comes before the process is gone

    def close(self) -> None:
        """Lets ranks that are in step stop by themselves, then kills every actor and gives the
        reservation back."""
        if self.ready and not self.lost and ray.is_initialized():
            with contextlib.suppress(RingspanError):  # whoever did not stop is killed next
                self.call("stop", timeout_s=CLOSE_TIMEOUT_S, what="stopping")
        self.ready, self.lost = (), True
        actors, self._actors = self._actors, []
        groups, self._groups = self._groups, []
        if not ray.is_initialized():
            return  # Ray has ended them already
        self._end(actors, range(self.world_size))
        self.members = [None] * self.world_size
        for group in groups:
            remove_placement_group(group)

    def __enter__(self) -> Self:
        return self if self.ready else self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        place = place_gang(_cluster(), _need(self.spec))
        self.spec = msgspec.structs.replace(self.spec, threads=place.threads, device=place.device)
        group = self._reserve(place)
        self._place = place
        loopback = self.spec.transport == "loopback"
        every_rank = tuple(range(self.world_size))
        self._ranks_of = [every_rank] if loopback else [(rank,) for rank in every_rank]
        hosts = list(range(place.num_bundles))
        self._bundle_of = {host: (group, host) for host in hosts}
        self._actors = [self._make_actor(place, host) for host in hosts]

        def left() -> float:
            return max(deadline - time.monotonic(), 0.1)

        self._begin_hosts(hosts, left)
        what = "loading the model and joining the group"
        if loopback:
            started = self._submit("start", what=what).result(left())
        else:
            started = self.submit("start", self._rendezvous(left), what=what).result(left())
        self.ready = tuple(started)

    def _begin_hosts(self, hosts: Sequence[int], left: Callable[[], float]) -> None:
        """Actors just made: where they are, and on which GPU."""
        what = "starting its process"
        where = self._submit_to(hosts, "where", what=what).result(left(), one_per_rank=False)
        for host, member in zip(hosts, where, strict=True):
            for rank in self._ranks_of[host]:
                self.members[rank] = member
        nodes = self._submit_to(hosts, "node", what=what).result(left(), one_per_rank=False)
        for host, node in zip(hosts, nodes, strict=True):
            for rank in self._ranks_of[host]:
                self._node_of[rank] = node
        if self.spec.device == "cuda":
            self._submit_to(hosts, "use_visible_device", what="choosing its GPU").result(
                left(), one_per_rank=False
            )

    def _rendezvous(self, left: Callable[[], float]) -> tuple[str, int]:
        """Rank 0 serves it on a port that it has bound, never on a guessed one."""
        what = "hosting the rendezvous"
        address = self._submit_to([0], "address", what=what).result(left(), one_per_rank=False)[0]
        first = self._submit_to([0], "invoke", "host_store", address, what=what)
        rendezvous: tuple[str, int] = first.result(left(), one_per_rank=False)[0][0]
        return rendezvous

    def _reserve(self, place: Place) -> PlacementGroup:
        bundles = [dict(place.bundle) for _ in range(place.num_bundles)]
        share_s = self._placement_timeout_s / len(place.strategies)
        for strategy in place.strategies:
            group = placement_group(bundles, strategy=strategy)
            self._groups = [group]  # so that close() removes it, whatever comes
            if group.wait(share_s):
                return group
            remove_placement_group(group)
            self._groups = []
        free = ray.available_resources()
        raise TooLarge(
            f"{self.world_size} ranks asked for, {place.text}; the cluster has "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free and none came free "
            f"in {self._placement_timeout_s:g} s: wait for other jobs to end, or ask for fewer "
            "ranks"
        )

    def _make_actor(self, place: Place, index: int) -> Any:
        """In its bundle."""
        group, bundle_index = self._bundle_of[index]
        loopback = self.spec.transport == "loopback"
        host_class = ray.remote(RayLoopbackHost if loopback else RayRankHost)
        rank_class = self._rank_class or _rank_class()
        options = host_class.options(
            num_cpus=place.bundle["CPU"],
            num_gpus=place.bundle.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle_index
            ),
            runtime_env={"env_vars": _worker_env(place.threads)},
        )
        if loopback:
            return options.remote(self.spec, rank_class)
        return options.remote(index, self.spec, rank_class)

    def _submit(self, host_method: str, *args: Any, what: str) -> RayPending:
        return self._submit_to(range(len(self._actors)), host_method, *args, what=what)

    def _submit_to(
        self, hosts: Sequence[int], host_method: str, *args: Any, what: str
    ) -> RayPending:
        if self.lost:
            raise RankLost(f"{what}: the gang has lost a rank; start a new one")
        refs = {
            getattr(self._actors[host], host_method).remote(*args): self._ranks_of[host]
            for host in hosts
        }
        return RayPending(self, refs, what)


class RayRankHost(RankHost):
    """RankHost as an actor."""

    def address(self) -> str:
        """Of its node, as the other nodes reach it."""
        return str(ray.util.get_node_ip_address())

    def node(self) -> str:
        """Id of its node."""
        return str(ray.get_runtime_context().get_node_id())

    def use_visible_device(self) -> None:
        self.use_device(_assigned_gpu())


class RayLoopbackHost(LoopbackHost):
    """LoopbackHost as an actor."""

    def node(self) -> str:
        """Id of its node."""
        return str(ray.get_runtime_context().get_node_id())

    def use_visible_device(self) -> None:
        self.use_device(_assigned_gpu())


def _like(new: RankReady, before: RankReady) -> RankReady:
    """A rank that takes another's place, with its speeds where the device is of the same kind:
    measuring them takes all ranks."""
    same = new.device_name == before.device_name
    return msgspec.structs.replace(
        new,
        transport=before.transport,
        speeds=before.speeds if same else None,
        link=before.link if same else None,
    )


def _assigned_gpu() -> int:
    """This actor's GPU as an index among those that its process sees (all of the host's: masking
    makes NCCL slow on NVSwitch hosts)."""
    ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    if not ids:
        raise RankLost("Ray gave this rank no GPU")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible.index(ids[0]) if ids[0] in visible else int(ids[0])


def _shared(arg: Any) -> Any:
    return ray.put(arg) if getattr(arg, "nbytes", 0) > PUT_BYTES else arg


def _worker_env(threads: int) -> dict[str, str]:
    env = {
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    source = Path(ringspan.__file__).resolve().parent.parent
    if source.name not in ("site-packages", "dist-packages"):  # a checkout: workers import it too
        paths = [str(source), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return env


def _cluster() -> tuple[NodeView, ...]:
    try:
        nodes = ray.nodes()
    except RayError as error:
        raise RankLost(f"Ray does not answer: {first_line(error)}") from None
    return tuple(
        NodeView(
            node_id=node["NodeID"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in nodes
        if node["Alive"]
    )


def is_answering(node_id: str) -> bool:
    """Whether something listens where a node's Ray does: seen at once, whatever Ray believes."""
    for node in ray.nodes():
        if node["NodeID"] == node_id and node["Alive"]:
            try:
                where = (node["NodeManagerAddress"], node["NodeManagerPort"])
                socket.create_connection(where, timeout=PROBE_TIMEOUT_S).close()
            except OSError:
                return False
            return True
    return False


def _need(spec: GangSpec) -> GangNeed:
    return GangNeed(
        world_size=spec.world_size,
        device=spec.device,
        threads=spec.threads,
        one_process=spec.transport == "loopback",
    )


def _rank_class() -> RankFactory:
    from ringspan.cluster.rank import Rank  # imports torch and transformers: seconds

    return Rank
