"""A Llama whose weights are constructed so that it answers a planted key with its value, exactly.

Two layers, no MLP. The residual stream is [current code | previous code | prediction | constant],
64 channels each; a code is a random row of ±1 per vocabulary entry. Token ids are the model's own:
there is no tokenizer.

Layer 1 copies the code of the previous token into "previous". Its q and k come from the constant
alone, so its scores depend on distance alone: q turned back by one position, in the fast rotary
pairs with weights w_i, gives  score(d) = GAIN * sum_i w_i cos(f_i (d - 1)),  highest at d = 1. The
w_i fall off by half with a floor: of the forms tried this one has the best ratio of its margin
(0.538 over all distances to 2^21) to its sensitivity to noise on K (|w| = 1.22).

Layer 2 matches its own current code against the previous codes of all tokens and copies the
current code of the token found into "prediction": the value that followed the key. It uses the
slow pairs, which at a RoPE base of 10^18 do not turn (10^-3 rad) over a million tokens. Codes pass
through one random rotation on both sides, so that K has entries of all sizes, as real keys have,
and not ±1, which every codec holds exactly.

margin m in (0, 1]:  k = R (m code + sqrt(1 - m^2) common),  q = R code / m.  Without noise the
scores differ by the same amounts for every m (the common part shifts all scores of a query alike),
but relative noise e on K moves each by 8 e / m. 1.0 forgives 4-bit codes; the smaller, the finer
the noise that makes it miss.

KV head g carries its own slice of the codes, in the same dims of V as the others theirs, and its q
heads share the sum: a scheme that pairs q heads with the wrong KV heads garbles the answers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from ringspan.attention.models.random_init import empty_model
from ringspan.attention.models.source import Retriever

VOCAB = 4096
HEAD_DIM = 128
CODE = 64
"""Width of a code, and of each of the four parts of the residual stream."""
GAIN = 100.0
ROPE_THETA = 1e18
CONSTANT = 8.0

_CURRENT, _PREVIOUS, _PREDICTION = (slice(i * CODE, (i + 1) * CODE) for i in range(3))
_CONSTANT = 3 * CODE
_FAST_PAIRS = 20
_SLOW = [*range(32, 64), *range(96, 128)]  # dims of the rotary pairs 32 to 63


def retriever_config(source: Retriever) -> PretrainedConfig:
    # Llama wants hidden_size to be a multiple of the heads; channels beyond 256 stay zero.
    hidden = -(-4 * CODE // source.num_q_heads) * source.num_q_heads
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=source.num_q_heads,
        num_key_value_heads=source.num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1 << 21,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        rms_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=None,
    )


def retriever_model(
    config: PretrainedConfig,
    source: Retriever,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> PreTrainedModel:
    """The constructed model. The same seed gives the same weights on every device."""
    model = empty_model(config, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2, (VOCAB, CODE), generator=generator) * 2.0 - 1.0
    common = torch.randint(0, 2, (CODE,), generator=generator) * 2.0 - 1.0
    rotation = torch.linalg.qr(
        torch.randn(CODE, CODE, generator=generator, dtype=torch.float64)
    ).Q.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.model.embed_tokens.weight[:, _CURRENT] = codes
        model.model.embed_tokens.weight[:, _CONSTANT] = CONSTANT
        model.lm_head.weight[:, _PREDICTION] = codes
        first, second = (layer.self_attn for layer in model.model.layers)
        # What RMSNorm divides by before each layer: the codes' squares are 1, the constant's 64.
        before_first = math.sqrt((CODE + CONSTANT**2) / config.hidden_size)
        before_second = math.sqrt((2 * CODE + CONSTANT**2) / config.hidden_size)
        _copy_codes(first, _PREVIOUS, before_first, source)
        _copy_codes(second, _PREDICTION, before_second, source)
        _look_at_previous(first, before_first)
        _match_codes(second, before_second, rotation, common, source.margin)
    return model.to(device, dtype)


def _copy_codes(attention: torch.nn.Module, target: slice, norm: float, source: Retriever) -> None:
    """V: the current code, a slice per KV head; O: the slices, from all q heads, into `target`."""
    group = source.num_q_heads // source.num_kv_heads
    edges = [CODE * head // source.num_kv_heads for head in range(source.num_kv_heads + 1)]
    v, o = _per_head(attention.v_proj.weight), attention.o_proj.weight
    for kv_head, (start, stop) in enumerate(pairwise(edges)):
        for dim, code_dim in enumerate(range(start, stop)):
            v[kv_head, dim, code_dim] = norm
            for q_head in range(kv_head * group, (kv_head + 1) * group):
                o[target.start + code_dim, q_head * HEAD_DIM + dim] = 1.0 / group


def _look_at_previous(attention: torch.nn.Module, norm: float) -> None:
    half = HEAD_DIM // 2
    pairs = torch.arange(_FAST_PAIRS, dtype=torch.float64)
    frequencies = ROPE_THETA ** (-pairs / half)
    weights = (0.5**pairs).clamp(min=0.1)
    q, k = torch.zeros(HEAD_DIM), torch.zeros(HEAD_DIM)
    q[:_FAST_PAIRS] = (weights * frequencies.cos()).float()
    q[half : half + _FAST_PAIRS] = -(weights * frequencies.sin()).float()
    k[:_FAST_PAIRS] = 1.0
    q *= GAIN * math.sqrt(HEAD_DIM)  # the scaling of the scores undone
    _per_head(attention.q_proj.weight)[:, :, _CONSTANT] = q * norm / CONSTANT
    _per_head(attention.k_proj.weight)[:, :, _CONSTANT] = k * norm / CONSTANT


def _match_codes(
    attention: torch.nn.Module,
    norm: float,
    rotation: torch.Tensor,
    common: torch.Tensor,
    margin: float,
) -> None:
    q = rotation * norm * math.sqrt(HEAD_DIM) / margin
    k = rotation * norm * margin
    shared = rotation @ common * math.sqrt(1.0 - margin**2) * norm / CONSTANT
    for head in _per_head(attention.q_proj.weight):
        head[_SLOW, _CURRENT] = q
    for head in _per_head(attention.k_proj.weight):
        head[_SLOW, _PREVIOUS] = k
        head[_SLOW, _CONSTANT] = shared


def _per_head(weight: torch.Tensor) -> torch.Tensor:
    """A view [heads, D, hidden] of a projection's weight."""
    return weight.view(-1, HEAD_DIM, weight.shape[-1])
