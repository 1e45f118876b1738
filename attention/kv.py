"""What attention needs of a KV cache; `ringspan.kvstore` implements it.

A rank's shard of a context keeps, for each layer, a tuple of tensors whose first axis is the
token: for the raw codec (K, V), each [tokens, Hkv, D]; for an encoded one codes and scales. Token
first, so that the first n tokens of any of them are one contiguous piece of memory: a ring hop
sends them without a copy, and a raw shard is attended in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from ringspan.types import Span


class TensorSpec(NamedTuple):
    """One tensor of an encoding: what stands behind the token axis."""

    name: str
    shape: tuple[int, ...]
    """Of one token, e.g. (Hkv, D)."""
    dtype: torch.dtype


class Codec(Protocol):
    """How K and V become bytes. Stateless; equal for all ranks of a gang."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool:
        """decode(encode(x)) is x, bit for bit."""

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        """The tensors that hold the encoded K and V of one layer, K's first."""

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        """k, v [T, Hkv, D] in the compute dtype -> `into`, tensors [T, ...] as `specs` says."""

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        """`tensors` [T, ...] -> k, v [T, Hkv, D] in the compute dtype."""


class Plain:
    """K and V as they were computed: how a step's new keys travel."""

    name = "plain"
    exact = True

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

    def tensors(self, layer: int, num_tokens: int | None = None) -> tuple[torch.Tensor, ...]:
        """The encoded tensors of the first `num_tokens` tokens (all), each contiguous."""
