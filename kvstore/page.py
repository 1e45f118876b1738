"""A sealed page: what it is (header), its bytes (payload), and whether they belong together.

A header says everything a reader must know to use or refuse the payload, without any index.
`PageForm` is what equals for all pages that fit one shard, `Origin` what equals for all pages of
one context.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from ringspan.attention.kv import TensorSpec, specs_bytes, unit_tokens
from ringspan.errors import CorruptPage, UnknownName
from ringspan.kvstore.codecs.registry import PageCodec, codec
from ringspan.kvstore.dtypes import dtype_name, dtype_of
from ringspan.kvstore.keys import ROOT_KEY
from ringspan.kvstore.planes import payload_sums
from ringspan.kvstore.sealing import Sealed, sealing_fault
from ringspan.types import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

FORMAT = 2
"""Version of header and payload; a reader refuses any other. 2: tensors count in units."""

EXACT = ("exact",)
"""Provenance of KV computed without any approximation."""

RECOMPUTED = "recomputed after loss"
"""Beside a page's provenance: the context's other pages were sealed before, and this one was
computed again from its tokens over those that were left, equal up to the arithmetic's rounding."""


class TensorForm(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of a plane; `TensorSpec` in words that can be stored."""

    name: str
    shape: tuple[int, ...]
    """Of one unit."""
    dtype: str
    tokens: int = 1
    """Of one unit: 1, or the page's."""


class PageForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a page's bytes are laid out: equal for all pages that fit one shard."""

    page_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """The compute dtype that K and V had before the codec."""
    codec: str
    codec_params: str
    tensors: tuple[TensorForm, ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t.name, t.shape, dtype_of(t.dtype), t.tokens) for t in self.tensors)

    def bytes_of(self, tokens: int) -> int:
        """Encoded bytes of a page that holds `tokens` tokens, all layers."""
        return self.num_layers * specs_bytes(self.specs, tokens)


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What KV was computed from and how: equal for all pages of one context."""

    fingerprint: str
    """Of the model, hex."""
    namespace: str
    """`keys.namespace_digest` of the namespace, hex."""
    rope: str
    """State of the positions in K, e.g. `applied theta=500000 scaling=yarn:4`."""
    provenance: tuple[str, ...] = EXACT
    """`("exact",)`, or the name of each approximation that the KV was computed with."""


def recomputed(origin: Origin) -> Origin:
    """Of a page of a context of this origin that was lost and computed again."""
    return msgspec.structs.replace(origin, provenance=(*as_sealed(origin).provenance, RECOMPUTED))


def as_sealed(origin: Origin) -> Origin:
    """Of the context that a page of this origin belongs to."""
    kept = tuple(entry for entry in origin.provenance if entry != RECOMPUTED)
    return msgspec.structs.replace(origin, provenance=kept)


class PageHeader(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What stands before a payload on every road."""

    format: int
    key: str
    """Hex of the chained BLAKE3 key, see `keys.page_keys`."""
    parent_key: str
    span: Span
    origin: Origin
    form: PageForm
    plane_sums: tuple[int, ...]
    """One unsigned 64-bit sum per layer, see `kvstore.planes`."""
    payload_bytes: int
    xxh3: str
    """Hex xxh3-128 of the payload."""
    sealed: Sealed | None = None
    """Of an encrypted page, whose payload is ciphertext, as are the bytes of all sums above."""


class Page(NamedTuple):
    """A header and the payload it describes: planes in layer order, host memory."""

    header: PageHeader
    payload: memoryview


def page_form(
    codec: PageCodec,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_tokens: int,
) -> PageForm:
    """The form of pages of a shard with these properties."""
    specs = codec.specs(num_kv_heads, head_dim, dtype)
    return PageForm(
        page_tokens=page_tokens,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype_name(dtype),
        codec=codec.name,
        codec_params=codec.params(head_dim),
        tensors=tuple(
            TensorForm(s.name, tuple(s.shape), dtype_name(s.dtype), s.tokens) for s in specs
        ),
    )


def seal(
    form: PageForm,
    origin: Origin,
    span: Span,
    keys: Sequence[str],
    plane_sums: Sequence[int],
    payload: memoryview,
) -> Page:
    """The page of `span`. keys: of all pages of the context, in position order."""
    index = span.start // form.page_tokens
    header = PageHeader(
        format=FORMAT,
        key=keys[index],
        parent_key=keys[index - 1] if index else ROOT_KEY,
        span=span,
        origin=origin,
        form=form,
        plane_sums=tuple(plane_sums),
        payload_bytes=payload.nbytes,
        xxh3=payload_digest(payload),
    )
    return Page(header, payload)


