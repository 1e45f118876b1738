"""A context larger than the device's memory: it lies in host memory, its layers are streamed.

Two slots on the device, each as large as one layer. While the device computes on one, the next
layer is copied to the other on a stream of its own, its plane sums are computed there and compared;
only then is it handed out. So what attention sees is verified on the device at every pass, and the
results are those of a context that lies on the device.

Time   a pass reads every byte over the link: bytes / 54 GB/s on PCIe 5, whatever is computed
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from ringspan.attention.kv import cut_units
from ringspan.errors import BadInput, CorruptPage
from ringspan.kvstore import planes
from ringspan.kvstore.tiers.pinned import pin, unpin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringspan.kvstore.codecs.registry import PageCodec
    from ringspan.kvstore.page import PageForm
    from ringspan.kvstore.shard import ContextShard
    from ringspan.types import Span

SLOTS = 2


class StreamedShard:
    """A `KVShard` for reading: `held`, which lies in host memory, as if it lay on `device`.

    held: complete, on the CPU; pinned here beside a GPU. sums: [pages][layers] unsigned, those
    of the pages' headers. What `tensors` gives stays until the layer after the next is asked for.
    Layers are best asked for in order, which wraps around. Not to be captured in a CUDA graph.
    """

    def __init__(
        self,
        held: ContextShard,
        sums: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> None:
        self._held = held
        self.device = torch.device(device)
        self._sums = np.array(sums, dtype=np.uint64).reshape(-1, held.num_layers)
        self._lengths = [span.tokens for span, _ in held.pages()]
        if len(self._lengths) != len(self._sums):
            raise ValueError(f"sums of {len(self._sums)} pages for {len(self._lengths)}")
        self._slots = [self._slot() for _ in range(min(SLOTS, held.num_layers))]
        self._in_slot: list[int | None] = [None] * len(self._slots)
        self._loads: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor(1, "stream-layers")
        self._lock = threading.Lock()
        self._pinned: list[int] = []
        gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if gpu else None
        if gpu:
            self._pin()
        self._start(0, 0)

    def _slot(self) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.empty_like(tensor, device=self.device) for tensor in self._held.tensors(0)
        )

    @property
    def codec(self) -> PageCodec:
        return self._held.codec

    @property
    def form(self) -> PageForm:
        return self._held.form

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._held.spans

    @property
    def num_tokens(self) -> int:
        return self._held.num_tokens

    @property
    def kv_bytes(self) -> int:
        """Encoded, in host memory."""
        return self._held.kv_bytes

    @property
    def ring_bytes(self) -> int:
        """On the device."""
        return sum(t.numel() * t.element_size() for slot in self._slots for t in slot)

    def reserve(self, spans: Sequence[Span]) -> None:
        raise BadInput("a context that is streamed from host memory cannot grow")

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        raise BadInput("a context that is streamed from host memory cannot grow")

    def tensors(
        self, layer: int, num_tokens: int | None = None, first: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """As `ContextShard.tensors`. Raises `CorruptPage` where what arrived is not the page."""
        rows = self.num_tokens if num_tokens is None else num_tokens
        if not 0 <= first <= rows <= self.num_tokens:
            raise ValueError(f"rows {first} to {rows} asked of {self.num_tokens}")
        with self._lock:
            if layer not in self._in_slot:
                self._start(layer, self._other_slot(layer - 1))
            slot = self._in_slot.index(layer)
            try:
                self._loads[layer].result()
            except BaseException:
                self._in_slot[slot] = None  # asked for again, it is copied again
                raise
            after = (layer + 1) % self._held.num_layers
            if after not in self._in_slot:
                self._start(after, self._other_slot(layer))
        return cut_units(self._slots[slot], self._held.specs, first, rows)

    def _other_slot(self, layer: int) -> int:
        """One that does not hold this layer; the only one of a context of one layer."""
        return 1 if len(self._slots) > 1 and self._in_slot[0] == layer else 0

    def _start(self, layer: int, slot: int) -> None:
        """Copy and verify a layer behind what the device has been given to do so far."""
        before = self._in_slot[slot]
        if before is not None:
            self._loads.pop(before, None)
        self._in_slot[slot] = layer
        used = None
        if self._stream is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self.device))
        self._loads[layer] = self._pool.submit(self._load, layer, slot, used)

    def _load(self, layer: int, slot: int, used: torch.cuda.Event | None) -> None:
        if self._stream is None or used is None:
            self._copy(layer, slot)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(used)
            self._copy(layer, slot)
            self._stream.synchronize()

    def _copy(self, layer: int, slot: int) -> None:
        """Twice where the first copy is not what it should be."""
        into = self._slots[slot]
        for again in (False, True):
            for tensor, held in zip(into, self._held.tensors(layer), strict=True):
                tensor.copy_(held, non_blocking=True)
            sums = planes.all_page_sums(
                (into,), self._held.specs, self._lengths, self._held.page_tokens
            )
            bad = np.flatnonzero(np.array(sums, np.uint64)[:, 0] != self._sums[:, layer])
            if not bad.size:
                return
            if again:
                span, _ = self._held.pages()[int(bad[0])]
                raise CorruptPage(
                    f"page [{span.start}, {span.stop}) streamed from host memory: plane sum "
                    f"differs in layer {layer} ({bad.size} pages of it)"
                )

    def _pin(self) -> None:
        """The host's tensors where they are: copies then run at the link's speed."""
        for layer in range(self._held.num_layers):
            for tensor in self._held.tensors(layer):
                size = tensor.numel() * tensor.element_size()
                if pin(tensor.data_ptr(), size):
                    self._pinned.append(tensor.data_ptr())

    def close(self) -> None:
        """Before the host's memory goes. May be repeated."""
        self._pool.shutdown(wait=True)
        if self._pinned:
            for address in self._pinned:
                unpin(address)
            self._pinned.clear()
