"""Rotary positions: what `--rope-scaling` asks for, written into a transformers config.

`yarn:F`   YaRN (https://arxiv.org/abs/2309.00071) by the factor F: F times the positions.
`linear:F` positions divided by F (https://arxiv.org/abs/2306.15595): F times the positions.
`theta:T`  a larger base. By the NTK argument, base' = base * F^(D / (D - 2)) stretches the slowest
           pair by F and leaves the fastest alone, so T gives F = (T / base)^((D - 2) / D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ringspan.attention.models.facts import head_dim, max_positions
from ringspan.errors import BadInput

LENGTH_DEPENDENT = {
    "dynamic": "the frequencies would change with the length and spoil keys already cached",
    "longrope": "the frequencies change with the length and spoil keys already cached",
}
_FORMS = "yarn:4, linear:2 or theta:500000"


class RopeScaling(NamedTuple):
    kind: str
    """`yarn`, `linear` or `theta`."""
    value: float
    """Factor >= 1 of `yarn` and `linear`; the new base of `theta`."""


def parse_rope_scaling(text: str) -> RopeScaling:
    """Raises BadInput for anything but `yarn:F`, `linear:F` (F >= 1) and `theta:T` (T > 1)."""
    kind, _, number = text.partition(":")
    if kind in LENGTH_DEPENDENT:
        raise BadInput(f"rope scaling {text!r} is refused: {LENGTH_DEPENDENT[kind]}; use {_FORMS}")
    if kind not in ("yarn", "linear", "theta"):
        raise BadInput(f"unknown rope scaling {text!r}; use {_FORMS}")
    try:
        value = float(number)
    except ValueError:
        raise BadInput(
            f"rope scaling {text!r} has no number behind the colon; use {_FORMS}"
        ) from None
    if not math.isfinite(value) or value < 1 or (kind == "theta" and value <= 1):
        wanted = "a base above 1" if kind == "theta" else "a factor of at least 1"
        raise BadInput(f"rope scaling {text!r}: wanted {wanted}, found {number}")
    return RopeScaling(kind, value)


def apply_rope_scaling(config: PretrainedConfig, text: str | None) -> None:
    """Writes the scaling into `config.rope_parameters` and `config.max_position_embeddings`.

    A model with parameters per layer type (Gemma 3) is scaled in its full-attention layers only:
    the others never look further than their window. Raises BadInput for a scaling that cannot be
    read or cannot be put on top of the model's own.
    """
    if text is None:
        return
    scaling = parse_rope_scaling(text)
    parameters = _full_attention_parameters(config)
    if not parameters or "rope_theta" not in parameters:
        raise BadInput(
            f"rope scaling {text!r}: a {config.model_type} model has no rotary positions to scale"
        )
    own = parameters.get("rope_type", "default")
    positions = max_positions(config)
    if scaling.kind == "theta":
        base = float(parameters["rope_theta"])
        if scaling.value < base:
            raise BadInput(
                f"rope scaling {text!r}: wanted a base above the model's own {base:g}, "
                f"found {scaling.value:g}"
            )
        dim = head_dim(config) * float(parameters.get("partial_rotary_factor") or 1.0)
        parameters["rope_theta"] = scaling.value
        stretch = (scaling.value / base) ** ((dim - 2) / dim)
    else:
        if own == "yarn" == scaling.kind:  # a larger factor on the positions it was trained with
            positions = int(parameters["original_max_position_embeddings"])
        elif own != "default":
            raise BadInput(
                f"rope scaling {text!r}: the model's positions are scaled by {own} already; "
                "only theta:<base> can be put on top"
            )
        parameters["rope_type"] = scaling.kind
        parameters["factor"] = scaling.value
        if scaling.kind == "yarn":
            parameters["original_max_position_embeddings"] = positions
        stretch = scaling.value
    config.max_position_embeddings = int(positions * stretch)


def rope_types(config: PretrainedConfig) -> tuple[str, ...]:
    """The rope types in use, one per layer type or one for all; empty without rotary positions."""
    return tuple(p.get("rope_type", "default") for p in _all_parameters(config))


def refresh_rope_buffers(model: PreTrainedModel) -> None:
    """Computes the rotary frequencies anew on the CPU in fp32 and puts them on the device.

    `pow` differs by a unit in the last place between devices, and a cast of the whole model would
    round them; at position 10^6 either turns a pair by a visible angle. So that a context saved on
    one device is read with the same frequencies on another, all take the CPU's.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if not type(module).__name__.endswith("RotaryEmbedding") or config is None:
            continue
        with torch.device("cpu"):
            fresh = type(module)(config=config)
        for name, buffer in fresh.named_buffers(recurse=False):
            setattr(module, name, buffer.to(getattr(module, name).device))


def _full_attention_parameters(config: PretrainedConfig) -> dict[str, Any] | None:
    parameters = getattr(config, "rope_parameters", None)
    if parameters and "full_attention" in parameters:
        return parameters["full_attention"]
    return parameters


def _all_parameters(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    if nested:
        yield from nested
    elif parameters:
        yield parameters
