"""A rank's model, device, transport and buffers: what prefills and answers both run on."""

from __future__ import annotations

import os
import socket
import statistics
import time
from datetime import timedelta
from typing import Any

import msgspec
import torch

from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.compute import Compute
from ringspan.attention.cost import Link, Speeds, link_from
from ringspan.attention.engine import Rules, Step
from ringspan.attention.group import GroupTransport, join_group
from ringspan.attention.hook import bind
from ringspan.attention.local import measure_backends
from ringspan.attention.loopback import LoopbackTransport, LoopbackWorld
from ringspan.attention.mask import Piece
from ringspan.attention.models.load import load_model
from ringspan.attention.models.tiling import tile_model
from ringspan.attention.symmetric import COPY_ENGINE, with_copy_engine
from ringspan.attention.transport import Message, Transport
from ringspan.cluster.device import device_named, on_device, product_name
from ringspan.cluster.messages import GangSpec, ModelFacts, RankReady
from ringspan.cluster.speeds import speeds_of
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


LINK_BYTES = {"cuda": (2**20, 2**26), "cpu": (2**16, 2**22)}
"""Of the two exchanges that a link is measured by."""
LINK_REPEATS, CALL_REPEATS = 5, 20


class _NoAttention(Step):
    """For measuring the rest of the model."""

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return q.contiguous()


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
        self.compute = Compute(spec.backend, alternate=spec.world_size > 1)
        self.captures = True
        """Whether decode steps may become CUDA graphs, where they can."""
        self._model: Any = None

    def host_store(self, address: str = "") -> tuple[str, int]:
        """Opens the gang's meeting point: its address and port. address: this host's, as others
        reach it; empty: what its name stands for."""
        address = address or socket.gethostbyname(socket.gethostname())
        self._store = torch.distributed.TCPStore(
            address, 0, self.spec.world_size, is_master=True, wait_for_workers=False
        )
        return address, self._store.port

    def start(self, rendezvous: Rendezvous) -> RankReady:
        """`load` and `join`."""
        world = rendezvous if isinstance(rendezvous, LoopbackWorld) else None
        began = time.perf_counter()
        ready = self.load(world)
        transport = self.join(rendezvous)
        elapsed_s = time.perf_counter() - began
        return msgspec.structs.replace(ready, transport=transport, elapsed_s=elapsed_s)

    def load(self, world: LoopbackWorld | None = None) -> RankReady:
        """Loads the weights, which are all that takes long; `join` comes next. world: of loopback
        ranks."""
        began = time.perf_counter()
        spec = self.spec
        torch.set_num_threads(spec.threads or max(1, (os.cpu_count() or 1) // spec.world_size))
        with on_device(self.device):
            loaded = self._load(world)
            self._model, self.facts = loaded.model, loaded.facts
            self.dtype = getattr(torch, loaded.facts.dtype)
            self._weights_bytes = loaded.weights_bytes
            sharers = spec.world_size if world is not None or self.device.type == "cpu" else 1
            free = free_bytes(self.device)
            reserve = RESERVE_BYTES[self.device.type]
            self.pool = Pool(self.device, max(0, free - reserve) // sharers)
        return RankReady(
            rank=self.rank,
            device=str(self.device),
            device_name=product_name(self.device),
            host=socket.gethostname(),
            pid=os.getpid(),
            transport="loopback" if world is not None else self._backend(),
            facts=loaded.facts,
            weights_bytes=loaded.weights_bytes,
            free_bytes=free // sharers,
            elapsed_s=time.perf_counter() - began,
        )

    def join(self, rendezvous: Rendezvous) -> str:
        """Joins the gang's group; what moves its bytes. A rank that was in another group has left
        it, and keeps all else."""
        self.leave("it joins another group")
        with on_device(self.device):
            self.transport = self._join(rendezvous)
        loopback = isinstance(rendezvous, LoopbackWorld)
        return "loopback" if loopback else self._transport_name()

    def leave(self, why: str) -> None:
        """Of the group, if there is one; see `GroupTransport.leave`. May be repeated."""
        transport = getattr(self, "transport", None)
        if isinstance(transport, GroupTransport):
            transport.leave(why)

    def compile_attention(self) -> None:
        """Measures which backend is the fastest here, if that is not known, and calls every kernel
        that chunks will call for, with and without a diagonal, once: FlashAttention 4 takes seconds
        to compile one, and not all of them show in a short context."""
        facts, rows, keys = self.facts, 1024, 2048
        with on_device(self.device):
            measure_backends(
                self.device, self.dtype, facts.num_q_heads, facts.num_kv_heads, facts.head_dim
            )
            q = torch.zeros(
                (rows, facts.num_q_heads, facts.head_dim), dtype=self.dtype, device=self.device
            )
            k = q.new_zeros((keys, facts.num_kv_heads, facts.head_dim))
            for window in {None, *facts.windows}:
                rules = Rules(0, facts.head_dim**-0.5, window)
                for causal in (False, True):
                    piece = Piece(0, rows, 0, keys, causal, keys - rows if causal else 0, window)
                    if causal or window is None:
                        part = self.compute.attend(q, k, k, piece, rules)
            self.compute.merge([part, part], torch.empty_like(q))
            self.compute.join()

    def compile_codec(self, codec_name: str, page_tokens: int) -> None:
        """What encodes and decodes pages, once."""
        chosen = codec(codec_name)
        with on_device(self.device):
            k = torch.zeros(
                (page_tokens, self.facts.num_kv_heads, self.facts.head_dim),
                dtype=self.dtype, device=self.device,
            )  # fmt: skip
            specs = chosen.specs(self.facts.num_kv_heads, self.facts.head_dim, self.dtype)
            into = tuple(
                k.new_empty((spec.units(page_tokens), *spec.shape), dtype=spec.dtype)
                for spec in specs
            )
            chosen.encode(k, k, into)
            chosen.decode(into, torch.empty_like(k), torch.empty_like(k))

    def work_bytes(self) -> int:
        """The device's memory at its fullest since the last reset, without weights and KV; 0 on a
        CPU, and where loopback ranks share it."""
        if self.device.type != "cuda" or (self._loopback and self.spec.world_size > 1):
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        return max(0, peak - self._weights_bytes - self.pool.in_use_bytes)

    def forward(
        self,
        ids: torch.Tensor,
        where: torch.Tensor,
        step: Step,
        *,
        logits: bool,
        last_only: bool,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens through the model: ids, where (their positions) int64 [T] -> hidden states
        [T, hidden], or logits [T, vocabulary] ([1, vocabulary] with last_only, or of the `rows`
        int64 that are wanted)."""
        arguments = {
            "input_ids": ids[None].to(self.device),
            "position_ids": where[None].to(self.device),
            "use_cache": False,
            "ringspan": step,
        }
        keep = int(last_only) if rows is None else rows.to(self.device)
        with on_device(self.device), torch.inference_mode():
            if logits:
                out: torch.Tensor = self._model(**arguments, logits_to_keep=keep).logits
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

    def measure_speeds(self) -> tuple[Speeds | None, Link | None]:
        """Of this rank's device and of its link, for the planner; every rank, after the kernels
        were compiled. Nothing where `spec.measure` says so; loopback ranks measure once."""
        wanted = self.device.type == "cuda" if self.spec.measure is None else self.spec.measure
        if not wanted:
            return None, None
        shared: dict[str, Any] = {}
        if isinstance(self.transport, LoopbackTransport):
            shared = self.transport.world.shared
        with on_device(self.device):
            if "speeds" not in shared:
                shared["speeds"] = speeds_of(
                    self.device, self.facts, self.spec.backend, self._without_attention
                )
            link = self._link() if self.spec.world_size > 1 else None
        self.buffers.clear()
        return shared["speeds"], link

    def _without_attention(self, rows: int) -> None:
        where = torch.arange(rows)
        ids = torch.zeros(rows, dtype=torch.int64)
        self.forward(ids, where, _NoAttention(), logits=False, last_only=False)

    def _link(self) -> Link:
        """Two sizes of exchange, and what starting one costs the host."""
        small, large = LINK_BYTES[self.device.type]
        small_s, large_s = (self.measure_link(size, LINK_REPEATS) for size in (small, large))
        if self._loopback:
            # Loopback ranks take turns: what one of them saw are the exchanges of all.
            small_s, large_s = small_s / self.spec.world_size, large_s / self.spec.world_size
        link = link_from(small, small_s, large, large_s)
        if self.device.type == "cpu":
            shared = self._loopback
            return msgspec.structs.replace(link, shared_device=shared, overlaps=not shared)
        link = msgspec.structs.replace(link, call_s=self._exchange_call_s(small))
        if self._loopback:  # a copy follows the last one; the host's time is call_s
            link = msgspec.structs.replace(link, latency_s=0.0, shared_device=True)
        return link

    def _exchange_call_s(self, num_bytes: int) -> float:
        """Host seconds of one exchange, its device work left behind it."""
        rank, world_size = self.rank, self.spec.world_size
        out, into = self.buffers.lease("link", [Shape((num_bytes,), torch.uint8)] * 2)
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        for _ in range(CALL_REPEATS):
            self.transport.start(
                [Message(half, (rank + 1) % world_size) for half in out.chunk(2)],
                [Message(half, (rank - 1) % world_size) for half in into.chunk(2)],
            ).wait()
        taken = (time.perf_counter() - began) / CALL_REPEATS
        torch.cuda.synchronize(self.device)
        return taken / world_size if self._loopback else taken

    @property
    def _loopback(self) -> bool:
        return isinstance(self.transport, LoopbackTransport)

    def stop(self) -> None:
        if self._model is not None:
            self.transport.close()
            self._model = None
            self.buffers.clear()

    def _load(self, world: LoopbackWorld | None) -> Any:
        if world is None:
            return self._bound(load_model(self.spec.model, self.device))
        if "model" not in world.shared:  # ranks of one process share: nothing writes to it
            world.shared["model"] = self._bound(load_model(self.spec.model, self.device))
        return world.shared["model"]

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
        group = join_group(
            self._backend(), store, self.rank, world_size, self.device, self.spec.timeout_s
        )
        return with_copy_engine(group, store) if self.spec.transport == COPY_ENGINE else group

    def _backend(self) -> str:
        if self.spec.transport in ("gloo", "nccl"):
            return self.spec.transport
        return "nccl" if self.device.type == "cuda" else "gloo"

    def _transport_name(self) -> str:
        joined = self.transport
        return joined.name if isinstance(joined, GroupTransport) else self._backend()
