"""What a controller needs of a directory, in this process or behind an actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ringspan.kvstore.leases import LONGEST_S, Lease
from ringspan.kvstore.prefixes import Leading
from ringspan.kvstore.records import PageEntry, Shelf


class PageDirectory(Protocol):
    """Of `kvstore.directory.Directory`: see there. `RayDirectory` is the one behind an actor."""

    shared: bool
    """Others use it too: whoever joins must be heard from."""

    def join(self, holder: str, silence_s: float = 0.0) -> int: ...
    def beat(self, holder: str, epoch: int) -> None: ...
    def leave(self, holder: str, epoch: int) -> bool: ...
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
    ) -> None: ...
    def stage(
        self,
        holder: str,
        epoch: int,
        write: str,
        namespace: str,
        shelf: Shelf,
        pages: Sequence[PageEntry],
    ) -> None: ...
    def publish(self, holder: str, epoch: int, write: str, num_pages: int) -> None: ...
    def withdraw(
        self,
        holder: str,
        epoch: int,
        namespace: str,
        shelf: Shelf,
        keys: Sequence[str] | None = None,
    ) -> int: ...
    def check_unread(self, holder: str, epoch: int, namespace: str, shelf: Shelf) -> None: ...
    def discard(
        self,
        holder: str,
        epoch: int,
        namespace: str,
        shelf: Shelf,
        keys: Sequence[str] | None,
        why: str,
    ) -> int: ...
    def forget_lost(self, namespace: str) -> tuple[str, ...]: ...
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
    ) -> None: ...
    def release(self, owner: str, epoch: int, ref: str) -> bool: ...
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
    ) -> Lease: ...
    def renew(self, lease: Lease, ttl_s: float = LONGEST_S) -> Lease: ...
    def end_lease(self, lease: Lease) -> bool: ...
    def in_use(self, namespace: str, key: str) -> int: ...
    def leading(
        self, namespace: str, keys: Sequence[str], *, form: str = "", lowest: int = 0
    ) -> list[Leading]: ...
