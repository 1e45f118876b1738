"""The binding to transformers: one attention function for every decoder family.

transformers calls it with q, k, v after RoPE. The step that is under way arrives as the model's
`ringspan` keyword argument, so that ranks of one process never share a global.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from ringspan.attention.engine import Rules, Step
from ringspan.errors import UnsupportedModel

ATTENTION_NAME = "ringspan"


def ringspan_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None)."""
    step: Step | None = kwargs.get("ringspan")
    if step is None:
        raise ValueError("the model runs with ringspan's attention but without a step")
    if attention_mask is not None or query.shape[0] != 1:
        raise UnsupportedModel(
            f"{type(module).__name__} needs an attention mask or a batch, which is not carried"
        )
    rules = Rules(
        layer=int(module.layer_idx),
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return step.attend(rules, q, k, v)[None], None


def bind(model: Any) -> None:
    """Make `model` attend through us."""
    AttentionInterface.register(ATTENTION_NAME, ringspan_attention)
    model.set_attn_implementation(ATTENTION_NAME)
