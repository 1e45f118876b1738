"""What planning needs to know of a model, and the arithmetic it does with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ringspan.errors import TooLarge
from ringspan.specs import ModelFacts

if TYPE_CHECKING:  # planning needs the arithmetic alone, and transformers takes seconds to import
    from transformers import PretrainedConfig, PreTrainedModel


def model_facts(model: PreTrainedModel, *, name: str, dtype: str, fingerprint: str) -> ModelFacts:
    """Facts of a loaded model, or of one on the meta device (then without a fingerprint: "")."""
    config = model.config
    return ModelFacts(
        name=name,
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads(config),
        head_dim=head_dim(config),
        hidden_size=config.hidden_size,
        num_params=sum(p.numel() for p in model.parameters()),
        flops_per_token=2.0 * _multiplying_params(model),
        max_positions=max_positions(config),
        dtype=dtype,
        fingerprint=fingerprint,
        windows=windows(config),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
    )


def head_dim(config: PretrainedConfig) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def num_kv_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def max_positions(config: PretrainedConfig) -> int:
    return int(config.max_position_embeddings)


def windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Sliding window of each layer in tokens, None for full attention.

    A query at p sees the keys p - window < k <= p, as transformers defines it. Configs with
    `layer_types` say it per layer; in the others `sliding_window` holds for all layers.
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if config.model_type == "mistral":
        types = ["sliding_attention"] * config.num_hidden_layers  # it does not look at layer_types
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def prefill_flops(facts: ModelFacts, new_tokens: int, cached_tokens: int = 0) -> float:
    """FLOP of prefilling `new_tokens` behind `cached_tokens`.

    2 per parameter that multiplies and token (the head, which runs once, left out), and
    4 * Hq * D per (query, key) pair that the causal mask and the layer's window let through.
    """
    pairs = sum(
        _pairs(cached_tokens + new_tokens, window) - _pairs(cached_tokens, window)
        for window in facts.windows
    )
    scores = 4.0 * facts.num_q_heads * facts.head_dim * pairs
    return facts.flops_per_token * new_tokens + scores


def check_positions(facts: ModelFacts, num_tokens: int) -> None:
    """Raises TooLarge if the model has fewer than `num_tokens` positions."""
    if num_tokens > facts.max_positions:
        # The smallest whole factor that would do is what the reader wants to type next.
        factor = -(-num_tokens // facts.max_positions)
        raise TooLarge(
            f"{num_tokens} tokens do not fit the {facts.max_positions} positions of "
            f"{facts.name}; shorten the input or stretch them with --rope-scaling yarn:{factor}"
        )


def _pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs among the first `tokens` positions."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def _multiplying_params(model: PreTrainedModel) -> float:
    """Parameters that each token is multiplied with: no embedding, no head, experts by share."""
    config = model.config
    left_out: set[Any] = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        left_out.update(id(p) for p in module.parameters()) if module is not None else None
    experts = (
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    )
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    return sum(
        p.numel() * (share if ".experts." in name else 1.0)
        for name, p in model.named_parameters()
        if p.dim() > 1 and id(p) not in left_out
    )
