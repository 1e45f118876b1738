"""Models of real shape with random weights, made on the device in the compute dtype.

Weights are normal with standard deviation 0.02 * sqrt(4096 / hidden_size): 0.02 for an 8B model,
and for a narrow one what gives its projections outputs of the same size, so that attention scores
of the tiny models differ as much from each other as those of the large ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

LONG = 1 << 21
"""Positions of the random models: their weights learned no limit, so measuring needs none."""

_TINY: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOW = 96  # smaller than a page, and no divisor of one

RANDOM_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": LONG,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": LONG,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "tiny": {**_TINY, "model_type": "llama", "max_position_embeddings": LONG},
    "tiny-llama": {**_TINY, "model_type": "llama"},
    "tiny-qwen2": {
        **_TINY,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": _WINDOW,
        "max_window_layers": 2,
    },
    "tiny-qwen3": {**_TINY, "model_type": "qwen3"},
    "tiny-mistral": {**_TINY, "model_type": "mistral", "sliding_window": _WINDOW},
    "tiny-gemma2": {
        **_TINY,
        "model_type": "gemma2",
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 5.0,  # Gemma's 50 would hardly bend scores of this size
        "final_logit_softcapping": 30.0,
    },
    "tiny-gemma3": {
        **_TINY,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": 256,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "tiny-gpt-oss": {
        **_TINY,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": _WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
}


def random_config(name: str) -> PretrainedConfig:
    """The transformers config of one of `RANDOM_CONFIGS`."""
    return AutoConfig.for_model(**RANDOM_CONFIGS[name])


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """A model with seeded random weights; no copy of them exists anywhere else.

    The same seed gives the same weights on every device of one kind, not across kinds: a CPU and a
    GPU draw different numbers.
    """
    model = empty_model(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    std = 0.02 * math.sqrt(4096 / config.hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights keep what their module gave them, 1 or (Gemma) 0.
            if parameter.dim() > 1 or name.endswith(("bias", "sinks")):
                parameter.normal_(0.0, std, generator=generator)
    return model


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model with uninitialised matrices and ready buffers; on `meta` it costs no memory."""
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval().requires_grad_(False)
