"""What the codecs that encode whole pages share: tensors in units of a page, kernels by kind.

Every tensor of such a codec is [pages, Hkv, ...]: one unit holds a page's tokens, K dimension by
dimension and V token by token, as attention over the codes wants them (kernels/pages.py has the
layouts, kernels/decode.py the attention). A page is encoded in one call and its bytes depend on its
own tokens only. The context's last page may be short: it takes a whole unit, what it lacks is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ringspan.attention.kv import TensorSpec
from ringspan.kernels.decode import attend_pages
from ringspan.kernels.pages import decode_pages, encode_pages, page_shapes
from ringspan.types import PAGE_TOKENS, page_tokens_for

if TYPE_CHECKING:
    from ringspan.types import Part

SWEEP_ROWS = 128
"""Rows of a kv head (its q heads times the tokens) up to which codes are attended to in place. A
sweep over the codes takes 64 of them; decoding reads the codes once, but writes and reads K and V
in the compute dtype, about as many bytes as three sweeps."""


def rotates(head_dim: int) -> bool:
    """Whether rows of this length are rotated: Hadamard matrices of powers of two only."""
    return head_dim > 1 and head_dim & (head_dim - 1) == 0


class PagedCodec:
    """name: also the kind of kernels/pages.py. page_tokens None: `types.page_tokens_for`."""

    name: str
    exact = False
    cut_tokens = PAGE_TOKENS

    def __init__(self, page_tokens: int | None = None) -> None:
        self._page_tokens = page_tokens
        if page_tokens is not None:
            self.cut_tokens = page_tokens

    def page_tokens(self, head_dim: int) -> int:
        return page_tokens_for(head_dim) if self._page_tokens is None else self._page_tokens

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        tokens = self.page_tokens(head_dim)
        shapes = page_shapes(self.name, num_kv_heads, head_dim, tokens)
        return tuple(TensorSpec(name, shape, kind, tokens) for name, shape, kind in shapes)

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        encode_pages(self.name, k, v, into)

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        decode_pages(self.name, tensors, k, v)

    def serves(self, q: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Few rows, and on a GPU a kernel for these shapes."""
        rows, num_q_heads, _ = q.shape
        if not rows or rows * num_q_heads > SWEEP_ROWS * tensors[0].shape[1]:
            return False
        if not q.is_cuda:
            return True
        from ringspan.kernels import decode_triton  # imports triton, which a CPU does not need

        return bool(decode_triton.serves(self.name, q, tensors))

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
        return attend_pages(
            self.name, q, tensors, scale=scale, first=first, stop=stop, softcap=softcap
        )
