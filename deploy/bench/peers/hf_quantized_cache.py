"""transformers' own quantised caches on the protocol of `ringspan bench codecs`, as a process.

Runs in an environment of its own (`codec_peers.PACKAGES`) and imports nothing of ringspan.
One line of JSON in, a `Job`; one line out for each cache, as it is done:

    {"cache": name, "seconds": ..., "bits": [after the prefill, after each block ...]}

and beside it in the folder `out`: `NAME.hidden.npy` fp32 [T, hidden], the final hidden states of
the forced tokens, and, where `keep_kv` says so, `NAME.kv.npy` fp32 [layers, 2, prefill, Hkv, D],
K and V as the cache gives them back after the prefill.

Bits are those of a 16-bit model: codes as they lie, and two bytes for each element of what the
cache keeps in the compute dtype (scales, zeros, the residual), which on a CPU is fp32.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, local_files_only=True
    ).eval()
    ids = torch.from_numpy(np.load(job["token_ids"]).astype(np.int64))[None]
    for name, options in job["caches"].items():
        began = time.perf_counter()
        bits = forced(model, ids, name, options, job)
        line = {"cache": name, "seconds": time.perf_counter() - began, "bits": bits}
        print(json.dumps(line), flush=True)


def forced(
    model: Any, ids: torch.Tensor, name: str, options: dict[str, Any], job: dict[str, Any]
) -> list[float]:
    """Prefill in one call, then the blocks; gives the bits per element after each call."""
    cache = new_cache(model.config, options)
    prefill, out = job["prefill"], Path(job["out"])
    elements = 0
    hidden, bits = [], []
    starts = [0, *range(prefill, ids.shape[1], job["block"])]
    with torch.inference_mode():
        for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            rows = model.base_model(
                ids[:, start:stop],
                past_key_values=cache,
                position_ids=torch.arange(start, stop)[None],
                use_cache=True,
            ).last_hidden_state[0]
            if start == 0:
                k = given_back(cache.layers[0])[0]
                elements = 2 * len(cache.layers) * k.shape[1] * k.shape[3]  # of a token
                if job["keep_kv"]:
                    np.save(out / f"{name}.kv.npy", all_given_back(cache))
            else:
                hidden.append(rows)
            bits.append(8.0 * held_bytes(cache) / (elements * stop))
    np.save(out / f"{name}.hidden.npy", torch.cat(hidden).numpy())
    return bits


def new_cache(config: Any, options: dict[str, Any]) -> Any:
    if not options:
        return DynamicCache(config=config)
    return QuantizedCache(config=config, **options)


def given_back(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [1, Hkv, T, D] right after the prefill, when nothing is residual."""
    if not hasattr(layer, "_quantized_keys"):
        return layer.keys, layer.values
    return layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)


def all_given_back(cache: Any) -> np.ndarray:
    kv = [torch.cat(given_back(layer)).transpose(1, 2) for layer in cache.layers]
    return torch.stack(kv).float().numpy()


def held_bytes(cache: Any) -> int:
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        found += [layer.keys, layer.values]
        collect(getattr(layer, "_quantized_keys", None), found)
        collect(getattr(layer, "_quantized_values", None), found)
    return sum(t.numel() * (2 if t.dtype in COMPUTE_DTYPES else t.element_size()) for t in found)


def collect(state: Any, found: list[torch.Tensor]) -> None:
    """Every plain tensor in a layer's quantised state: hqq keeps (codes, meta), fp8 (codes, scale),
    quanto a tensor subclass that names its inner tensors."""
    if isinstance(state, torch.Tensor):
        if hasattr(state, "__tensor_flatten__"):
            for inner in state.__tensor_flatten__()[0]:
                collect(getattr(state, inner), found)
        else:
            found.append(state)
    elif isinstance(state, dict):
        for value in state.values():
            collect(value, found)
    elif isinstance(state, (tuple, list)):
        for value in state:
            collect(value, found)


if __name__ == "__main__":
    main()
