"""What attention needs of a KV cache; `ringspan.kvstore` implements it.

A rank's shard of a context keeps, for each layer, a tuple of tensors whose first axis counts units:
runs of `TensorSpec.tokens` consecutive tokens. For the raw codec a unit is one token and the
tensors are (K, V), each [tokens, Hkv, D]; for a codec of pages a unit is a page, and its tensors
are codes, scales and whatever else a page needs, [pages, Hkv, ...].

Units first, so that the first n tokens of any tensor are one contiguous piece of memory: a ring hop
sends them without a copy, and a shard is attended in place. All pages of a shard but its last are
full, so that token row r lies in unit r // tokens, at r % tokens; a short last page takes a whole
unit, whose missing tokens are zeros.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from ringspan.types import Part, Span


class TensorSpec(NamedTuple):
    """One tensor of an encoding: what stands behind the axis of units."""

    name: str
    shape: tuple[int, ...]
    """Of one unit, e.g. (Hkv, D)."""
    dtype: torch.dtype
    tokens: int = 1
    """Consecutive tokens that one unit holds."""

    @property
    def unit_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def units(self, tokens: int) -> int:
        """That hold `tokens` tokens; the last may be short."""
        return -(-tokens // self.tokens)

    def bytes_of(self, tokens: int) -> int:
        """Of `tokens` consecutive tokens that begin with a unit."""
        return self.units(tokens) * self.unit_bytes


def specs_bytes(specs: Iterable[TensorSpec], tokens: int) -> int:
    """Bytes of one layer's `tokens` tokens, which begin with a unit, in all tensors."""
    return sum(spec.bytes_of(tokens) for spec in specs)


def unit_tokens(specs: Iterable[TensorSpec]) -> int:
    """Tokens of the largest unit: what is cut at its multiples is cut at units of every tensor."""
    return max(spec.tokens for spec in specs)


def cut_units(
    tensors: Sequence[torch.Tensor], specs: Sequence[TensorSpec], first: int, stop: int
) -> tuple[torch.Tensor, ...]:
    """The units of token rows [first, stop). ValueError where `first` lies within a unit."""
    found = []
    for tensor, spec in zip(tensors, specs, strict=True):
        if first % spec.tokens:
            raise ValueError(f"row {first} lies within a unit of {spec.tokens} tokens")
        found.append(tensor[first // spec.tokens : spec.units(stop)])
    return tuple(found)


class Codec(Protocol):
    """How K and V become bytes. Stateless; equal for all ranks of a gang."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool:
        """decode(encode(x)) is x, bit for bit."""

    @property
    def cut_tokens(self) -> int:
        """Rows of a shard are cut at multiples of this only, which are units at any head_dim."""

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """The tensors that hold the encoded K and V of one layer, K's first."""

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        """k, v [T, Hkv, D] in the compute dtype, T tokens that begin with a unit -> `into`, the
        units of these tokens as `specs` says."""

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        """The first T tokens of `tensors` -> k, v [T, Hkv, D] in the compute dtype."""


@runtime_checkable
class AttendsInPlace(Protocol):
    """What a lossy codec may be able to do beside: attention over its codes, nothing decoded."""

    def serves(self, q: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether `attend` takes these, as shapes, dtypes and devices go, and is the faster way."""

    def attend(
        self,
        q: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        *,
        first: int,
        stop: int,
        scale: float,
        softcap: float = 0.0,
    ) -> Part:
        """q [T, Hq, D] over the tokens [first, stop) of `tensors`, which every row sees all."""


class Plain:
    """K and V as they were computed: how a step's new keys travel."""

    name = "plain"
    exact = True
    cut_tokens = 1

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        shape = (num_kv_heads, head_dim)
        return TensorSpec("k", shape, dtype), TensorSpec("v", shape, dtype)

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        into[0].copy_(k)
        into[1].copy_(v)

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        k.copy_(tensors[0])
        v.copy_(tensors[1])


PLAIN = Plain()


class KVShard(Protocol):
    """One rank's keys and values of one context, or of one session's tail."""

    @property
    def codec(self) -> Codec: ...

    @property
    def spans(self) -> tuple[Span, ...]:
        """Positions held, in memory order, which is ascending; touching spans are joined."""

    @property
    def num_tokens(self) -> int: ...

    def reserve(self, spans: tuple[Span, ...]) -> None:
        """The next tokens, for all layers; `write` fills them layer by layer. Checks capacity."""

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [T, Hkv, D] of the spans last reserved, encoded into place."""

    def tensors(
        self, layer: int, num_tokens: int | None = None, first: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """The units of token rows [first, num_tokens) (to the end), each tensor contiguous; `first`
        is a multiple of the codec's `cut_tokens`."""
