"""A scheme on a simulated clock: the very code of `schemes/`, no data, any number of ranks.

What a scheme does never depends on time or on numbers, only on shapes. So each rank's scheme runs
once, alone, from beginning to end on torch's meta device, and what it asks for is written down:
kernels with their seconds, exchanges with their bytes, waits. Then the programs are played
against clocks (clocks.py). No threads, so nothing depends on their order: one program, one result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ringspan.attention.backends.case import Mask, canonical_blocks
from ringspan.attention.buffers import Buffers, Shape
from ringspan.attention.clocks import Op, Played, Simulated, Start, Wait, Work
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.cost import AttentionFit, Link, Speeds
from ringspan.attention.exposure import Exposure
from ringspan.attention.kv import AttendsInPlace, Codec, specs_bytes
from ringspan.attention.layer import Layer
from ringspan.attention.mask import Piece, seen_keys
from ringspan.attention.problem import Problem
from ringspan.attention.schemes.table import Scheme, scheme_named
from ringspan.attention.transport import ByMessages, Message
from ringspan.types import Part

META = torch.device("meta")


@dataclass
class SimulatedWorld:
    """What the simulated ranks share. `run` runs a function a rank, then plays what they did."""

    world_size: int
    speeds: Speeds
    link: Link
    timeout_s: float = 60.0
    dead: frozenset[int] = frozenset()
    """Ranks that never do anything."""
    carries: bool = False
    """The backend continues accumulators (`Compute.carries`)."""
    programs: list[list[Op]] = field(init=False)
    views: dict[object, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    """Meta tensors by shape: they hold nothing, so all ranks may have the same."""

    def __post_init__(self) -> None:
        self.programs = [[] for _ in range(self.world_size)]

    def transport(self, rank: int) -> SimulatedTransport:
        return SimulatedTransport(self, rank)

    def compute(self, rank: int) -> SimulatedCompute:
        return SimulatedCompute(self, rank)

    def buffers(self) -> SimulatedBuffers:
        return SimulatedBuffers(self)

    def empty(self, shapes: Sequence[Shape]) -> tuple[torch.Tensor, ...]:
        key = tuple(shapes)
        if key not in self.views:
            self.views[key] = tuple(torch.empty(s.shape, dtype=s.dtype, device=META) for s in key)
        return self.views[key]

    def run(self, bodies: Sequence[Callable[[], object]]) -> Simulated:
        """bodies[r] as rank r, one after the other. Raises PeerTimeout, as the ranks would, where
        one waits for a peer longer than `timeout_s`."""
        for rank, body in enumerate(bodies):
            if rank not in self.dead:
                self.record(rank, body)
        return Played(self.programs, self.link, self.timeout_s, self.dead).play()

    def record(self, rank: int, body: Callable[[], object]) -> None:
        self.programs[rank] = []
        with _Copies(self, rank):
            body()

    def work(self, rank: int, what: str, device_s: float, host_s: float, num_bytes: int) -> None:
        self.programs[rank].append(Work(what, device_s, host_s, num_bytes))


class SimulatedTransport(ByMessages):
    """Writes down what its rank exchanges. Received tensors hold nothing."""

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self.world, self.rank, self.world_size = world, rank, world.world_size
        self.exchange_s, self.sent_bytes = 0.0, 0
        self.exposure = SimulatedExposure()
        self._exchanges = 0

    def start(
        self, sends: Sequence[Message], recvs: Sequence[Message], step: int = 0
    ) -> SimulatedPending:
        number = self._exchanges
        self._exchanges += 1
        sent, received = _by_peer(sends), _by_peer(recvs)
        self.sent_bytes += sum(num_bytes for _, num_bytes in sent)
        self.world.programs[self.rank].append(Start(number, step, sent, received))
        return SimulatedPending(self, number)

    def close(self) -> None:
        pass


class SimulatedPending:
    def __init__(self, transport: SimulatedTransport, exchange: int) -> None:
        self._transport, self._exchange = transport, exchange

    def wait(self) -> None:
        transport = self._transport
        transport.world.programs[transport.rank].append(Wait(self._exchange))


class SimulatedExposure(Exposure):
    """Nothing is known before the programs are played; see `Simulated.exposed_s`."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    @contextlib.contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        yield


class SimulatedBuffers(Buffers):
    """Counts what would be leased."""

    def __init__(self, world: SimulatedWorld) -> None:
        super().__init__(META)
        self._world, self._sizes = world, dict[str, int]()

    def lease(self, name: str, shapes: Sequence[Shape]) -> tuple[torch.Tensor, ...]:
        size = sum(shape.nbytes for shape in shapes)
        self._sizes[name] = max(size, self._sizes.get(name, 0))
        return self._world.empty(shapes)

    @property
    def nbytes(self) -> int:
        return sum(self._sizes.values())


