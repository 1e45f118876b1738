"""What `bench store` moves: a stored context of random bytes in the form of a real model's pages.

The store does not look into a page, so its bytes may be any; they do not compress. Everything else
is the shipped way: pages are sealed by a shard, written by `save_shard`, published by a `Store`.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from ringspan.attention.kv import unit_tokens
from ringspan.cluster.messages import ModelSpec, PageRecord
from ringspan.errors import RingspanError
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.folder import Store, segment_path
from ringspan.kvstore.keys import PUBLIC_NAMESPACE, context_id, namespace_digest, page_keys
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.page import Origin, Page
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.tiers.host import HostTier
from ringspan.kvstore.transfer import save_shard
from ringspan.types import Span, page_tokens_for

START_S = 20.0
"""For the host store's process to answer."""


class StoreCase(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of the context; 32 layers of 8 heads of 128 are Llama 3.1 8B's."""

    codec: str = "raw"
    pages: int = 64
    num_layers: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    repeats: int = 5
    seed: int = 0

    @property
    def text(self) -> str:
        return (
            f"{self.pages} pages of {self.num_layers} layers, {self.num_kv_heads} kv heads of "
            f"{self.head_dim}, codec {self.codec} of {self.dtype}"
        )


class Stored(NamedTuple):
    """The context, in memory and in a store."""

    store: Store
    manifest: Manifest
    shard: ContextShard
    """On the CPU; what the store was written from."""
    origin: Origin

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.manifest.keys)

    @property
    def payload_bytes(self) -> int:
        return self.manifest.payload_bytes

    @property
    def page_bytes(self) -> int:
        return self.shard.page_bytes

    @property
    def segments(self) -> list[Path]:
        """The files that hold the pages."""
        return sorted(self.store.folder(self.manifest).glob("*.seg"))

    def pages(self) -> list[Page]:
        """Sealed, in host memory."""
        return [self.shard.export_page(i, self.origin, self.keys) for i in range(self.num_pages)]

    @property
    def num_pages(self) -> int:
        return len(self.manifest.pages)


def new_shard(like: ContextShard, device: torch.device | str) -> ContextShard:
    """Empty, of the same form and size."""
    return ContextShard(
        like.codec,
        like.num_layers,
        like.num_kv_heads,
        like.head_dim,
        like.dtype,
        device,
        like.capacity_tokens,
        like.page_tokens,
    )


def make_stored(case: StoreCase, root: Path) -> Stored:
    """The context of `case`, published in a store under `root`."""
    shard = random_shard(case)
    token_ids = np.random.default_rng(case.seed).integers(
        0, 50_000, shard.num_tokens, dtype=np.int32
    )
    fingerprint = f"{case.seed:064x}"
    keys = page_keys(fingerprint, PUBLIC_NAMESPACE, token_ids, shard.page_tokens)
    origin = Origin(
        fingerprint=fingerprint,
        namespace=namespace_digest(PUBLIC_NAMESPACE),
        rope="applied theta=500000",
    )
    store = Store(root)
    with store.staged(context_id(keys), token_ids) as staging:
        records: tuple[PageRecord, ...] = save_shard(shard, origin, keys, segment_path(staging, 0))
        manifest = store.publish(
            staging,
            Manifest(
                context_id=context_id(keys),
                model=ModelSpec(name="random:bench-store"),
                origin=origin,
                form=shard.form,
                namespace=PUBLIC_NAMESPACE.hex(),
                num_tokens=shard.num_tokens,
                layout="contiguous",
                chunk_tokens=shard.num_tokens,
                world_size=1,
                created_unix_s=time.time(),
                title=f"bench store: {case.text}",
                document_tokens=Span(0, shard.num_tokens),
                payload_bytes=sum(record.payload_bytes for record in records),
                pages=records,
            ),
        )
    return Stored(store, manifest, shard, origin)


def random_shard(case: StoreCase) -> ContextShard:
    """A full shard of random bytes, on the CPU."""
    dtype = getattr(torch, case.dtype)
    made = codec(case.codec)
    unit = unit_tokens(made.specs(case.num_kv_heads, case.head_dim, dtype))
    page_tokens = unit if unit > 1 else page_tokens_for(case.head_dim)
    tokens = case.pages * page_tokens
    shard = ContextShard(
        made, case.num_layers, case.num_kv_heads, case.head_dim, dtype, "cpu", tokens, page_tokens
    )
    shard.reserve([Span(0, tokens)])
    random = np.random.default_rng(case.seed)
    for page in range(case.pages):
        payload = torch.from_numpy(random.integers(0, 256, shard.page_bytes, dtype=np.uint8))
        shard.fill(page * page_tokens, page_tokens, payload[None])
    shard.mark_filled()
    return shard


@contextmanager
def host_store(capacity_bytes: int, parent: Path) -> Iterator[HostTier]:
    """A host store of its own, as a process; it and its memory are gone at the end. `parent`: on a
    file system in memory. Raises RingspanError where it does not start."""
    folder = parent / f"ringspan-bench-{secrets.token_hex(4)}"
    command = [sys.executable, "-P", "-m", "ringspan.kvstore.tiers.host_server"]
    process = subprocess.Popen([*command, str(folder), str(capacity_bytes)])
    tier = HostTier(folder)
    try:
        deadline = time.monotonic() + START_S
        while not (folder / "store.sock").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RingspanError(
                    f"bench store: the host store in {folder} did not start (status "
                    f"{process.poll()}); its output above says why"
                )
            time.sleep(0.02)
        yield tier
    finally:
        tier.close()
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
