"""A device's memory for KV: who holds how much, and refusing in advance what cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ringspan.errors import TooLarge
from ringspan.kvstore.codecs.registry import PageCodec, encoded_bytes, or_smaller
from ringspan.kvstore.shard import GIB, ContextShard

if TYPE_CHECKING:
    from collections.abc import Mapping

RESERVE_BYTES = {"cuda": 4 * GIB, "cpu": GIB // 2}
"""Left free for activations, exchange buffers and the allocator's gaps."""


class Pool:
    """Shards of one device by name, within a budget of bytes.

    budget_bytes None: what the device has free now, less `reserve_bytes` (None: RESERVE_BYTES).
    Weights must be on the device before, since they are what is no longer free.
    """

    def __init__(
        self,
        device: torch.device | str,
        budget_bytes: int | None = None,
        reserve_bytes: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        reserve = RESERVE_BYTES.get(self.device.type, 0) if reserve_bytes is None else reserve_bytes
        self.budget_bytes = (
            max(0, free_bytes(self.device) - reserve) if budget_bytes is None else budget_bytes
        )
        self._shards: dict[str, ContextShard] = {}

    @property
    def in_use_bytes(self) -> int:
        return sum(shard.capacity_bytes for shard in self._shards.values())

    @property
    def free_bytes(self) -> int:
        """Of the budget."""
        return max(0, self.budget_bytes - self.in_use_bytes)

    @property
    def shards(self) -> Mapping[str, ContextShard]:
        """By the name of the context or session that holds it."""
        return self._shards

    def allocate(
        self,
        name: str,
        codec: PageCodec,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        capacity_tokens: int,
        page_tokens: int,
    ) -> ContextShard:
        """A new shard under a name that holds none. Raises `TooLarge` beyond the budget."""
        if name in self._shards:
            raise ValueError(f"{name} holds a shard on {self.device} already: free it first")
        need = encoded_bytes(codec, num_layers, num_kv_heads, head_dim, dtype, capacity_tokens)
        self.check(name, need, codec.name)
        shard = ContextShard(
            codec,
            num_layers,
            num_kv_heads,
            head_dim,
            dtype,
            self.device,
            capacity_tokens,
            page_tokens,
        )
        self._shards[name] = shard
        return shard

    def check(self, name: str, need_bytes: int, codec_name: str = "raw") -> None:
        """Raises `TooLarge` when the budget has no `need_bytes` left."""
        if need_bytes <= self.free_bytes:
            return
        raise TooLarge(
            f"{name} needs {need_bytes / GIB:.2f} GiB of KV on {self.device}, "
            f"{self.free_bytes / GIB:.2f} GiB are free (budget {self.budget_bytes / GIB:.2f}, in "
            f"use {self.in_use_bytes / GIB:.2f}): fewer tokens, more ranks{or_smaller(codec_name)}"
        )

    def free(self, name: str) -> None:
        """Give the shard's memory back. Repeating it does no harm.

        A context's goes back to the device; a tail's stays with torch's allocator for the next one.
        """
        shard = self._shards.pop(name, None)
        if shard is not None and shard.capacity_bytes >= GIB and self.device.type == "cuda":
            del shard
            torch.cuda.empty_cache()


def free_bytes(device: torch.device | str) -> int:
    """Bytes that an allocation on this device can have now."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return min(_meminfo_available(), _cgroup_available())


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise TooLarge("/proc/meminfo names no MemAvailable: give the pool a budget")


def _cgroup_available() -> int:
    """What a container's limit leaves (cgroup v2); without a limit no bound."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    if limit == "max":
        return 1 << 62
    cached = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))  # given back
    return max(0, int(limit) - used + cached)
