"""The unmodified transformers model as a process: one line of JSON in, one line out.

Started by `bench prefill`. The first line is a `BaselineSpec`; each line after it runs again.
"""

from __future__ import annotations

import sys
import time

import msgspec

from ringspan.cluster.messages import ModelSpec

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}
"""Of the largest |logit|: a candidate so near to the best is the same answer."""


class BaselineSpec(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSpec
    device: str
    threads: int
    token_ids: tuple[int, ...]


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    elapsed_s: float
    """Of the prefill with a KV cache, all tokens but the last."""
    logits: tuple[int, ...]
    """The candidates for the token behind the last one, equal within float error."""


def main() -> None:
    import torch

    from ringspan.attention.models.load import load_model

    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=BaselineSpec)
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    model = load_model(spec.model, device).model
    ids = torch.tensor([spec.token_ids], device=device)
    tolerance = TOLERANCE[str(model.dtype).removeprefix("torch.")]
    first = True
    while first or sys.stdin.buffer.readline():
        with torch.inference_mode():
            began = time.perf_counter()
            out = model.base_model(ids[:, :-1], use_cache=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            elapsed_s = time.perf_counter() - began
            candidates: tuple[int, ...] = ()
            if first:
                last = model(ids[:, -1:], past_key_values=out.past_key_values).logits[0, -1].float()
                near = last >= last.max() - 2 * tolerance * last.abs().max()
                candidates = tuple(near.nonzero()[:, 0].tolist())
            del out
        answer = Baseline(elapsed_s=elapsed_s, logits=candidates)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
        first = False


if __name__ == "__main__":
    main()
