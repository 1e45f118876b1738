"""Names of torch dtypes as they stand in headers and manifests."""

from __future__ import annotations

import torch

from ringspan.errors import UnknownName

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
