"""What a rank says of a prefill that begins: what it begins on, what its KV is computed with."""

from __future__ import annotations

from ringspan.attention.layout import Deal
from ringspan.cluster.messages import ModelFacts, ModelSpec, PrefillBegun, PrefillPlan
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.keys import namespace_digest
from ringspan.kvstore.page import EXACT, Origin
from ringspan.types import Span, coalesce


def begun(plan: PrefillPlan, prefix: Deal, provenance: tuple[str, ...]) -> PrefillBegun:
    return PrefillBegun(context_id=plan.context_id, prefix=prefix, provenance=provenance)


def spans_before(spans: tuple[Span, ...], stop: int) -> tuple[Span, ...]:
    """What of `spans` lies before position `stop`."""
    return coalesce(Span(span.start, min(span.stop, stop)) for span in spans if span.start < stop)


def origin_of(
    plan: PrefillPlan,
    namespace: bytes,
    prefix: tuple[str, ...],
    facts: ModelFacts,
    model: ModelSpec,
) -> Origin:
    """Of pages of the prefill, in this namespace. With a lossy codec every chunk but the first was
    computed over decoded pages; what the prefix's KV was computed with, the rest was too."""
    approximations = [name for name in prefix if name not in EXACT]
    if not codec(plan.codec).exact and (plan.reused_tokens or len(plan.chunks) > 1):
        approximations.append(f"attended over {plan.codec} pages")
    return Origin(
        fingerprint=facts.fingerprint,
        namespace=namespace_digest(namespace),
        rope=f"applied, scaling {model.rope_scaling or 'none'}",
        provenance=tuple(dict.fromkeys(approximations)) or EXACT,
    )
