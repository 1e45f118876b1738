"""Long chunks through an unmodified decoder model with bounded activations. Inference only.

Every layer's MLP runs on tiles of rows that write into one output, so that its wide intermediate
tensors exist for one tile only. RMSNorm, rotary embedding and the MLP's gated product go through
the fused kernels. Each of these is taken up only after a small random input went through both ways
with the same result; whatever is not recognised, or differs, runs as it is and is named.

Modules are patched as instances, their classes stay. The rotary function is a global of the
model's modeling module and is replaced there: models of one family that share a process share it.

T rows of the chunk · H hidden_size · F intermediate_size · Q = Hq * D · K = Hkv * D
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ringspan.kernels.rms_norm import rms_norm
from ringspan.kernels.rope import apply_rope, why_not
from ringspan.kernels.swiglu import ACTIVATIONS, swiglu

Forward = Callable[..., Any]

_ORIGINAL = "ringspan_original"
"""Attribute of our functions: what they stand in for."""
_ROPE = "apply_rotary_pos_emb"
_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")
_CHECK_ROWS = 7


class Tiled(NamedTuple):
    """What `tile_model` did."""

    tile_rows: int
    mlps: int
    """Run in tiles."""
    fused_mlps: int
    """Of them, with the fused gated product."""
    fused_norms: int
    fused_ropes: int
    """Modeling modules whose rotary function was replaced."""
    left_alone: tuple[str, ...]
    """What runs as it is, and why: one line a kind."""


def tile_model(model: Any, rows: int, fuse: bool | None = None) -> Tiled:
    """Makes `model` run its MLPs on tiles of `rows` rows, with fused kernels if `fuse`.

    `fuse` None means: on a CUDA device. Chunks of up to `rows` rows are one tile. Doing it again
    replaces what was done before. Raises ValueError for rows < 1 and for a model in training mode.
    """
    if rows < 1:
        raise ValueError(f"tiles of {rows} rows, expected at least 1")
    if model.training:
        raise ValueError("the model is in training mode, tiles are for inference; call eval()")
    fuse = model.device.type == "cuda" if fuse is None else fuse
    left: Counter[str] = Counter()
    mlps = fused_mlps = norms = 0
    with torch.inference_mode():
        for module in model.modules():
            _restore(module)
        for mlp in _mlps(model):
            done = _tile_mlp(mlp, rows, fuse, _sample(model, _CHECK_ROWS), left)
            mlps += done is not None
            fused_mlps += done == "fused"
        if fuse:
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    norms += _fuse_norm(module, model.dtype, left)
        ropes = _fuse_ropes(model, left) if fuse else 0
    told = tuple(f"{count} {what}" for what, count in left.items())
    return Tiled(rows, mlps, fused_mlps, norms, ropes, told)


def activation_bytes(
    model_or_config: Any,
    rows_in_chunk: int,
    tile_rows: int,
    fused: bool = True,
    dtype: torch.dtype | None = None,
) -> int:
    """Peak bytes of one chunk's activations with the tiling on, without KV, exchanges and the
    attention's own scratch (its result is counted). For dense MLPs that could be tiled.

    Alive all along, in elements a row: the embeddings and the layer's input 2 H, cos and sin 2 D;
    and 16 bytes of ids and positions. Beside them the largest of

        rotary      H + Q + 2 K + (Q + K)      normed input, q k v, rotated q k
        attention   H + Q + 2 K + Q + H        normed input, q k v, result, projected result
        MLP         3 H + 2 F tile/T           residual, normed input, result; gate, up

    Without fused kernels the rotary needs 3 Q for its second summand (products and their sum), a
    norm in 16 bits two fp32 copies, and the MLP's tile 3 F. `dtype` is needed only for a config
    that names none; raises ValueError then.
    """
    config = getattr(model_or_config, "config", model_or_config).get_text_config()
    dtype = dtype or getattr(model_or_config, "dtype", None) or config.dtype
    if dtype is None:
        raise ValueError("the config names no dtype; give the dtype that the model computes in")
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    q, k = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    width, tile = config.intermediate_size, min(tile_rows, rows_in_chunk)
    size = dtype.itemsize
    projected = hidden + q + 2 * k
    stages = [
        size * rows_in_chunk * (projected + (q + k if fused else max(3 * q, q + 3 * k))),
        size * rows_in_chunk * (projected + q + hidden),
        size * (rows_in_chunk * 3 * hidden + tile * (2 if fused else 3) * width),
    ]
    if not fused and size < 4:
        stages.append(rows_in_chunk * hidden * (size + 2 * 4))
    layer_inputs = 2 if config.num_hidden_layers > 1 else 1  # the first one is the embeddings
    always = rows_in_chunk * (size * (layer_inputs * hidden + 2 * head_dim) + 16)
    return int(always + max(stages))


def _mlps(model: Any) -> list[nn.Module]:
    """One a decoder layer, where the layer has one that we can find."""
    found = []
    for layer in getattr(model.base_model, "layers", ()):
        found += [m for name in _MLP_NAMES if (m := getattr(layer, name, None)) is not None][:1]
    return found


def _tile_mlp(
    mlp: nn.Module, rows: int, fuse: bool, sample: torch.Tensor, left: Counter[str]
) -> str | None:
    """-> "fused", "plain" or, if it was left alone, None."""
    kind, original = type(mlp).__name__, mlp.forward
    try:
        wanted = original(sample)
        if not isinstance(wanted, torch.Tensor) or wanted.shape != sample.shape:
            left[f"{kind}: does not map [1, T, H] to one tensor of that shape"] += 1
            return None
        cut = torch.cat([original(sample[:, :3]), original(sample[:, 3:])], 1)
    except Exception as error:  # a module's own code may raise anything
        left[f"{kind}: a random input raised {type(error).__name__}"] += 1
        return None
    if wanted.dtype != sample.dtype or not _close(cut, wanted):
        left[f"{kind}: a row's result depends on the rows beside it"] += 1
        return None
    whole, fill, how = original, None, "plain"
    if fuse and all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        act = _activation(mlp.act_fn, sample)
        fused = None if act is None else _fused_mlp(mlp, act)
        if fused is not None and _close(fused(sample), wanted):
            whole, fill, how = fused, fused, "fused"
        else:
            left[f"{kind}: its gated product is not one of ours, tiled as it is"] += 1

    def tiled(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if x is None or x.dim() != 3 or x.shape[0] != 1 or _wants_grad(x):
            return original(*args, **kwargs)
        if x.shape[1] <= rows:
            return whole(x)
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], rows):
            part = slice(start, start + rows)
            if fill is not None:
                fill(x[:, part], out[:, part])
            else:
                out[:, part] = original(x[:, part])
        return out

    _replace(mlp, original, tiled)
    return how


def _fused_mlp(mlp: Any, act: str) -> Forward:
    """forward(x [1, t, H], out or None) -> down(act(gate(x)) * up(x)), the product over gate."""
    down = mlp.down_proj
    bare = type(down) is nn.Linear and "forward" not in down.__dict__ and not down._forward_hooks

    def forward(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        product = swiglu(gate, up, act, out=gate)
        if out is None:
            return down(product)
        if not bare:
            return out.copy_(down(product))
        into, weight = out.view(-1, out.shape[-1]), down.weight.t()
        if down.bias is None:
            torch.mm(product.view(-1, product.shape[-1]), weight, out=into)
        else:
            torch.addmm(down.bias, product.view(-1, product.shape[-1]), weight, out=into)
        return out

    return forward


def _activation(act_fn: Forward, like: torch.Tensor) -> str | None:
    """The name in ACTIVATIONS of what `act_fn` computes, or None."""
    x = torch.linspace(-8, 8, 257, device=like.device)  # fp32: the two forms of GELU differ little
    try:
        wanted = act_fn(x)
    except Exception:  # a module's own code may raise anything
        return None
    for name, act in ACTIVATIONS.items():
        if torch.allclose(act(x), wanted, rtol=1e-6, atol=1e-6):
            return name
    return None


def _fuse_norm(norm: Any, dtype: torch.dtype, left: Counter[str]) -> bool:
    kind, original = type(norm).__name__, norm.forward
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        left[f"{kind}: has no weight [H] or no eps"] += 1
        return False
    if weight.dtype != dtype:
        left[f"{kind}: its weight is {weight.dtype}, not {dtype}"] += 1
        return False
    sample = 3 * _random((1, _CHECK_ROWS, weight.shape[0]), dtype, weight.device)
    try:
        wanted = original(sample)
    except Exception as error:  # a module's own code may raise anything
        left[f"{kind}: a random input raised {type(error).__name__}"] += 1
        return False
    for unit_offset in (False, True):
        if _same(rms_norm(sample, weight, eps, unit_offset), wanted):
            break
    else:
        left[f"{kind}: computes something else than rms_norm"] += 1
        return False

    def fused(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if x is None or x.dtype != norm.weight.dtype or _wants_grad(x):
            return original(*args, **kwargs)
        return rms_norm(x, norm.weight, eps, unit_offset)

    _replace(norm, original, fused)
    return True


def _fuse_ropes(model: Any, left: Counter[str]) -> int:
    """The rotary functions of the modeling modules that the layers' attention comes from."""
    count = 0
    attentions = {
        type(layer.self_attn).__module__: layer.self_attn
        for layer in getattr(model.base_model, "layers", ())
        if hasattr(layer, "self_attn")
    }
    for name, attention in attentions.items():
        module: Any = sys.modules[name]
        current = getattr(module, _ROPE, None)
        original = getattr(current, _ORIGINAL, current)
        if original is None:
            left[f"{name}: has no {_ROPE}"] += 1
            continue
        dim = getattr(attention, "head_dim", None) or 128
        q, k, cos, sin = (
            _random((1, _CHECK_ROWS, heads, dim), model.dtype, model.device, seed).transpose(1, 2)
            for seed, heads in enumerate((4, 2, 1, 1))
        )
        arguments = (q, k, cos[:, 0], sin[:, 0])
        try:
            same = all(map(_same, apply_rope(*arguments), original(*arguments)))
        except Exception as error:  # a module's own code may raise anything
            left[f"{name}.{_ROPE}: a random input raised {type(error).__name__}"] += 1
            continue
        if not same:
            left[f"{name}.{_ROPE}: computes something else than rope"] += 1
            continue
        setattr(module, _ROPE, _rope_for(original))
        count += 1
    return count


