"""The directory as a Ray actor: named, detached, started anew from its journal when it dies.

`join_directory` is for drivers: the first one starts the actor, on its own node (where the journal
lies), and every later one on the cluster finds it. `RayDirectory` is a directory like any other;
Ray's errors end in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ringspan.errors import PeerTimeout, RingspanError, StoreError
from ringspan.kvstore.directory import ContextInfo, Directory, open_directory
from ringspan.kvstore.leases import LONGEST_S, Lease
from ringspan.kvstore.prefixes import Copy, Leading
from ringspan.kvstore.records import PageEntry, Shelf, Tier

NAME = "ringspan-directory"
RAY_NAMESPACE = "ringspan"
CALL_TIMEOUT_S = 30.0
"""For one call, the time to start the actor anew included."""

T = TypeVar("T")


class DirectoryHost:
    """Directory behind an actor. Ray makes it again after a death: the first call replays."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._directory: Directory | None = None

    def call(self, method: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Called by every `RayDirectory`; may be repeated, as the directory's methods may."""
        if self._directory is None:
            self._directory = open_directory(self._path)
        return getattr(self._directory, method)(*args, **named)


class RayDirectory:
    """`Directory`, asked over Ray; see there for what each method does. PeerTimeout where the
    actor does not answer, StoreError where it is gone for good."""

    shared = True

    def __init__(self, actor: Any, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._actor, self._timeout_s = actor, timeout_s

    def join(self, holder: str, silence_s: float = 0.0) -> int:
        return self._call(int, "join", holder, silence_s)

    def beat(self, holder: str, epoch: int) -> None:
        self._tell("beat", holder, epoch)

    def leave(self, holder: str, epoch: int) -> bool:
        return self._call(bool, "leave", holder, epoch)

    def declare(
        self,
        namespace: str,
        context_id: str,
        keys: Sequence[str],
        num_tokens: int,
        *,
        owner: str,
        epoch: int,
        ref: str,
    ) -> None:
        self._tell(
            "declare", namespace, context_id, tuple(keys), num_tokens,
            owner=owner, epoch=epoch, ref=ref,
        )  # fmt: skip

    def stage(
        self,
        holder: str,
        epoch: int,
        write: str,
        namespace: str,
        shelf: Shelf,
        pages: Sequence[PageEntry],
    ) -> None:
        self._tell("stage", holder, epoch, write, namespace, shelf, tuple(pages))

    def publish(self, holder: str, epoch: int, write: str, num_pages: int) -> None:
        self._tell("publish", holder, epoch, write, num_pages)

    def abort(self, holder: str, epoch: int, write: str) -> None:
        self._tell("abort", holder, epoch, write)

    def withdraw(
        self,
        holder: str,
        epoch: int,
        namespace: str,
        shelf: Shelf,
        keys: Sequence[str] | None = None,
    ) -> int:
        return self._call(int, "withdraw", holder, epoch, namespace, shelf, keys)

    def check_unread(self, holder: str, epoch: int, namespace: str, shelf: Shelf) -> None:
        self._tell("check_unread", holder, epoch, namespace, shelf)

    def discard(
        self,
        holder: str,
        epoch: int,
        namespace: str,
        shelf: Shelf,
        keys: Sequence[str] | None,
        why: str,
    ) -> int:
        return self._call(int, "discard", holder, epoch, namespace, shelf, keys, why)

    def forget(self, namespace: str, context_id: str) -> bool:
        return self._call(bool, "forget", namespace, context_id)

    def forget_lost(self, namespace: str) -> tuple[str, ...]:
        return self._call(tuple, "forget_lost", namespace)

    def refer(
        self,
        owner: str,
        epoch: int,
        ref: str,
        namespace: str,
        context_id: str,
        *,
        holder: str = "",
        place: str = "",
    ) -> None:
        self._tell("refer", owner, epoch, ref, namespace, context_id, holder=holder, place=place)

    def release(self, owner: str, epoch: int, ref: str) -> bool:
        return self._call(bool, "release", owner, epoch, ref)

    def lease(
        self,
        namespace: str,
        context_id: str,
        holder: str,
        epoch: int,
        shelf: Shelf,
        *,
        key: str = "",
        ttl_s: float = LONGEST_S,
    ) -> Lease:
        return self._call(
            Lease, "lease", namespace, context_id, holder, epoch, shelf, key=key, ttl_s=ttl_s
        )

    def check(self, lease: Lease) -> Lease:
        return self._call(Lease, "check", lease)

    def renew(self, lease: Lease, ttl_s: float = LONGEST_S) -> Lease:
        return self._call(Lease, "renew", lease, ttl_s)

    def end_lease(self, lease: Lease) -> bool:
        return self._call(bool, "end_lease", lease)

    def known(self, namespace: str, keys: Sequence[str]) -> int:
        return self._call(int, "known", namespace, tuple(keys))

    def leading(
        self, namespace: str, keys: Sequence[str], *, form: str = "", lowest: int = 0
    ) -> list[Leading]:
        return self._call(list, "leading", namespace, tuple(keys), form=form, lowest=lowest)

    def locate(
        self,
        namespace: str,
        keys: Sequence[str],
        *,
        here: Sequence[str] = (),
        lowest: int = 0,
    ) -> list[Copy | None]:
        return self._call(list, "locate", namespace, tuple(keys), here=tuple(here), lowest=lowest)

    def contexts(self, namespace: str) -> tuple[ContextInfo, ...]:
        return self._call(tuple, "contexts", namespace)

    def used_bytes(self, namespace: str) -> dict[Tier, int]:
        return self._call(dict, "used_bytes", namespace)

    def in_use(self, namespace: str, key: str) -> int:
        return self._call(int, "in_use", namespace, key)

    def _tell(self, method: str, *args: Any, **named: Any) -> None:
        self._call(object, method, *args, **named)

    def _call(self, kind: type[T], method: str, *args: Any, **named: Any) -> T:
        """kind: of the answer; it is what the directory's method gives back."""
        try:
            asked = self._actor.call.remote(method, args, named)
            return cast("T", ray.get(asked, timeout=self._timeout_s))
        except RayTaskError as error:
            if isinstance(error.cause, RingspanError):
                raise error.cause from None
            raise
        except GetTimeoutError:
            raise PeerTimeout(
                f"the directory did not answer {method} within {self._timeout_s:g} s"
            ) from None
        except RayActorError as error:
            why = "its node is gone" if "node" in str(error) else "its process is gone"
            raise StoreError(f"the directory is lost ({why}): start it again") from None
        except RayError as error:
            line = str(error).strip().splitlines()[0]
            raise StoreError(f"the directory cannot be asked: {line}") from None


def join_directory(path: Path | str, name: str = NAME) -> RayDirectory:
    """The cluster's directory of that name; the first caller starts it on this node, with its
    journal at `path`. It outlives its drivers: `end_directory` ends it."""
    here = ray.get_runtime_context().get_node_id()
    actor = (
        ray.remote(DirectoryHost)
        .options(
            name=name,
            namespace=RAY_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=3,  # a call may be repeated: see Directory
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(str(Path(path).absolute()))
    )
    return RayDirectory(actor)


def end_directory(name: str = NAME) -> bool:
    """End the actor; its journal stays. False if there was none."""
    try:
        actor = ray.get_actor(name, namespace=RAY_NAMESPACE)
    except ValueError:
        return False
    ray.kill(actor, no_restart=True)
    return True
