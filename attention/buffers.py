"""Receive buffers and staging memory: taken once, reused by every layer and hop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

_ALIGN = 256
"""Bytes; every view starts where vector loads and copy engines like it."""


class Shape(NamedTuple):
    """A tensor's shape and dtype: what a receiver must know before the bytes come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Buffers:
    """Named flat buffers on one device that grow to the largest lease and never shrink."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, torch.Tensor] = {}

    def lease(self, name: str, shapes: Sequence[Shape]) -> tuple[torch.Tensor, ...]:
        """Views of buffer `name`, one a shape; the last lease of that name is void from now on."""
        starts, end = [], 0
        for shape in shapes:
            starts.append(end)
            end += -(-shape.nbytes // _ALIGN) * _ALIGN
        flat = self._flat.get(name)
        if flat is None or flat.numel() < end:
            self._flat.pop(name, None)
            flat = torch.empty(end, dtype=torch.uint8, device=self._device)
            self._flat[name] = flat
        return tuple(
            flat[start : start + shape.nbytes].view(shape.dtype).view(shape.shape)
            for start, shape in zip(starts, shapes, strict=True)
        )

    @property
    def nbytes(self) -> int:
        return sum(flat.numel() for flat in self._flat.values())

    def clear(self) -> None:
        self._flat.clear()