def payload_digest(payload: memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(payload)


def page_name(header: PageHeader) -> str:
    """How messages name a page."""
    return f"page {header.key[:16]} [{header.span.start}, {header.span.stop})"


def differences(wanted: msgspec.Struct, found: msgspec.Struct) -> str:
    """`field found, wanted wanted; ...` of two structs of one type; empty when equal."""
    return "; ".join(
        f"{name} {getattr(found, name)!r}, wanted {getattr(wanted, name)!r}"
        for name in wanted.__struct_fields__
        if getattr(found, name) != getattr(wanted, name)
    )


def verify_header(header: PageHeader) -> None:
    """The header's own arithmetic: form, span, sizes. Raises `CorruptPage` naming what differs."""
    form, span, name = header.form, header.span, page_name(header)
    if header.format != FORMAT:
        raise CorruptPage(f"{name}: format {header.format}, this version reads {FORMAT}")
    if not (_is_key(header.key) and _is_key(header.parent_key)):
        raise CorruptPage(f"{name}: key {header.key!r} or its parent is no BLAKE3 key in hex")
    fault = _form_fault(form)
    if fault:
        raise CorruptPage(f"{name}: {fault}")
    if span.start % form.page_tokens or not 0 < span.tokens <= form.page_tokens:
        raise CorruptPage(f"{name}: the span is not a page of {form.page_tokens} tokens")
    if len(header.plane_sums) != form.num_layers:
        raise CorruptPage(
            f"{name}: {len(header.plane_sums)} plane sums for {form.num_layers} layers"
        )
    payload_bytes = _payload_bytes(form, span.tokens)
    if header.payload_bytes != payload_bytes:
        raise CorruptPage(
            f"{name}: payload of {header.payload_bytes} bytes, its form makes {payload_bytes}"
        )
    if header.sealed is not None:
        fault = sealing_fault(header.sealed, header.payload_bytes, form.num_layers)
        if fault:
            raise CorruptPage(f"{name}: {fault}")


@lru_cache(maxsize=64)
def _form_fault(form: PageForm) -> str:
    """What is wrong with a form, as text; empty: nothing. The pages of a context share one."""
    sizes = (form.page_tokens, form.num_layers, form.num_kv_heads, form.head_dim)
    if min(sizes) < 1 or max(sizes) > 1 << 24:
        return f"sizes {sizes} make no sense"
    try:
        made = codec(form.codec)
        dtype = dtype_of(form.dtype)
        wanted = page_form(
            made, form.num_layers, form.num_kv_heads, form.head_dim, dtype, form.page_tokens
        )
    except UnknownName as error:
        return str(error)
    if form != wanted:
        return f"form differs: {differences(wanted, form)}"
    if unit_tokens(wanted.specs) not in (1, form.page_tokens):
        return (
            f"pages of {form.page_tokens} tokens, codec {form.codec} makes pages of "
            f"{unit_tokens(wanted.specs)}"
        )
    return ""


@lru_cache(maxsize=64)
def _payload_bytes(form: PageForm, tokens: int) -> int:
    return form.bytes_of(tokens)


def verify_payload(header: PageHeader, payload: memoryview) -> None:
    """Length and xxh3-128 of the payload. Raises `CorruptPage`."""
    if payload.nbytes != header.payload_bytes:
        raise CorruptPage(
            f"{page_name(header)}: {payload.nbytes} bytes of payload, the header says "
            f"{header.payload_bytes}"
        )
    if payload_digest(payload) != header.xxh3:
        raise CorruptPage(f"{page_name(header)}: the payload's xxh3-128 differs from the header's")


def verify_sums(header: PageHeader, sums: Sequence[int]) -> None:
    """Plane sums as computed against the header's. Raises `CorruptPage` naming the layers."""
    if tuple(sums) == header.plane_sums:
        return
    bad = [
        layer
        for layer, (wanted, found) in enumerate(zip(header.plane_sums, sums, strict=True))
        if wanted != found
    ]
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise CorruptPage(f"{page_name(header)}: plane sum differs in layer {shown}")


def verify_page(page: Page) -> None:
    """Everything that a page alone can be checked for. Raises `CorruptPage`."""
    header = page.header
    verify_header(header)
    verify_payload(header, page.payload)
    sums = payload_sums(page.payload, header.form.specs, header.form.num_layers, header.span.tokens)
    verify_sums(header, sums)


def _is_key(text: str) -> bool:
    return len(text) == 64 and not text.strip("0123456789abcdef")
