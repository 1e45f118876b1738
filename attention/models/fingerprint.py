"""One digest for everything that decides a model's keys and values.

    BLAKE3( domain ‖ canonical JSON of {config, tensors} )

config   the fields that differ from the class's defaults (so a newer transformers that merely adds
         a field changes nothing), less `NEUTRAL`, which cannot change a key or a value. A field
         nobody thought of is thus included: at worst a context is prefilled again.
tensors  for every parameter and saved buffer: name, shape, dtype and the `sum64` of its bytes,
         computed where it lies. Equal for equal weights of one dtype on CPU and GPU.

Rotary frequencies are not among them: they follow from the config, see `rope.refresh_rope_buffers`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from blake3 import blake3
from transformers import PretrainedConfig, PreTrainedModel

DOMAIN = b"ringspan model fingerprint v1\0"

NEUTRAL = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",  # of a file already dequantised: the weights say it
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def fingerprint(model: PreTrainedModel) -> str:
    """64 hex digits. Reads all weights once where they lie; waits for the device once."""
    from ringspan.kernels.sum64 import sum64_rows

    tensors = _weights(model)
    sums: list[torch.Tensor] = [sum64_rows(t.contiguous().reshape(1, -1)) for t in tensors.values()]
    totals = torch.cat(sums).tolist()
    content = {
        "config": config_fields(model.config),
        "tensors": [
            [name, list(tensor.shape), str(tensor.dtype), total]
            for (name, tensor), total in zip(tensors.items(), totals, strict=True)
        ],
    }
    return blake3(DOMAIN + _canonical(content)).hexdigest()


def config_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of the config that may change K or V."""
    fields = config.to_diff_dict()
    # Always told, default or not: a default that another version changes must not go unseen.
    fields["rope_parameters"] = getattr(config, "rope_parameters", None)
    return {name: value for name, value in fields.items() if name not in NEUTRAL}


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    saved = model.state_dict().keys()
    tensors = dict(model.named_parameters())  # tied ones once
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: tensors[name].detach() for name in sorted(tensors)}


def _canonical(content: dict[str, Any]) -> bytes:
    # repr-exact floats, sorted keys, no spaces: the same bytes from every process.
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode()
