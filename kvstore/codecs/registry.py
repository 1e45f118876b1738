"""All codecs by name, and what each costs in bits and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ringspan.attention.kv import Codec
from ringspan.errors import UnknownName
from ringspan.kvstore.codecs.bf16 import Bf16Codec
from ringspan.kvstore.codecs.fp8 import Fp8Codec
from ringspan.kvstore.codecs.int8 import Int8Codec
from ringspan.kvstore.codecs.raw import RawCodec
from ringspan.kvstore.dtypes import specs_bytes

if TYPE_CHECKING:
    import torch


class PageCodec(Codec, Protocol):
    """A codec whose bytes may be stored: it can say how they were made."""

    def params(self, head_dim: int) -> str:
        """What a reader must know beside the name; stands in every page header."""


CODECS: dict[str, PageCodec] = {
    "raw": RawCodec(),
    "bf16": Bf16Codec(),
    "int8": Int8Codec(),
    "fp8": Fp8Codec(),
}


def codec(name: str) -> PageCodec:
    """The codec of that name; `UnknownName` lists the known ones."""
    try:
        return CODECS[name]
    except KeyError:
        raise UnknownName("codec", name, tuple(CODECS)) from None


def bits_per_element(codec: Codec, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> float:
    """Stored bits per element of K and V, all side data counted."""
    stored = specs_bytes(codec.specs(num_kv_heads, head_dim, dtype))
    return 8.0 * stored / (2 * num_kv_heads * head_dim)


def kv_bytes_per_token(
    codec: Codec, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one token's K and V of all layers and kv heads."""
    return num_layers * specs_bytes(codec.specs(num_kv_heads, head_dim, dtype))
