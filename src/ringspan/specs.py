"""Which model, and what planning needs to know of it: shared by attention and by the messages."""

from __future__ import annotations

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """deploy -> every rank: which weights, and how they are to be loaded."""

    name: str
    """`smollm2`, a folder, a hub id, a .gguf path, `random:<config>`, `retriever[:heads...]`."""
    dtype: str = "auto"
    """`auto` (bf16 on a GPU, fp32 on a CPU), `float32`, `bfloat16`, `float16`."""
    rope_scaling: str | None = None
    """`yarn:4`, `linear:2`, `theta:500000`; None leaves the model's own."""
    seed: int = 0
    """Of the random weights (`random:`, `retriever`)."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """What planning needs to know of a model; no weights."""

    name: str
    family: str
    """transformers' model_type."""
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    num_params: int
    flops_per_token: float
    """Of everything but attention scores: 2 * parameters that multiply, embedding left out."""
    max_positions: int
    dtype: str
    """`float32`, `bfloat16` or `float16`: what K and V are computed in."""
    fingerprint: str
    """Hex; covers the weights' digest and every config field that changes K or V."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer, None for full attention."""
    vocab_size: int = 0
    """Token ids are smaller than this; 0 if it is not known."""
