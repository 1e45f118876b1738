"""What the planner must know to foretell a case: the same measurements as a gang makes at its
start, with the heads of the case and without a model."""

from __future__ import annotations

import msgspec

from ringspan.attention.cost import Link, Speeds
from ringspan.attention.transport import Transport
from ringspan.cluster.messages import GangSpec, ModelFacts
from ringspan.cluster.runtime import Runtime
from ringspan.deploy.bench.case import AttentionCase


class LayerRuntime(Runtime):
    """A rank's runtime with a transport, but no model to load."""

    def __init__(self, rank: int, spec: GangSpec, transport: Transport, facts: ModelFacts) -> None:
        super().__init__(rank, spec)
        self.transport, self.facts = transport, facts

    def _without_attention(self, rows: int) -> None:
        """There is nothing beside attention."""


def measured_speeds(
    case: AttentionCase, rank: int, spec: GangSpec, transport: Transport
) -> tuple[Speeds | None, Link | None]:
    """Every rank calls it. Speeds are kept in the user's cache folder; None on a CPU, unless
    `spec.measure` asks for them. A single rank has no link: one that is never used."""
    whole = msgspec.structs.replace(spec, world_size=case.ranks, backend=case.backend)
    speeds, link = LayerRuntime(rank, whole, transport, facts_of(case)).measure_speeds()
    if speeds is not None and link is None:
        link = Link(latency_s=0.0, bytes_per_s=speeds.copy_bytes_per_s)
    return speeds, link


def facts_of(case: AttentionCase) -> ModelFacts:
    """A model of one layer that has the case's heads and no parameters."""
    return ModelFacts(
        name="attention of one layer",
        family="none",
        num_layers=1,
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        hidden_size=case.num_q_heads * case.head_dim,
        num_params=0,
        flops_per_token=0.0,
        max_positions=case.keys,
        dtype=case.dtype,
        fingerprint="",
        windows=(case.window,),
    )
