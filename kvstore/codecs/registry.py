"""All codecs by name, and what each costs in bits and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ringspan.attention.kv import Codec, specs_bytes, unit_tokens
from ringspan.errors import UnknownName
from ringspan.kvstore.codecs.bf16 import Bf16Codec
from ringspan.kvstore.codecs.fp8 import Fp8Codec
from ringspan.kvstore.codecs.int2 import Int2Codec
from ringspan.kvstore.codecs.int4 import Int4Codec
from ringspan.kvstore.codecs.int8 import Int8Codec
from ringspan.kvstore.codecs.k4v2 import K4V2Codec
from ringspan.kvstore.codecs.nuq import NuqCodec
from ringspan.kvstore.codecs.raw import RawCodec

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
    "int4": Int4Codec(),
    "nuq4": NuqCodec(4),
    "k4v2": K4V2Codec(),
    "int2": Int2Codec(),
}

SMALLER = {"raw": "int8", "bf16": "int8", "int8": "int4", "fp8": "int4"}
"""What to advise where memory is short."""


def or_smaller(codec_name: str) -> str:
    """`, or --codec int8` for messages about want of room; empty where there is none smaller."""
    return f", or --codec {SMALLER[codec_name]}" if codec_name in SMALLER else ""


def codec(name: str) -> PageCodec:
    """The codec of that name; `UnknownName` lists the known ones."""
    try:
        return CODECS[name]
    except KeyError:
        raise UnknownName("codec", name, tuple(CODECS)) from None


def bits_per_element(codec: Codec, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> float:
    """Stored bits per element of K and V in full pages, all side data counted."""
    specs = codec.specs(num_kv_heads, head_dim, dtype)
    tokens = unit_tokens(specs)
    return 8.0 * specs_bytes(specs, tokens) / (2 * tokens * num_kv_heads * head_dim)


def encoded_bytes(
    codec: Codec,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    tokens: int,
) -> int:
    """Bytes of `tokens` tokens' K and V, which begin with a page, all layers and kv heads."""
    return num_layers * specs_bytes(codec.specs(num_kv_heads, head_dim, dtype), tokens)
