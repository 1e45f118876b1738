"""What a cluster is made of, to a placement: nodes, blocks of devices, pages that lie on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ringspan.errors import BadInput

ANY = "any"


class Node(NamedTuple):
    """A host with its accelerators. Nodes of a rack that follow each other are neighbours."""

    node_id: str
    num_devices: int
    rack: str = ""
    pool: str = ANY
    """The role its labels give it: prefills and sessions are placed within a pool."""
    gangs: tuple[int, ...] = ()
    """Ranks of each gang that runs on it already, one after the other: then these are its blocks.
    Empty: any aligned devices may become a gang."""


def check_gangs(nodes: Sequence[Node]) -> None:
    """BadInput for gangs that are not on their node."""
    for node in nodes:
        if node.gangs and (min(node.gangs) < 1 or sum(node.gangs) > node.num_devices):
            raise BadInput(
                f"gangs of {', '.join(map(str, node.gangs))} ranks on node {node.node_id} with"
                f" {node.num_devices} devices: wanted gangs of one or more that fit on it"
            )


@dataclass(slots=True, eq=False)
class Block:
    """Devices `first` to `first + size - 1`."""

    number: int
    first: int
    size: int
    pool: str
    nodes: tuple[int, ...]
    parent: Block | None = None
    children: tuple[Block, ...] = ()
    overlapping: tuple[Block, ...] = ()
    prefills: int = 0
    """Committed, running or to come, on any of its devices."""
    sessions: int = 0
    lost: int = 0
    """Devices of it that are gone."""
    free_at: float = 0.0
    """When the last committed prefill on any of its devices ends."""

    @property
    def devices(self) -> range:
        return range(self.first, self.first + self.size)

    @property
    def ring(self) -> tuple[int, ...]:
        """Devices in the order of the ring: node after node, neighbours within each."""
        return tuple(self.devices)


@dataclass(slots=True, eq=False)
class Holding:
    """Pages [0, tokens) of a context on a block's devices, or on the host of its node."""

    prefix_id: str
    tokens: int
    block: Block
    bytes_per_device: float
    ready_s: float
    """When they are there: sealed, or, while the prefill that makes them runs, expected."""
    users: int = 0
    """Prefills and sessions that read it: it may not be dropped."""
    on_host: bool = False
    lost: bool = False


@dataclass(slots=True, eq=False)
class Session:
    """What decodes on a device, as far as others must spare it."""

    step_bytes: float
    """Of KV that one token reads on each device."""
    spare_s: float
    """How long it may stand still before its time per token is over its limit."""


@dataclass(slots=True, eq=False)
class Preemptible:
    """A prefill that runs, of several chunks, with nothing committed behind it."""

    key: int
    block: Block
    priority: int
    chunk_ends_s: tuple[float, ...]
    """When each chunk will be sealed, if nothing comes between."""
    spare_s: float
    """How much later it may end."""
    paused_until_s: float = 0.0
    """When what was put between two chunks of it ends."""


@dataclass(slots=True)
class Device:
    capacity_bytes: float
    pinned_bytes: float = 0.0
    cached_bytes: float = 0.0
    holdings: OrderedDict[int, Holding] = field(default_factory=OrderedDict)
    """Least recently used first."""
    sessions: dict[int, Session] = field(default_factory=dict)
    read_bytes: float = 0.0
    """Of KV by one token of all its sessions."""


class Index(NamedTuple):
    """Blocks of one size of one pool."""

    blocks: list[Block]
    quiet: OrderedDict[int, Block]
    decoding: OrderedDict[int, Block]
    busy: list[tuple[float, int]]


def below(block: Block) -> Iterator[Block]:
    """The block, and all that it is made of."""
    yield block
    for child in block.children:
        yield from below(child)