class SimulatedCompute(Compute):
    """Costs time and gives tensors of the right shape."""

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        super().__init__("auto")
        self._world, self._rank, self._speeds = world, rank, world.speeds

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        piece: Piece,
        rules: Rules,
        by_rule: bool = False,
    ) -> Part:
        self._attend(q, k, piece)
        out, lse = self._world.empty(
            (Shape(tuple(q.shape), q.dtype), Shape(tuple(q.shape[:2]), torch.float32))
        )
        return Part(out, lse)

    def carries(self, q: torch.Tensor) -> bool:
        return self._world.carries

    def attend_into(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        piece: Piece,
        rules: Rules,
        into: Part,
    ) -> None:
        self._attend(q, k, piece)

    def attend_encoded(
        self,
        codec: Codec,
        q: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        piece: Piece,
        rules: Rules,
    ) -> Part | None:
        """Reads the codes at the rate at which few rows read keys, once for all rows."""
        if piece.causal or piece.window is not None or not isinstance(codec, AttendsInPlace):
            return None
        if not codec.serves(q, tensors):
            return None
        keys = piece.k1 - piece.k0
        specs = codec.specs(tensors[0].shape[1], q.shape[2], q.dtype)
        speeds, num_bytes = self._speeds, specs_bytes(specs, keys)
        pairs_s = speeds.attention.pair_s * keys * q.shape[0] * q.shape[1]
        device_s = speeds.attention.fixed_s + max(num_bytes / speeds.scan_bytes_per_s, pairs_s)
        self._world.work(self._rank, "attend", device_s, speeds.attend_call_s, 0)
        out, lse = self._world.empty(
            (Shape(tuple(q.shape), q.dtype), Shape(tuple(q.shape[:2]), torch.float32))
        )
        return Part(out, lse)

    def decode(
        self,
        codec: Codec,
        tensors: tuple[torch.Tensor, ...],
        k: torch.Tensor,
        v: torch.Tensor,
        place: int,
    ) -> None:
        """Counted in full, though it runs beside the pieces before it: an upper bound, which is
        close where rows are many and decoding is little."""
        num_bytes = k.nbytes + v.nbytes
        device_s = self._speeds.decode_s(codec.name, num_bytes)
        self._world.work(self._rank, "decode", device_s, self._speeds.call_s, num_bytes)

    def merge(
        self,
        parts: Sequence[Part],
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        num_bytes = out.nbytes + sum(part.out.nbytes + part.lse.nbytes for part in parts)
        device_s = self._speeds.merge_s(num_bytes)
        self._world.work(self._rank, "merge", device_s, self._speeds.call_s, num_bytes)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, piece: Piece) -> None:
        """The kernels that `local.attend` would call for the piece, and its copies."""
        speeds, rows, heads = self._speeds, q.shape[0], q.shape[1]
        mask = Mask(piece.causal, piece.offset, piece.window)
        blocks = tuple(canonical_blocks(rows, k.shape[0], mask))
        device_s = 0.0
        for block in blocks:
            causal, offset, window = block.mask
            num, keys = block.row_stop - block.row_start, block.key_stop - block.key_start
            if window is not None:
                pairs = int(seen_keys(Piece(0, num, 0, keys, causal, offset, window)).sum())
            else:
                pairs = num * keys - (num * (num - 1) // 2 if causal else 0)
            device_s += speeds.attend_s(num, keys, pairs, causal, heads, k.shape[1])
        if len(blocks) > 1 or (blocks and blocks[0].row_stop - blocks[0].row_start < rows):
            device_s += 1.5 * speeds.copy_s(q.nbytes)  # cleared, then filled from the blocks
        host_s = speeds.attend_call_s * len(blocks)
        self._world.work(self._rank, "attend", device_s, host_s, 0)


class _Copies(TorchDispatchMode):
    """Charges the copies that schemes make themselves: packing, sorting rows."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports torch's compiler: five seconds

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        super().__init__()
        self._world, self._rank = world, rank

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name not in _MOVES:
            return func(*args, **(kwargs or {}))
        # Shapes alone are wanted: torch's own meta kernels of these take seconds to import.
        if name == "aten::copy_":
            out = args[0]
        elif name == "aten::index_select":
            x, dim, index = args
            shape = (*x.shape[:dim], index.shape[0], *x.shape[dim + 1 :])
            out = (kwargs or {}).get("out")
            out = self._world.empty([Shape(shape, x.dtype)])[0] if out is None else out
        else:
            out = func(*args, **(kwargs or {}))
        if out.numel():
            speeds = self._world.speeds
            self._world.work(
                self._rank, "copy", speeds.copy_s(out.nbytes), speeds.call_s, out.nbytes
            )
        return out


_MOVES = {"aten::copy_", "aten::index_select", "aten::clone", "aten::_to_copy", "aten::cat"}


def simulate(
    scheme: str,
    problem: Problem,
    speeds: Speeds,
    link: Link,
    *,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    sinks: bool = False,
    carries: bool = False,
    deterministic: bool = False,
    before: Sequence[tuple[float, float]] | None = None,
    timeout_s: float = 3600.0,
    dead: frozenset[int] = frozenset(),
) -> Simulated:
    """One layer's attention of `problem` by a scheme; heads: (Hq, Hkv).

    before: for each rank the (device, host) seconds of what it does first: the rest of a layer,
    under which the host has run ahead.

    Raises what the scheme raises (BadInput where it cannot serve the heads), PeerTimeout for a
    peer that is dead or slower than `timeout_s`.
    """
    problem, _ = problem.windowed(window)
    world = SimulatedWorld(problem.world_size, speeds, link, timeout_s, dead, carries)
    case = _Case(problem, scheme_named(scheme), heads, head_dim, dtype, window, sinks)
    buffers = [world.buffers() for _ in range(problem.world_size)]

    def body(rank: int) -> None:
        if before is not None:
            world.work(rank, "dense", *before[rank], 0)
        case.run(world, rank, buffers[rank], deterministic)

    ranks = range(problem.world_size)
    played = world.run([lambda rank=rank: body(rank) for rank in ranks])  # type: ignore[misc]
    return played._replace(buffer_bytes=tuple(one.nbytes for one in buffers))


def leased_bytes(
    scheme: str,
    problem: Problem,
    *,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
) -> int:
    """What a scheme leases for exchanges and decoding, on the rank with most rows and keys or, if
    that is more, on the one with least, which gets more of others; others differ by pages."""
    problem, _ = problem.windowed(window)
    size = [
        problem.rows(rank) + sum(problem.keys(at, rank) for at in range(len(problem.sources)))
        for rank in range(problem.world_size)
    ]
    world = SimulatedWorld(problem.world_size, _FREE, Link(latency_s=0.0, bytes_per_s=1.0))
    case = _Case(problem, scheme_named(scheme), heads, head_dim, dtype, window, False)
    most = 0
    for rank in {size.index(max(size)), size.index(min(size))}:
        buffers = world.buffers()
        world.record(rank, lambda rank=rank, to=buffers: case.run(world, rank, to, False))  # type: ignore[misc]
        most = max(most, buffers.nbytes)
    return most


class _Case(NamedTuple):
    """One layer of a model that does not exist. The problem is already windowed."""

    problem: Problem
    scheme: Scheme
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    window: int | None
    sinks: bool

    def run(
        self, world: SimulatedWorld, rank: int, buffers: SimulatedBuffers, deterministic: bool
    ) -> None:
        problem, (num_q_heads, num_kv_heads) = self.problem, self.heads
        shapes = [
            Shape((spec.units(problem.keys(at, rank)), *spec.shape), spec.dtype)
            for at, source in enumerate(problem.sources)
            for spec in source.codec.specs(num_kv_heads, self.head_dim, self.dtype)
        ]
        (q,) = world.empty([Shape((problem.rows(rank), num_q_heads, self.head_dim), self.dtype)])
        (logits,) = world.empty([Shape((num_q_heads,), torch.float32)])
        self.scheme(
            Layer(
                transport=world.transport(rank),
                buffers=buffers,
                compute=world.compute(rank),
                problem=problem,
                rules=Rules(0, 1.0, self.window, 0.0, logits if self.sinks else None),
                q=q,
                own=world.empty(shapes),
                kv_shape=(num_kv_heads, self.head_dim),
                deterministic=deterministic,
            )
        )


_FREE = Speeds(
    device_name="none",
    source="for counting bytes",
    dtype="bfloat16",
    num_q_heads=1,
    num_kv_heads=1,
    head_dim=1,
    attention=AttentionFit(fixed_s=0.0, tile_s=0.0, pair_s=0.0, causal_pair_s=0.0),
    scan_bytes_per_s=1.0,
    copy_bytes_per_s=1.0,
    merge_bytes_per_s=1.0,
    gemm_flops_per_s=1.0,
    small_gemm_flops_per_s=1.0,
)


def _by_peer(messages: Sequence[Message]) -> tuple[tuple[int, int], ...]:
    found: dict[int, int] = {}
    for tensor, peer in messages:
        found[peer] = found.get(peer, 0) + tensor.nbytes
    return tuple(found.items())
