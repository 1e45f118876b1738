"""Codecs `nuq4` and `nuq3`: normal-float levels, keys without their positions, a row kept exact.

    K   turned back to the page's first token, less the page's mean of each channel
    rows rotated (Hadamard); 16 or 8 levels of a normal distribution times one fitted scale a token
    one token of a page and head, the one least like the mean for its size, in 16 bits

kernels/page_nuq.py has the formulas, kernels/page_turn.py says why no positions and no model are
needed: within a page it is enough to turn to the first token, and the base of the rotary positions
shows in the page, which states it.

Bits per element: 4 (or 3) codes + 16 / D scale + 16 / P kept row; K also 16 / P for its mean and 64
a page and head for what is kept: 4.31 over K and V at D 128 and pages of 128 tokens, 4.44 at D 64,
where int4 has 4.56. On smollm2 nuq4's error of attention is 0.057 and its KL of the next token
3.5e-3, int4's 0.085 and 5.5e-3; nuq3's, at a bit less, 0.112 and 2.2e-2. There is no attention
over the codes yet: pages are decoded first.

Source: KVQuant, https://arxiv.org/abs/2401.18079 (keys before their positions, non-uniform levels,
outliers and sinks kept apart); there channels of K have scales and 1 % of the elements are kept.
"""

from __future__ import annotations

import torch

from ringspan.attention.kv import TensorSpec
from ringspan.kernels import page_nuq
from ringspan.kernels.page_columns import rotates
from ringspan.types import PAGE_TOKENS, page_tokens_for


class NuqCodec:
    """A page, B bytes of a row's codes, R the 16-bit dtype of K and V (bf16 of fp32):

    k_codes [Hkv, P, B] uint8, k_scale [Hkv, P] fp16, k_mean [Hkv, D] fp16, k_kept [Hkv, 8] uint8,
    k_row [Hkv, D] R, v_codes, v_scale and v_row as K's.
    """

    exact = False
    cut_tokens = PAGE_TOKENS

    def __init__(self, bits: int) -> None:
        self._levels = {4: page_nuq.NUQ4, 3: page_nuq.NUQ3}[bits]
        self.name = f"nuq{bits}"

    def params(self, head_dim: int) -> str:
        rotation = "hadamard" if rotates(head_dim) else "plain"
        return f"{rotation} k-turned-back-in-page k-mean row-kept normal-levels={self._levels.bits}"

    def specs(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
        tokens = page_tokens_for(head_dim)
        made = page_nuq.shapes(self._levels, num_kv_heads, head_dim, tokens, dtype)
        return tuple(TensorSpec(name, shape, kind, tokens) for name, shape, kind in made)

    def encode(self, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]) -> None:
        page_nuq.encode_pages(self._levels, k, v, into)

    def decode(self, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        page_nuq.decode_pages(self._levels, tensors, k, v)
