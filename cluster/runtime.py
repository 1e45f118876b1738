"""A rank's model, device, transport and buffers: what prefills and answers both run on."""

from __future__ import annotations

import os
import socket
import statistics
import time
from datetime import timedelta
from typing import Any

import torch

from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.compute import Compute
from ringspan.attention.engine import Step
from ringspan.attention.group import join_group
from ringspan.attention.hook import bind
from ringspan.attention.loopback import LoopbackWorld
from ringspan.attention.models.load import load_model
from ringspan.attention.models.tiling import tile_model
from ringspan.attention.transport import Message, Transport
from ringspan.cluster.device import device_named, on_device, product_name
from ringspan.cluster.messages import GangSpec, ModelFacts, RankReady
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.pool import RESERVE_BYTES, Pool, free_bytes
from ringspan.kvstore.shard import ContextShard

Rendezvous = tuple[str, int] | LoopbackWorld
"""Address and port of rank 0's store, or the world of loopback ranks."""

TILE_ROWS = 8192
"""Of a chunk that go through an MLP at once: enough to feed the matrix units, few enough that its
wide intermediate tensors stay small (0.4 GiB at 14,336 columns in bf16)."""
START_TIMEOUT_S = 300.0
"""For all ranks to load their weights and meet."""
GPU_EXCHANGE_TIMEOUT_S = 1800.0
"""NCCL counts an exchange's time from when the host enqueued it, which can be a whole chunk ahead
of the GPU; a dead rank is noticed by the controller long before."""


class Runtime:
    """`start` it before anything else."""

    transport: Transport
    facts: ModelFacts
    dtype: torch.dtype
    """What K and V are computed in."""
    pool: Pool
    """All KV of this rank; ranks that share a device share its memory evenly."""

    def __init__(self, rank: int, spec: GangSpec) -> None:
        self.rank, self.spec = rank, spec
        self.device = device_named(spec.device)
        self.buffers = Buffers(self.device)
        self.compute = Compute(spec.backend)
        self._model: Any = None

    def host_store(self) -> tuple[str, int]:
        """Opens the gang's meeting point: its address and port."""
        address = socket.gethostbyname(socket.gethostname())
        self._store = torch.distributed.TCPStore(
            address, 0, self.spec.world_size, is_master=True, wait_for_workers=False
        )
        return address, self._store.port

    def start(self, rendezvous: Rendezvous) -> RankReady:
        """Loads the weights, joins the group."""
        began = time.perf_counter()
        spec = self.spec
        torch.set_num_threads(spec.threads or max(1, (os.cpu_count() or 1) // spec.world_size))
        with on_device(self.device):
            loaded = self._load(rendezvous)
            self.transport = self._join(rendezvous)
            self._model, self.facts = loaded.model, loaded.facts
            self.dtype = getattr(torch, loaded.facts.dtype)
            loopback = isinstance(rendezvous, LoopbackWorld)
            sharers = spec.world_size if loopback or self.device.type == "cpu" else 1
            free = free_bytes(self.device)
            reserve = RESERVE_BYTES[self.device.type]
            self.pool = Pool(self.device, max(0, free - reserve) // sharers)
        return RankReady(
            rank=self.rank,
            device=str(self.device),
            device_name=product_name(self.device),
            host=socket.gethostname(),
            pid=os.getpid(),
            transport="loopback" if loopback else self._backend(),
            facts=loaded.facts,
            weights_bytes=loaded.weights_bytes,
            free_bytes=free // sharers,
            elapsed_s=time.perf_counter() - began,
        )

    def forward(
        self, ids: torch.Tensor, where: torch.Tensor, step: Step, *, logits: bool, last_only: bool
    ) -> torch.Tensor:
        """Tokens through the model: ids, where (their positions) int64 [T] -> hidden states
        [T, hidden], or logits [T, vocabulary] ([1, vocabulary] with last_only)."""
        arguments = {
            "input_ids": ids[None].to(self.device),
            "position_ids": where[None].to(self.device),
            "use_cache": False,
            "ringspan": step,
        }
        with on_device(self.device), torch.inference_mode():
            if logits:
                out: torch.Tensor = self._model(**arguments, logits_to_keep=int(last_only)).logits
            else:
                out = self._model.base_model(**arguments).last_hidden_state
        return out[0]

    def new_shard(
        self, name: str, codec_name: str, capacity_tokens: int, page_tokens: int
    ) -> ContextShard:
        """Memory for `capacity_tokens`, held in the pool under `name` until `pool.free(name)`.
        Raises TooLarge with the numbers."""
        facts = self.facts
        with on_device(self.device):
            return self.pool.allocate(
                name,
                codec(codec_name),
                facts.num_layers,
                facts.num_kv_heads,
                facts.head_dim,
                self.dtype,
                capacity_tokens,
                page_tokens,
            )

    def measure_link(self, num_bytes: int, repeats: int) -> float:
        """Seconds of one ring exchange (send to rank + 1, receive from rank - 1), the median."""
        rank, world_size = self.rank, self.spec.world_size
        taken = []
        with on_device(self.device):
            shape = [Shape((num_bytes,), torch.uint8)] * 2
            out, into = self.buffers.lease("link", shape)
            for _ in range(repeats + 1):  # the first one makes connections
                began = time.perf_counter()
                self.transport.start(
                    [Message(out, (rank + 1) % world_size)],
                    [Message(into, (rank - 1) % world_size)],
                ).wait()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])

    def stop(self) -> None:
        if self._model is not None:
            self.transport.close()
            self._model = None
            self.buffers.clear()

    def _load(self, rendezvous: Rendezvous) -> Any:
        if not isinstance(rendezvous, LoopbackWorld):
            return self._bound(load_model(self.spec.model, self.device))
        if "model" not in rendezvous.shared:  # ranks of one process share: nothing writes to it
            rendezvous.shared["model"] = self._bound(load_model(self.spec.model, self.device))
        return rendezvous.shared["model"]

    def _bound(self, loaded: Any) -> Any:
        """The model attends through us, and takes its chunks in tiles of rows."""
        bind(loaded.model)
        tile_model(loaded.model, TILE_ROWS)
        return loaded

    def _join(self, rendezvous: Rendezvous) -> Transport:
        world_size = self.spec.world_size
        if isinstance(rendezvous, LoopbackWorld):
            return rendezvous.transport(self.rank, self.device)
        if world_size == 1:
            return LoopbackWorld(1, self.spec.timeout_s).transport(0, self.device)
        address, port = rendezvous
        patience = timedelta(seconds=START_TIMEOUT_S)
        if self.rank == 0:
            store = self._store
        else:
            store = torch.distributed.TCPStore(
                address, port, world_size, is_master=False, timeout=patience
            )
        store.set_timeout(patience)
        timeout_s = self.spec.timeout_s if self.device.type == "cpu" else GPU_EXCHANGE_TIMEOUT_S
        return join_group(self._backend(), store, self.rank, world_size, self.device, timeout_s)

    def _backend(self) -> str:
        if self.spec.transport in ("gloo", "nccl"):
            return self.spec.transport
        return "nccl" if self.device.type == "cuda" else "gloo"
