"""Which models the attention hook can carry.

The hook replaces softmax attention between the q, k and v that transformers hands to its attention
interface, and every rank sees only its own tokens. So each layer must be causal softmax attention
over keys and values of one head_dim, with no state that flows from token to token beside them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ringspan.attention.models.facts import head_dim
from ringspan.attention.models.quiet import quiet
from ringspan.attention.models.random_init import empty_model
from ringspan.attention.models.rope import LENGTH_DEPENDENT, rope_types
from ringspan.errors import UnsupportedModel
from ringspan.specs import ModelFacts

CARRIED_LAYERS = ("full_attention", "sliding_attention")
PROBE = "ringspan_probe"

_HARMLESS = {"position_ids", "use_cache", "cache_position", "logits_to_keep", "is_causal", PROBE}
_HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
_CARRIED = {"scaling", "dropout", "sliding_window", "softcap", "s_aux"}
_SINKS = ("sinks", "sink", "attention_sink_bias")
"""Names of parameters that are attention sinks: logits of one more term in the denominator."""
_MEDIA = ("vision", "image", "video", "audio", "speech")


def check_model(config: PretrainedConfig) -> None:
    """Raises UnsupportedModel, by name and reason, for a model the hook cannot carry.

    Looks at the config, the class that transformers would build and, if these look right, at its
    modules on the meta device. No weights are read.
    """
    with quiet():
        reason = _refused_by_config(config) or _refused_by_class(config)
        if reason is None:
            reason = _refused_by_modules(config)
    if reason is not None:
        raise UnsupportedModel(f"a {config.model_type} model cannot be carried: {reason}")


def check_attention_calls(model: PreTrainedModel, facts: ModelFacts) -> None:
    """Runs two tokens through the loaded model and holds every attention call against the facts.

    Raises UnsupportedModel if a layer does not call the attention interface exactly once in order,
    with the heads, head_dim and window that the facts promise and nothing the hook ignores.
    """
    calls: list[dict[str, Any]] = []
    own = model.config._attn_implementation
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    with quiet(), torch.no_grad():
        model.set_attn_implementation(PROBE)
        try:
            model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
                **{PROBE: calls},
            )
        finally:
            model.set_attn_implementation(own)
    layers = [call["layer"] for call in calls]
    reason = None
    if layers != list(range(facts.num_layers)):
        reason = f"its {facts.num_layers} layers called the attention interface as {layers}"
    sinks = sum(name.rpartition(".")[2] in _SINKS for name, _ in model.named_parameters())
    if reason is None and sinks != (handed := sum(call["sinks"] is not None for call in calls)):
        reason = f"{sinks} of its layers have attention sinks, {handed} hand them to attention"
    for call in calls:
        reason = reason or _refused_by_call(call, facts)
    if reason is not None:
        raise UnsupportedModel(f"a {facts.family} model cannot be carried: {reason}")


def _refused_by_config(config: PretrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; wanted a decoder-only model"
    parts = getattr(config, "sub_configs", {})
    if media := [name for name in parts if any(word in name for word in _MEDIA)]:
        return f"it takes more than text ({', '.join(media)}); wanted a text-only checkpoint"
    if getattr(config, "add_cross_attention", False) or getattr(
        config, "cross_attention_layers", None
    ):
        return "it has cross-attention layers"
    if getattr(config, "use_bidirectional_attention", False) or (
        getattr(config, "is_causal", True) is False
    ):
        return "its attention looks forward too (bidirectional); wanted causal attention"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention (MLA): its keys and values differ in head_dim"
    if getattr(config, "num_kv_shared_layers", None):
        return "some of its layers share the keys and values of others"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention"
    kinds = set(getattr(config, "layer_types", None) or ()) | set(
        getattr(config, "layers_block_type", None) or ()
    )
    if foreign := sorted(kinds - set(CARRIED_LAYERS) - {"attention"}):
        return f"it has layers of the kind {', '.join(foreign)}, which are not softmax attention"
    for kind in rope_types(config):
        if kind in LENGTH_DEPENDENT:
            return f"rope type {kind}: {LENGTH_DEPENDENT[kind]}"
    return None


def _refused_by_class(config: PretrainedConfig) -> str | None:
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        return "transformers has no causal language model of this type"
    if getattr(model_class, "_is_stateful", False):
        return "it has state-space or recurrent layers, whose state the hook does not see"
    own_switch = getattr(config, "alibi", getattr(config, "attn_config", None))
    has_alibi = any("alibi" in name for name in vars(sys.modules[model_class.__module__]))
    if getattr(own_switch, "alibi", own_switch) or (has_alibi and own_switch is None):
        return "ALiBi: its positions are a bias on the attention scores"
    if not model_class._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    return None


def _refused_by_modules(config: PretrainedConfig) -> str | None:
    try:
        model = empty_model(config, torch.bfloat16, torch.device("meta"))
        head_dim(config)
    except Exception as error:  # whatever a model class does not like about its config
        return f"transformers cannot build it from this config ({' '.join(str(error).split())})"
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and getattr(module, "is_causal", True) is False:
            return f"{name} is not causal"
    return None


def _refused_by_call(call: dict[str, Any], facts: ModelFacts) -> str | None:
    at = f"layer {call['layer']}"
    heads = (facts.num_q_heads, facts.num_kv_heads, facts.num_kv_heads)
    if call["heads"] != heads:
        return f"{at} has (q, k, v) heads {call['heads']}, its config says {heads}"
    if set(call["dims"]) != {facts.head_dim}:
        return f"{at} has (q, k, v) head_dims {call['dims']}, its config says {facts.head_dim}"
    if call["masked"]:
        return f"{at} is handed an attention mask of its own"
    window = facts.windows[call["layer"]]
    if call["window"] != window:
        return f"{at} has the sliding window {call['window']}, its config says {window}"
    if call["sinks"] not in (None, (facts.num_q_heads,)):
        return f"{at} has attention sinks {call['sinks']}, wanted one a q head"
    if call["foreign"]:
        return f"{at} hands {', '.join(call['foreign'])} to attention, which would be ignored"
    return None


def _probe(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function that notes how it was called and answers zeros [B, T, Hq, D]."""
    foreign = {name for name, value in kwargs.items() if value is not None}
    foreign -= _HARMLESS | _CARRIED
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        foreign.add("is_causal=False")
    kwargs[PROBE].append(
        {
            "layer": getattr(module, "layer_idx", None),
            "heads": (q.shape[1], k.shape[1], v.shape[1]),
            "dims": (q.shape[-1], k.shape[-1], v.shape[-1]),
            "masked": attention_mask is not None,
            "window": kwargs.get("sliding_window"),
            "sinks": None if kwargs.get("s_aux") is None else tuple(kwargs["s_aux"].shape),
            "foreign": sorted(foreign),
        }
    )
    return torch.zeros_like(q.transpose(1, 2)), None


AttentionInterface.register(PROBE, _probe)
