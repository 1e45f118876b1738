"""What a placement needs to know of a cluster, with indices: thousands of nodes, no scans.

Devices come in **blocks**: aligned groups of 1, 2, 4, ... devices of a node, then of 2, 4, ...
nodes of one rack, as a buddy allocator has them. A gang is a block, so a ring goes through a node's
own links first and leaves it once; two gangs of one size overlap wholly or not at all.

For each pool (nodes of one role) and size there are three indices: blocks with nothing on them,
blocks with sessions but no prefill, and a heap of the others by when their last prefill ends. An
entry of the heap that is out of date is dropped when it comes up. A change to a block touches the
blocks that overlap it: 2 * size - 1 below and one a level above.

Where gangs are started already, with a model's weights on their devices, each of them is a block of
its own, of any size, and nothing overlaps it (`Node.gangs`).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from ringspan.cluster.placing_blocks import (
    Block,
    Device,
    Holding,
    Index,
    Node,
    Preemptible,
    Session,
    below,
    check_gangs,
)
from ringspan.errors import BadInput


class ClusterState:
    """What is where and when it is free. Placement reads it; whoever carries decisions out (the
    controller, the simulator) changes it by the methods below, and nothing else does."""

    def __init__(
        self,
        nodes: Sequence[Node],
        device_bytes: float,
        host_bytes: float = 0.0,
        *,
        largest_nodes: int = 4,
    ) -> None:
        """device_bytes, host_bytes: of each device and each node, free for KV. largest_nodes: a
        gang has at most so many."""
        if not nodes or any(node.num_devices < 1 for node in nodes):
            raise BadInput("a cluster of no nodes, or a node without devices: nothing to place on")
        check_gangs(nodes)
        self.nodes = tuple(nodes)
        self.devices: list[Device] = []
        self.node_of: list[int] = []
        self.blocks: list[Block] = []
        self.index: dict[tuple[str, int], Index] = {}
        self.holders: dict[str, list[Holding]] = {}
        self.running: dict[int, Preemptible] = {}
        self.host_capacity_bytes = host_bytes
        self.hosts: list[OrderedDict[int, Holding]] = [OrderedDict() for _ in nodes]
        self.host_used_bytes = [0.0] * len(nodes)
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._of_node: list[dict[int, list[Block]]] = []
        self._least: list[Block | None] = []
        """Of each device; None: in no gang."""
        self.first_of: list[int] = []  # device, by node
        self._build(device_bytes, largest_nodes)

    def sizes(self, pool: str) -> tuple[int, ...]:
        """Of the blocks of a pool, ascending."""
        return self._sizes.get(pool, ())

    def quiet(self, pool: str, size: int) -> Block | None:
        """A block with nothing on it."""
        found = self.index[pool, size].quiet
        return next(iter(found.values())) if found else None

    def decoding(self, pool: str, size: int, most: int) -> list[Block]:
        """Blocks with sessions and no prefill: half of them those whose first session came last,
        which are being filled, half those that have had some for longest."""
        blocks = self.index[pool, size].decoding
        if len(blocks) <= most:
            return list(blocks.values())
        newest = list(islice(reversed(blocks.values()), most - most // 2))
        return newest + list(islice(blocks.values(), most // 2))

    def earliest(self, pool: str, size: int) -> Block | None:
        """Of the blocks with prefills, the one that is free first."""
        heap, blocks = self.index[pool, size].busy, self.blocks
        while heap:
            free_at, number = heap[0]
            block = blocks[number]
            if block.prefills and not block.lost and block.free_at == free_at:
                return block
            heapq.heappop(heap)
        return None

    def near(self, node: int, size: int) -> list[Block]:
        """The blocks of one size within a node."""
        return self._of_node[node].get(size, [])

    def room(self, block: Block) -> float:
        """Bytes of each of its devices that are free or can be made free."""
        if block.size == 1:
            device = self.devices[block.first]
            return device.capacity_bytes - device.pinned_bytes
        least = float("inf")
        for device in self.devices[block.first : block.first + block.size]:
            free = device.capacity_bytes - device.pinned_bytes
            if free < least:
                least = free
        return least

    def read_bytes(self, block: Block) -> float:
        """Of KV, by a token of all sessions, on the device that reads most."""
        if not block.sessions:
            return 0.0
        if block.size == 1:
            return self.devices[block.first].read_bytes
        most = float("-inf")
        for device in self.devices[block.first : block.first + block.size]:
            if device.read_bytes > most:
                most = device.read_bytes
        return most

    def stalls(self, block: Block, seconds: float) -> bool:
        """Whether a session on the block may not stand still for so long."""
        for device in self.devices[block.first : block.first + block.size]:
            for session in device.sessions.values():
                if session.spare_s < seconds:
                    return True
        return False

    def would_pin(self, holding: Holding | None, block: Block) -> float:
        """Bytes of a device of the block that reading the holding would pin."""
        if holding is None or holding.users or holding.on_host:
            return 0.0
        other = holding.block
        apart = other.first >= block.first + block.size or block.first >= other.first + other.size
        return 0.0 if apart else holding.bytes_per_device

    def hold_up(self, block: Block, seconds: float) -> None:
        """Sessions on the block will stand still for so long."""
        seen: set[int] = set()
        for device in self.devices[block.first : block.first + block.size]:
            for key, session in device.sessions.items():
                if key not in seen:
                    seen.add(key)
                    session.spare_s -= seconds

    def commit(self, block: Block, until_s: float) -> None:
        """A prefill will run on the block, until then at the latest."""
        for other in block.overlapping:
            other.prefills += 1
            if other.prefills == 1:
                self._refile(other)
            if until_s > other.free_at:
                other.free_at = until_s
                self._push(other)

    def extend(self, block: Block, until_s: float) -> None:
        """A committed prefill will take longer than was thought."""
        for other in block.overlapping:
            if until_s > other.free_at:
                other.free_at = until_s
                self._push(other)

    def release(self, block: Block) -> None:
        """A committed prefill is over, or is given up."""
        for other in block.overlapping:
            other.prefills -= 1
            if not other.prefills:
                self._refile(other)

    def join(self, block: Block, key: int, session: Session) -> None:
        for device in self.devices[block.first : block.first + block.size]:
            device.sessions[key] = session
            device.read_bytes += session.step_bytes
        for other in block.overlapping:
            other.sessions += 1
            if other.sessions == 1:
                self._refile(other)

    def leave(self, block: Block, key: int) -> None:
        for device in self.devices[block.first : block.first + block.size]:
            device.read_bytes -= device.sessions.pop(key).step_bytes
            if not device.sessions:
                device.read_bytes = 0.0  # no drift of sums
        for other in block.overlapping:
            other.sessions -= 1
            if not other.sessions:
                self._refile(other)

    def lose(self, device: int) -> list[Holding]:
        """The device is gone, and what it held. Returns holdings that are not whole any more."""
        block = self._least[device]
        for other in () if block is None else block.overlapping:
            other.lost += 1
            self._refile(other)
        gone = list(self.devices[device].holdings.values())
        for holding in gone:
            self.drop(holding)
            holding.lost = True
        return gone

    def regain(self, device: int) -> None:
        """The device is back, empty."""
        block = self._least[device]
        for other in () if block is None else block.overlapping:
            other.lost -= 1
            self._refile(other)
            if other.prefills:
                self._push(other)

    def hold(self, holding: Holding) -> list[Holding]:
        """Pages take memory; least recently used ones make room and are returned. The caller has
        asked `room` before."""
        block = holding.block
        dropped: list[Holding] = []
        for number in block.devices:
            device = self.devices[number]
            while device.cached_bytes + holding.bytes_per_device > device.capacity_bytes:
                oldest = next((one for one in device.holdings.values() if not one.users), None)
                if oldest is None:
                    break
                self.drop(oldest)
                dropped.append(oldest)
        for number in block.devices:
            device = self.devices[number]
            device.holdings[id(holding)] = holding
            device.cached_bytes += holding.bytes_per_device
            if holding.users:
                device.pinned_bytes += holding.bytes_per_device
        self.holders.setdefault(holding.prefix_id, []).append(holding)
        return dropped

    def pin(self, holding: Holding) -> None:
        """Somebody reads it: it stays, and is the most recently used."""
        holding.users += 1
        if holding.on_host and not holding.lost:
            for number in holding.block.nodes:
                self.hosts[number].move_to_end(id(holding))
        if holding.lost or holding.on_host:
            return
        for number in holding.block.devices:
            device = self.devices[number]
            device.holdings.move_to_end(id(holding))
            if holding.users == 1:
                device.pinned_bytes += holding.bytes_per_device

    def unpin(self, holding: Holding) -> None:
        holding.users -= 1
        if not holding.users and not holding.lost and not holding.on_host:
            for number in holding.block.devices:
                self.devices[number].pinned_bytes -= holding.bytes_per_device

    def hold_on_host(self, holding: Holding) -> None:
        """The copy that was written behind, on the hosts of the block's nodes; the least recently
        used ones there make room. What does not fit at all is not kept."""
        share = holding.bytes_per_device * holding.block.size / len(holding.block.nodes)
        if share > self.host_capacity_bytes:
            return
        for number in holding.block.nodes:
            kept = self.hosts[number]
            while kept and self.host_used_bytes[number] + share > self.host_capacity_bytes:
                self.drop(next(iter(kept.values())))
        for number in holding.block.nodes:
            self.hosts[number][id(holding)] = holding
            self.host_used_bytes[number] += share
        holding.on_host = True
        self.holders.setdefault(holding.prefix_id, []).append(holding)

    def lose_host(self, node: int) -> None:
        """The node's host store is gone, beside its devices."""
        for holding in list(self.hosts[node].values()):
            self.drop(holding)
            holding.lost = True

    def drop(self, holding: Holding) -> None:
        """Its memory is free; nobody finds it any more."""
        if holding.on_host:
            share = holding.bytes_per_device * holding.block.size / len(holding.block.nodes)
            for number in holding.block.nodes:
                if self.hosts[number].pop(id(holding), None) is not None:
                    self.host_used_bytes[number] -= share
        for number in () if holding.on_host else holding.block.devices:
            device = self.devices[number]
            if device.holdings.pop(id(holding), None) is not None:
                device.cached_bytes -= holding.bytes_per_device
                if holding.users:
                    device.pinned_bytes -= holding.bytes_per_device
        found = self.holders.get(holding.prefix_id, [])
        if holding in found:
            found.remove(holding)
            if not found:
                del self.holders[holding.prefix_id]

    def _refile(self, block: Block) -> None:
        quiet, decoding = self.index[block.pool, block.size][1:3]
        number = block.number
        if block.lost or block.prefills:
            quiet.pop(number, None)
            decoding.pop(number, None)
        elif block.sessions:
            quiet.pop(number, None)
            decoding[number] = block
        else:
            decoding.pop(number, None)
            quiet[number] = block

    def _push(self, block: Block) -> None:
        heapq.heappush(self.index[block.pool, block.size].busy, (block.free_at, block.number))

    def _build(self, device_bytes: float, largest_nodes: int) -> None:
        racks: dict[tuple[str, str], list[int]] = {}
        for number, node in enumerate(self.nodes):
            first = len(self.devices)
            self.devices += [Device(device_bytes) for _ in range(node.num_devices)]
            self.node_of += [number] * node.num_devices
            self.first_of.append(first)
            if node.gangs:
                self._of_node.append(self._gangs(number, node))
                continue
            level = [
                self._add(first + k, 1, node.pool, (number,), ()) for k in range(node.num_devices)
            ]
            self._least += level
            own = {1: level}
            while len(level) > 1:
                level = self._paired(level)
                if level:
                    own[level[0].size] = level
            self._of_node.append(own)
            racks.setdefault((node.pool, node.rack), []).append(number)
        for members in racks.values():
            self._build_rack(members, largest_nodes)
        for pool in {node.pool for node in self.nodes}:
            self._sizes[pool] = tuple(sorted(size for of, size in self.index if of == pool))
        for block in self.blocks:
            above = []
            parent = block.parent
            while parent is not None:
                above.append(parent)
                parent = parent.parent
            block.overlapping = (*below(block), *above)
            self.index[block.pool, block.size].quiet[block.number] = block

    def _gangs(self, number: int, node: Node) -> dict[int, list[Block]]:
        """Those that run on a node, by size."""
        own: dict[int, list[Block]] = {}
        first, end = self.first_of[number], self.first_of[number] + node.num_devices
        for size in node.gangs:
            block = self._add(first, size, node.pool, (number,), ())
            own.setdefault(size, []).append(block)
            self._least += [block] * size
            first += size
        self._least += [None] * (end - first)
        return own

    def _build_rack(self, members: list[int], largest_nodes: int) -> None:
        """Whole nodes of one size that follow each other are paired, and pairs again."""
        level: list[Block] = []
        for number in members:
            if self.nodes[number].gangs:
                continue
            count = self.nodes[number].num_devices
            (*_, whole) = self._of_node[number].values()
            if len(whole) == 1 and whole[0].size == count:
                level.append(whole[0])
        joined = 2
        while joined <= largest_nodes and len(level) > 1:
            level = self._paired(level)
            joined *= 2

    def _paired(self, level: list[Block]) -> list[Block]:
        paired = []
        for left, right in zip(level[::2], level[1::2], strict=False):
            if left.size == right.size and left.first + left.size == right.first:
                nodes = tuple(sorted({*left.nodes, *right.nodes}))
                paired.append(self._add(left.first, 2 * left.size, left.pool, nodes, (left, right)))
        return paired

    def _add(
        self, first: int, size: int, pool: str, nodes: tuple[int, ...], children: tuple[Block, ...]
    ) -> Block:
        block = Block(len(self.blocks), first, size, pool, nodes, None, children)
        for child in children:
            child.parent = block
        self.blocks.append(block)
        index = self.index.setdefault((pool, size), Index([], OrderedDict(), OrderedDict(), []))
        index.blocks.append(block)
        return block
