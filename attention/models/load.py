"""Load a model by its name: weights on the device, in the compute dtype, ready for the hook."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ringspan.attention.models.check import check_attention_calls, check_model
from ringspan.attention.models.facts import model_facts
from ringspan.attention.models.fingerprint import fingerprint
from ringspan.attention.models.gguf import converted_folder
from ringspan.attention.models.quiet import quiet
from ringspan.attention.models.random_init import empty_model, random_config, random_model
from ringspan.attention.models.retriever import retriever_config, retriever_model
from ringspan.attention.models.rope import apply_rope_scaling, refresh_rope_buffers
from ringspan.attention.models.source import Folder, Gguf, Hub, Random, Retriever, parse_name
from ringspan.errors import BadInput, RingspanError, UnknownName
from ringspan.specs import ModelFacts, ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_loading = threading.Lock()  # building a model patches transformers' globals


class LoadedModel(NamedTuple):
    model: PreTrainedModel
    """In eval mode, on the device, in the compute dtype, requiring no gradients."""
    facts: ModelFacts
    weights_bytes: int


def load_model(spec: ModelSpec, device: torch.device) -> LoadedModel:
    """The model that `spec` names, on `device`.

    Raises UnknownName, UnsupportedModel (the hook cannot carry it) or BadInput (missing, broken or
    unreachable weights, a rope scaling that cannot be applied). Weights of a folder are
    memory-mapped, so fp32 ranks on one host share them.
    """
    source = parse_name(spec.name)
    dtype = resolve_dtype(spec.dtype, device)
    with _loading, torch.no_grad():
        config = _configured(spec)
        match source:
            case Random():
                model = random_model(config, dtype, device, spec.seed)
            case Retriever():
                model = retriever_model(config, source, dtype, device, spec.seed)
            case _:
                model = _pretrained(spec.name, config, dtype, device)
        refresh_rope_buffers(model)
        if getattr(config, "attn_logit_softcapping", None):
            # Unhooked it must be right too: sdpa, transformers 5.17's choice, ignores the cap.
            model.set_attn_implementation("eager")
        model.eval().requires_grad_(False)
        facts = model_facts(
            model, name=spec.name, dtype=dtype_name(dtype), fingerprint=fingerprint(model)
        )
        check_attention_calls(model, facts)
    tensors = [*model.parameters(), *model.buffers()]
    return LoadedModel(model, facts, sum(t.numel() * t.element_size() for t in tensors))


def facts_from_config(spec: ModelSpec, device: torch.device) -> ModelFacts:
    """The facts of what `load_model` would load, without its weights; the fingerprint is ""."""
    dtype = resolve_dtype(spec.dtype, device)
    with _loading, quiet():
        model = empty_model(_configured(spec), dtype, torch.device("meta"))
    return model_facts(model, name=spec.name, dtype=dtype_name(dtype), fingerprint="")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU and fp32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UnknownName("dtype", name, ("auto", *DTYPES))
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pretrained_location(name: str) -> str | None:
    """The folder or hub id that transformers can load `name` from; None for made-up weights."""
    match parse_name(name):
        case Folder(path):
            return path
        case Gguf(path):
            return str(converted_folder(Path(path)))
        case Hub(repo_id):
            return repo_id
        case _:
            return None


def _configured(spec: ModelSpec) -> PretrainedConfig:
    """The checked config with `spec`'s rope scaling applied."""
    source = parse_name(spec.name)
    with quiet():
        match source:
            case Random(name):
                config = random_config(name)
            case Retriever():
                config = retriever_config(source)
            case _:
                config = _from_pretrained(AutoConfig, spec.name)
        check_model(config)
        apply_rope_scaling(config, spec.rope_scaling)
    return config


def _pretrained(
    name: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    placing = {} if device.type == "cpu" else {"device_map": {"": device}}
    with quiet():
        # Pickled weights could run code; only safetensors are read.
        return _from_pretrained(
            AutoModelForCausalLM, name, config=config, dtype=dtype, use_safetensors=True, **placing
        )


def _from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """`auto_class.from_pretrained`, every failure told as one BadInput that names the model."""
    location = pretrained_location(name)
    try:
        return auto_class.from_pretrained(location, trust_remote_code=False, **options)
    except (RingspanError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(parse_name(name), Hub):
            raise BadInput(
                f"model {name!r} is not a folder here and could not be fetched from the hub "
                f"({text[:200]}); give a local folder, or check the id and the network"
            ) from error
        raise BadInput(f"cannot load model {name!r}: {text[:300]}") from error