def _rope_for(original: Forward) -> Forward:
    def rotate(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 4 or kwargs or why_not(*args) or any(map(_wants_grad, args)):
            return original(*args, **kwargs)
        return apply_rope(*args)

    setattr(rotate, _ORIGINAL, original)
    return rotate


def _replace(module: nn.Module, original: Forward, forward: Forward) -> None:
    setattr(forward, _ORIGINAL, original)
    module.forward = forward


def _restore(module: nn.Module) -> None:
    """Takes our forward off an instance; somebody else's that was there before comes back."""
    original = getattr(module.__dict__.get("forward"), _ORIGINAL, None)
    if original is None:
        return
    if getattr(original, "__func__", None) is type(module).forward:
        del module.forward
    else:
        module.forward = original


def _wants_grad(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _sample(model: Any, rows: int) -> torch.Tensor:
    hidden = model.config.get_text_config().hidden_size
    return _random((1, rows, hidden), model.dtype, model.device)


def _random(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to the order of sums and a rounding of what lies between."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    allowed = max(4 * torch.finfo(wanted.dtype).eps, 1e-4) * wanted.float().abs().max()
    return bool(((got.float() - wanted.float()).abs() <= allowed).all())


def _same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Nearly all elements equal, the rest within two units in the last place; fp32 within eight.

    Two: a factor that falls on the other side of a rounding edge is one off, its product then two.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    units = 8 if wanted.dtype == torch.float32 else 2
    allowed = units * torch.finfo(wanted.dtype).eps * wanted.double().abs()
    close = ((got.double() - wanted.double()).abs() <= allowed).all()
    few = wanted.dtype == torch.float32 or (got != wanted).double().mean() < 0.05
    return bool(close) and bool(few)
