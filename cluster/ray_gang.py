"""A gang of Ray actors. The one place where ranks become actors, and where Ray's errors end.

All actors come from one placement group, which this module makes and removes. A rank that dies is
not restarted: its group is broken anyway, and the controller builds a new gang.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import ringspan
from ringspan.cluster.faults import (
    Fault,
    FaultKind,
    Member,
    RanksFailed,
    blame,
    first_line,
    is_benign,
)
from ringspan.cluster.gang import (
    BENIGN_GRACE_S,
    FAULT_GRACE_S,
    RankFactory,
    stream_in_step,
)
from ringspan.cluster.host import LoopbackHost, RankHost
from ringspan.cluster.messages import GangSpec, RankReady, TokenChunk
from ringspan.cluster.placement import GangNeed, NodeView, Place, place_gang
from ringspan.cluster.processes import wait_gone
from ringspan.errors import RankLost, RingspanError, TooLarge

PLACEMENT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 5.0
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
        self._rank_class = rank_class
        self._placement_timeout_s = placement_timeout_s
        self._start_timeout_s = start_timeout_s
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._ranks_of: list[tuple[int, ...]] = []
        self._members: list[Member | None] = [None] * spec.world_size

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

    def close(self) -> None:
        """Lets ranks that are in step stop by themselves, then kills every actor and gives the
        reservation back."""
        if self.ready and not self.lost and ray.is_initialized():
            with contextlib.suppress(RingspanError):  # whoever did not stop is killed next
                self.call("stop", timeout_s=CLOSE_TIMEOUT_S, what="stopping")
        self.ready, self.lost = (), True
        actors, self._actors = self._actors, []
        group, self._group = self._group, None
        if not ray.is_initialized():
            return  # Ray has ended them already
        for actor in actors:
            ray.kill(actor, no_restart=True)
        if actors:  # a killed actor answers with an error
            probes = [actor.where.remote() for actor in actors]
            ray.wait(probes, num_returns=len(probes), timeout=CLOSE_TIMEOUT_S)
        here = [m.pid for m in self._members if m is not None and m.host == socket.gethostname()]
        wait_gone(here, CLOSE_TIMEOUT_S)  # the answer comes before the process is gone
        self._members = [None] * self.world_size
        if group is not None:
            remove_placement_group(group)

    def __enter__(self) -> Self:
        return self if self.ready else self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        place = place_gang(_cluster(), _need(self.spec))
        self.spec = msgspec.structs.replace(self.spec, threads=place.threads, device=place.device)
        self._group = self._reserve(place)
        self._actors, self._ranks_of = self._make_actors(place)

        def left() -> float:
            return max(deadline - time.monotonic(), 0.1)

        what = "starting its process"
        where = self._submit("where", what=what).result(left(), one_per_rank=False)
        self._members = [
            member for member, ranks in zip(where, self._ranks_of, strict=True) for _ in ranks
        ]
        if place.device == "cuda":
            self._submit("use_visible_device", what="choosing its GPU").result(
                left(), one_per_rank=False
            )
        what = "loading the model and joining the group"
        if self.spec.transport == "loopback":
            started = self._submit("start", what=what).result(left())
        else:
            # rank 0 serves the rendezvous on a port that it has bound, never on a guessed one
            first = self._submit_to([0], "invoke", "host_store", what="hosting the rendezvous")
            rendezvous = first.result(left(), one_per_rank=False)[0][0]
            started = self.submit("start", rendezvous, what=what).result(left())
        self.ready = tuple(started)

    def _reserve(self, place: Place) -> PlacementGroup:
        bundles = [dict(place.bundle) for _ in range(place.num_bundles)]
        share_s = self._placement_timeout_s / len(place.strategies)
        for strategy in place.strategies:
            group = placement_group(bundles, strategy=strategy)
            self._group = group  # so that close() removes it, whatever comes
            if group.wait(share_s):
                return group
            remove_placement_group(group)
            self._group = None
        free = ray.available_resources()
        raise TooLarge(
            f"{self.world_size} ranks asked for, {place.text}; the cluster has "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free and none came free "
            f"in {self._placement_timeout_s:g} s: wait for other jobs to end, or ask for fewer "
            "ranks"
        )

    def _make_actors(self, place: Place) -> tuple[list[Any], list[tuple[int, ...]]]:
        loopback = self.spec.transport == "loopback"
        host_class = ray.remote(RayLoopbackHost if loopback else RayRankHost)
        rank_class = self._rank_class or _rank_class()
        actors: list[Any] = []
        ranks_of: list[tuple[int, ...]] = []
        for index in range(place.num_bundles):
            options = host_class.options(
                num_cpus=place.bundle["CPU"],
                num_gpus=place.bundle.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=index
                ),
                runtime_env={"env_vars": _worker_env(place.threads)},
            )
            if loopback:
                actors.append(options.remote(self.spec, rank_class))
                ranks_of.append(tuple(range(self.world_size)))
            else:
                actors.append(options.remote(index, self.spec, rank_class))
                ranks_of.append((index,))
        return actors, ranks_of

    def _submit(self, host_method: str, *args: Any, what: str) -> RayPending:
        return self._submit_to(range(len(self._actors)), host_method, *args, what=what)

    def _submit_to(
        self, hosts: range | list[int], host_method: str, *args: Any, what: str
    ) -> RayPending:
        if self.lost:
            raise RankLost(f"{what}: the gang has lost a rank; start a new one")
        refs = {
            getattr(self._actors[host], host_method).remote(*args): self._ranks_of[host]
            for host in hosts
        }
        return RayPending(self, refs, what)


class RayPending:
    """Calls on their way, one per actor."""

    def __init__(self, gang: RayGang, refs: dict[Any, tuple[int, ...]], what: str) -> None:
        self._gang, self._refs, self._what = gang, refs, what

    def result(self, timeout_s: float, *, one_per_rank: bool = True) -> list[Any]:
        """One result per rank; or what each host gave back, as it is."""
        answers, faults = self._gather(timeout_s)
        if faults:
            gang = self._gang
            gang.lost = gang.lost or not is_benign(faults)
            cause = RanksFailed(tuple(faults)) if any(f.traceback for f in faults) else None
            raise blame(faults, gang._members, self._what) from cause
        in_order = [answers[ref] for ref in self._refs]
        if not one_per_rank:
            return in_order
        return [result for answer in in_order for result in answer]

    def _gather(self, timeout_s: float) -> tuple[dict[Any, Any], list[Fault]]:
        answers: dict[Any, Any] = {}
        faults: list[Fault] = []
        waiting = list(self._refs)
        deadline = time.monotonic() + timeout_s
        while waiting:
            left_s = deadline - time.monotonic()
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(left_s, 0.0))
            if not done:
                break
            had_faults = bool(faults)
            for ref in done:
                try:
                    answers[ref] = ray.get(ref, timeout=max(left_s, 1.0))
                except Exception as error:
                    faults += _faults_of(self._refs[ref], error)
            if faults and not had_faults:
                grace_s = BENIGN_GRACE_S if is_benign(faults) else FAULT_GRACE_S
                deadline = min(deadline, time.monotonic() + grace_s)
        silent_s = timeout_s if not faults else FAULT_GRACE_S
        for ref in waiting:
            text = f"waited {silent_s:.1f} s"
            faults += [Fault(rank, FaultKind.SILENT, text) for rank in self._refs[ref]]
        return answers, faults


class RayRankHost(RankHost):
    """RankHost as an actor."""

    def use_visible_device(self) -> None:
        self.use_device(_assigned_gpu())


class RayLoopbackHost(LoopbackHost):
    """LoopbackHost as an actor."""

    def use_visible_device(self) -> None:
        self.use_device(_assigned_gpu())


def _assigned_gpu() -> int:
    """This actor's GPU as an index among those that its process sees (all of the host's: masking
    makes NCCL slow on NVSwitch hosts)."""
    ids = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    if not ids:
        raise RankLost("Ray gave this rank no GPU")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible.index(ids[0]) if ids[0] in visible else int(ids[0])


def _faults_of(ranks: tuple[int, ...], error: Exception) -> list[Fault]:
    """Ray's exceptions end here."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RanksFailed):
        return list(cause.faults)
    if isinstance(error, RayActorError):
        return [Fault(rank, FaultKind.DIED, _death(error)) for rank in ranks]
    if isinstance(error, GetTimeoutError):
        return [Fault(rank, FaultKind.SILENT, "its answer did not arrive") for rank in ranks]
    kind = FaultKind.FAILED if isinstance(error, RayTaskError) else FaultKind.DIED
    text = first_line(cause if isinstance(cause, BaseException) else error)
    return [Fault(rank, kind, text, traceback=str(error)) for rank in ranks]


def _death(error: RayActorError) -> str:
    """Ray's many lines about a dead actor, as half a line."""
    text = str(error)
    if error.preempted:
        return "its node was taken away"
    if "running low on memory" in text:  # Ray's own monitor; a guess at the kernel's is not told
        return "Ray ended it because its node ran low on memory"
    if "creation task" in text:
        return text.strip().splitlines()[-1].strip()
    if "node" in text and "has been marked dead" in text:
        return "its node is gone"
    return "its process is gone"


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
