"""Policies to compare: rules for the one placement function, so only what they may do differs.

`planner`   everything: any size, prefix where it lies or moved or computed again, preemption
`fixed:4`   the cluster cut into gangs of 4; the gang that answers soonest, its prefixes counted;
            decode where the prefill was. As engines with a fixed context-parallel degree behind a
            prefix-aware router
`remote:4`  prefill in one pool, decode in the other, gangs of 4 in both; every prompt is handed
            over. As prefill-decode disaggregation without a local-or-remote decision (Ray Serve LLM
            2.60)
"""

from __future__ import annotations

from typing import NamedTuple

from ringspan.cluster.placing_types import Rules
from ringspan.errors import BadInput, UnknownName

PREFILL, DECODE = "prefill", "decode"
KNOWN = ("planner", "fixed:N", "remote:N")


class Policy(NamedTuple):
    name: str
    rules: Rules
    split: bool
    """Nodes are of two pools."""


def policy(name: str) -> Policy:
    """UnknownName for others than `KNOWN`, BadInput for a size that is no power of two."""
    kind, _, count = name.partition(":")
    if name == "planner":
        return Policy(name, Rules(), False)
    if kind not in ("fixed", "remote") or not count.isdigit():
        raise UnknownName("policy", name, KNOWN)
    size = int(count)
    if size < 1 or size & (size - 1):
        raise BadInput(f"policy {name}: wanted a power of two of ranks in a gang")
    common = Rules(sizes=(size,), spares=False, preempts=False, soonest=True)
    if kind == "fixed":
        return Policy(name, common._replace(decode="in place"), False)
    rules = common._replace(prefill_pool=PREFILL, decode_pool=DECODE, decode="remote")
    return Policy(name, rules, True)
