"""The planner's word on a case, to stand beside the measured time."""

from __future__ import annotations

import msgspec

from ringspan.attention.cost import Link, Speeds
from ringspan.deploy.bench.case import TORCH_SCHEMES, AttentionCase


def predict(
    case: AttentionCase, speeds: Speeds | None, link: Link | None, captured: bool = False
) -> float | None:
    """Seconds of one run among many on the slowest rank, of all loopback ranks together; None where
    the ranks have not measured their speeds, or the scheme is not ours. `captured`: the runs are
    replays of a CUDA graph."""
    if speeds is None or link is None or case.scheme in TORCH_SCHEMES:
        return None
    import torch

    from ringspan.attention.simulate import simulate

    if captured:  # replayed without the host
        speeds = msgspec.structs.replace(speeds, attend_call_s=0.0, call_s=0.0)
        link = msgspec.structs.replace(link, call_s=0.0)
    played = simulate(
        case.scheme,
        case.problem(),
        speeds,
        link,
        heads=(case.num_q_heads, case.num_kv_heads),
        head_dim=case.head_dim,
        dtype=getattr(torch, case.dtype),
        window=case.window,
    )
    # Run after run, devices and hosts both have to get through it.
    hosts_s = sum(played.host_s) if link.shared_device else max(played.host_s)
    return max(played.seconds, hosts_s)
