"""What the caller of a benchmark asked for, read and checked before anything is started.

Imports torch only where a name must be looked up, so that a wrong option is told at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ringspan.cluster.messages import GangSpec
from ringspan.deploy.checks import check_backend, check_name
from ringspan.deploy.machine import gpus
from ringspan.errors import BadInput, TooLarge

if TYPE_CHECKING:
    from ringspan.deploy.bench.case import AttentionCase


def check_attention(case: AttentionCase, spec: GangSpec, counts: Sequence[int]) -> None:
    """All that can be known before any rank is started."""
    from ringspan.attention.layout import LAYOUTS
    from ringspan.deploy.checks import DEVICES, TRANSPORTS
    from ringspan.types import page_tokens_for

    check_name("layout", case.layout, tuple(LAYOUTS))
    check_name("transport", spec.transport, TRANSPORTS)
    check_name("device", spec.device, DEVICES)
    check_backend(case.backend)
    page_tokens = page_tokens_for(case.head_dim)
    if case.head_dim < 8 or case.head_dim % 8:
        raise BadInput(f"--head-dim {case.head_dim}: wanted a multiple of 8")
    check_repeats(case.repeats)
    if case.cached < 0 or case.cached % page_tokens:
        raise BadInput(
            f"--cached {case.cached}: wanted whole pages of {page_tokens} tokens; the nearest is "
            f"{max(0, round(case.cached / page_tokens)) * page_tokens}"
        )
    if case.window is not None and (case.window < 1 or not case.causal):
        raise BadInput(f"--window {case.window}: wanted at least 1 key, and not with --full")
    if case.cached and not case.causal:
        raise BadInput("--cached with --full: new tokens on a cache are causal; leave one out")
    if spec.timeout_s <= 0:
        raise BadInput(f"--timeout {spec.timeout_s:g}: wanted seconds, more than 0")
    if os.environ.get("RAY_ADDRESS"):
        return  # the gang asks that cluster what it has
    found = len(gpus()) if spec.device == "cuda" else 0
    if spec.transport in ("nccl", "copy-engine") and found < max(counts):
        raise TooLarge(
            f"--transport {spec.transport} wants a GPU for each of {max(counts)} ranks, this "
            f"machine has {found}: ask for fewer, or for loopback ranks on one device"
        )
    if spec.transport == "gloo" and spec.device == "cuda":
        raise BadInput("--transport gloo moves between CPUs: add --device cpu, or choose nccl")


def check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise BadInput(f"--repeats {repeats}: wanted at least 1 of each")


def device_for(device: str) -> str:
    """`auto` as this machine has it; a cluster's ranks see for themselves that it is so."""
    if device != "auto":
        if device == "cuda" and not gpus() and not os.environ.get("RAY_ADDRESS"):
            raise TooLarge("--device cuda: this machine shows no GPU; leave it out to use the CPU")
        return device
    return "cuda" if boards() else "cpu"


@cache
def boards() -> int:
    """GPUs that ranks could have."""
    if not os.environ.get("RAY_ADDRESS"):
        return len(gpus())
    import ray

    from ringspan.cluster.ray_cluster import connect

    with connect():
        return int(ray.cluster_resources().get("GPU", 0))


def transport_for(transport: str, device: str, ranks: int) -> str:
    """`auto`: a device of its own for every rank where there are so many, else loopback."""
    if transport != "auto":
        return transport
    if ranks == 1:
        return "loopback"
    if device == "cpu":
        return "gloo"
    return "nccl" if boards() >= ranks else "loopback"


def dtype_for(dtype: str, device: str) -> str:
    check_name("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def heads_of(heads: str) -> tuple[int, int]:
    q, _, kv = heads.partition("/")
    if not (q.isdigit() and kv.isdigit()) or not int(kv) or int(q) % int(kv) or not int(q):
        raise BadInput(f"--heads {heads!r}: wanted q/kv, q a multiple of kv, such as 32/8")
    return int(q), int(kv)


def numbers_of(option: str, text: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4], each once."""
    words = [word.strip().replace("_", "") for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise BadInput(f"{option} {text!r}: wanted at least 1 of each, such as 1,2,4")
    return sorted({int(word) for word in words})


def schemes_of(text: str) -> list[str]:
    from ringspan.attention.schemes.table import SCHEMES

    names = list(SCHEMES) if text == "all" else [word.strip() for word in text.split(",")]
    for name in names:
        check_name("scheme", name, tuple(SCHEMES))
    return list(dict.fromkeys(names))
