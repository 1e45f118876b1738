"""A shard's rows in host memory as bytes: a payload goes in and is summed where it then lies.

One pass over each part of a plane, so that it is summed while a core's cache still has it, and no
tensor operation between: over small planes these took longer than the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ringspan.kernels.sum64_native import sum64_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringspan.attention.kv import TensorSpec
    from ringspan.kvstore.planes import Layers

_MASK = (1 << 64) - 1


class HostRows:
    """Of tensors on the CPU, [layer][tensor]; threads may fill different rows at once."""

    def __init__(self, layers: Layers, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._bytes = [
            [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in layer] for layer in layers
        ]

    def fill(self, row: int, tokens: int, payload: memoryview) -> list[int]:
        """A page's payload to the rows from `row` on, which begin a unit of every tensor; its plane
        sums, as `planes.page_sums` computes them, out of these rows."""
        data = np.frombuffer(payload, np.uint8)
        places = [(spec.bytes_of(row), spec.bytes_of(tokens)) for spec in self._specs]
        sums: list[int] = []
        at = 0
        for layer in self._bytes:
            total = 0
            for seed, (held, (first, width)) in enumerate(zip(layer, places, strict=True), 1):
                rows = held[first : first + width]
                self._copy(rows, data[at : at + width])
                total += sum64_bytes(rows, seed)
                at += width
            sums.append(total & _MASK)
        if at != data.size:
            raise ValueError(f"a payload of {data.size} bytes for a page of {at}")
        return sums

    def _copy(self, rows: np.ndarray, part: np.ndarray) -> None:
        np.copyto(rows, part)
