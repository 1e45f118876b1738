"""FlashAttention 4 (package flash-attn-4): the fastest dense attention on Hopper and Blackwell.

Its masks are aligned bottom-right: in row i, key j is seen iff
    i + (S - T) - left <= j <= i + (S - T) + right
which holds any of our masks as long as left and right are not negative (two negative ones mean no
window at all there). lse comes as [1, Hq, T], natural log. On Hopper it does not split keys, so one
row over a million keys keeps most of the GPU idle: see `local._order`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ringspan.attention.backends.case import Backend, Case
from ringspan.attention.models.cache import cache_folder
from ringspan.types import Part

MANY_ROWS = 1024
"""From so many rows on, tiles of one q head are full."""


def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> Part:
    """q [T, Hq, D], k, v [S, Hkv, D] bf16 or fp16 -> out in q.dtype, lse [T, Hq] a strided view."""
    left, right = _window(case)
    causal = right == 0
    rows, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((1, heads, rows), dtype=torch.float32, device=q.device)
    _flash_attn_fwd()(
        q[None],
        k[None],
        v[None],
        softmax_scale=case.scale,
        causal=causal,
        window_size_left=left,
        window_size_right=None if causal else right,
        softcap=case.softcap,
        pack_gqa=_pack_gqa(case),
        out=out[None],
        lse=lse,
    )
    return Part(out, lse[0].transpose(0, 1))


def _pack_gqa(case: Case) -> bool | None:
    """Whether the q heads of a kv head share a tile; None leaves it to the package.

    Packing fills tiles where rows are few. With many, an H200 at its power limit does 671 TFLOP/s
    without and 635 with it over a full mask (65,536 rows, 262,144 keys); with a causal mask the
    package's own choice, packed, is the faster: 658 against 632.
    """
    if case.mask.causal or case.mask.window is not None or case.rows < MANY_ROWS:
        return None
    return False


def _window(case: Case) -> tuple[int | None, int | None]:
    """(left, right) for the case's mask."""
    ahead = case.keys - case.rows
    causal, offset, window = case.mask
    left = None if window is None else window - 1 - offset + ahead
    return left, offset - ahead if causal else None


def _why_not(case: Case) -> str | None:
    if case.capability is None or case.capability[0] not in (9, 10, 11):
        return f"it wants Hopper or Blackwell (compute capability 9 to 11), not {case.capability}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {case.dtype}"
    largest = 256 if case.capability[0] == 9 else 128
    if case.head_dim % 8 or not 8 <= case.head_dim <= largest:
        return f"it takes head_dim 8 to {largest} in steps of 8, not {case.head_dim}"
    if any(side is not None and side < 0 for side in _window(case)):
        return f"it cannot place the mask {case.mask} on {case.rows} rows and {case.keys} keys"
    return None


@lru_cache(maxsize=1)
def _available(device_type: str) -> str | None:
    if device_type != "cuda":
        return "it runs on CUDA devices only"
    try:
        _flash_attn_fwd()
    except Exception as error:  # the package's own imports fail in many ways beside ImportError
        return f"flash_attn.cute cannot be imported ({error}); pip install flash-attn-4"
    return None


@lru_cache(maxsize=1)
def _flash_attn_fwd() -> Callable[..., Any]:
    """The heavy import, once, when first wanted.

    The forward alone: the public function wraps it for autograd, which costs the host as much again
    as the launch, and a ring of eight at 32,768 tokens has a launch every 0.2 ms.
    """
    _keep_compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between the package and its own compiler
        from flash_attn.cute.interface import _flash_attn_fwd

    # Said once for each kernel that is compiled, of an argument that we leave out.
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted")
    return _flash_attn_fwd


def _keep_compiled() -> None:
    """Let the package keep what it compiles: the first causal and full call took 5.3 s on an H200
    host, and 6 ms in the next process. It names its entries by its own sources and versions."""
    folder = cache_folder() / "fa4"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # compiled again in every process
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))


FA4 = Backend(name="fa4", available=_available, why_not=_why_not, run=fa4)
