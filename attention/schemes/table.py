"""The schemes by name: how queries meet distributed keys."""

from __future__ import annotations

from collections.abc import Callable

from ringspan.attention.layer import Layer
from ringspan.attention.schemes.all_gather import all_gather
from ringspan.attention.schemes.gather_q import gather_q
from ringspan.attention.schemes.pass_q import pass_q
from ringspan.attention.schemes.ring import ring, ring_direct
from ringspan.attention.schemes.ulysses import head_shares, ulysses, ulysses_ring
from ringspan.errors import BadInput, UnknownName
from ringspan.types import Part

Scheme = Callable[[Layer], Part]

SCHEMES: dict[str, Scheme] = {
    "ring": ring,
    "ring-direct": ring_direct,
    "all-gather": all_gather,
    "pass-q": pass_q,
    "gather-q": gather_q,
    "ulysses": ulysses,
    "ulysses-ring": ulysses_ring,
}


def scheme_named(name: str) -> Scheme:
    if name not in SCHEMES:
        raise UnknownName("scheme", name, tuple(SCHEMES))
    return SCHEMES[name]


def why_not(name: str, num_q_heads: int, num_kv_heads: int, world_size: int) -> str | None:
    """The reason why a scheme cannot serve such a model on so many ranks, or None."""
    scheme_named(name)
    if name == "ulysses" and world_size > 1:
        try:
            head_shares(num_q_heads, num_kv_heads, world_size)
        except BadInput as error:
            return str(error)
    return None
