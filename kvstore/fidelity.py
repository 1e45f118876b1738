"""How near a page's K and V are to what the model computes: an order that a request can ask by.

    exact > 16-bit > 8-bit > 4-bit > 2-bit

A page states it by its form and origin: the codec says how many bits an element kept, the
provenance what the KV was computed over. Both count, the lower one stands: exact pages of a context
whose chunks attended over int8 pages are of 8 bits.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING

from ringspan.errors import BadInput, UnknownName
from ringspan.kvstore.codecs.registry import CODECS, bits_per_element, codec
from ringspan.kvstore.dtypes import dtype_of

if TYPE_CHECKING:
    import torch

    from ringspan.kvstore.page import Origin, PageForm


class Fidelity(IntEnum):
    """More is nearer. The numbers stand in records: they stay as they are."""

    TWO_BIT = 2
    FOUR_BIT = 4
    EIGHT_BIT = 8
    SIXTEEN_BIT = 16
    EXACT = 64
    """Bit for bit what the model computed, over nothing but such."""

    @property
    def text(self) -> str:
        return "exact" if self is Fidelity.EXACT else f"{int(self)}-bit"


ANY = Fidelity.TWO_BIT
"""What every page has."""

_ATTENDED = re.compile(r"(?:attended over|decoded from) (\S+) pages")


def fidelity_named(name: str) -> Fidelity:
    """`exact`, `16-bit`, ...; `UnknownName` lists them."""
    for level in Fidelity:
        if level.text == name:
            return level
    raise UnknownName("fidelity", name, tuple(level.text for level in reversed(Fidelity)))


def attended_over(codec_name: str) -> str:
    """The provenance of KV computed over this codec's decoded pages."""
    return f"attended over {codec_name} pages"


def decoded_from(codec_name: str) -> str:
    """The provenance of KV that was decoded from this lossy codec's pages and encoded again."""
    return f"decoded from {codec_name} pages"


def codec_fidelity(
    codec_name: str, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Fidelity:
    """Of what a codec keeps: as many bits as its codes have, side data left out of account."""
    chosen = codec(codec_name)
    if chosen.exact:
        return Fidelity.EXACT
    bits = bits_per_element(chosen, num_kv_heads, head_dim, dtype)
    below = [level for level in Fidelity if level is not Fidelity.EXACT and level <= bits]
    return max(below, default=ANY)


def fidelity_of(form: PageForm, origin: Origin) -> Fidelity:
    """Of pages of this form and origin. An approximation that this version does not know counts as
    the lowest."""
    shape = (form.num_kv_heads, form.head_dim, dtype_of(form.dtype))
    found = [codec_fidelity(form.codec, *shape)]
    for approximation in origin.provenance:
        if approximation == "exact":
            continue
        match = _ATTENDED.fullmatch(approximation)
        known = match is not None and match[1] in CODECS
        found.append(codec_fidelity(match[1], *shape) if match and known else ANY)
    return min(found)


def check_fidelity(what: str, form: PageForm, origin: Origin, lowest: str) -> None:
    """BadInput where `what` (a context, in words) is below the lowest fidelity asked for; an empty
    `lowest` asks for nothing."""
    if not lowest:
        return
    wanted, found = fidelity_named(lowest), fidelity_of(form, origin)
    if found < wanted:
        because = "" if origin.provenance == ("exact",) else f", {', '.join(origin.provenance)}"
        raise BadInput(
            f"{what} is {found.text} (codec {form.codec}{because}), asked for is {wanted.text} or "
            f"better: prefill it again with --codec {_enough(wanted, form)}, or ask for less"
        )


def check_codec(
    codec_name: str, num_kv_heads: int, head_dim: int, dtype: torch.dtype, lowest: str
) -> None:
    """BadInput where what a codec keeps is below the lowest fidelity asked for (empty: nothing is),
    UnknownName for a codec that there is not."""
    found = codec_fidelity(codec_name, num_kv_heads, head_dim, dtype)
    wanted = fidelity_named(lowest) if lowest else ANY
    if found < wanted:
        raise BadInput(
            f"--codec {codec_name} keeps {found.text}, asked for is {wanted.text} or better: "
            "choose a codec that keeps it; raw keeps all"
        )


def _enough(wanted: Fidelity, form: PageForm) -> str:
    """The codec of fewest bits that keeps it."""
    dtype = dtype_of(form.dtype)
    shape = (form.num_kv_heads, form.head_dim, dtype)
    names = [name for name in CODECS if codec_fidelity(name, *shape) >= wanted]
    return min(names, key=lambda name: bits_per_element(codec(name), *shape))
