"""Names of torch dtypes as they stand in headers and manifests, and sizes in bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ringspan.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringspan.attention.kv import TensorSpec

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
"""Every dtype that a page may hold."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name; `UnknownName` for one that no page may hold."""
    try:
        return DTYPES[name]
    except KeyError:
        raise UnknownName("dtype", name, tuple(DTYPES)) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which headers know this dtype."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise UnknownName("dtype", str(dtype), tuple(DTYPES)) from None


def token_bytes(spec: TensorSpec) -> int:
    """Bytes of one token in this tensor."""
    return math.prod(spec.shape) * int(spec.dtype.itemsize)


def specs_bytes(specs: Iterable[TensorSpec]) -> int:
    """Bytes of one token of one layer in all tensors of an encoding."""
    return sum(token_bytes(spec) for spec in specs)
