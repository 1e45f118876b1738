"""Pages from one codec to another: decoded, encoded again, sealed anew under the same keys.

A key names tokens, not bytes, so what comes out is a second form of the same pages. It never claims
more than it has: a codec of higher fidelity than the stored one is refused, and where the stored
one was lossy the provenance says what was decoded. Only pages that were verified are decoded.

Recoding works on whole pages, several layers at a time. The bytes that come out are those that the
codec gives for the decoded values on the device at hand; from `raw`, those that a prefill in the
new codec would have written for the same keys and values.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch

from ringspan.attention.kv import cut_units, unit_tokens
from ringspan.errors import BadInput
from ringspan.kvstore.codecs.registry import codec
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.fidelity import codec_fidelity, decoded_from
from ringspan.kvstore.frame import aligned
from ringspan.kvstore.page import Page, page_form, payload_digest, verify_sums
from ringspan.kvstore.planes import bytes_tensor, payload_sums
from ringspan.kvstore.shard import ContextShard
from ringspan.kvstore.tiers.counters import COUNTERS, StoreCounters
from ringspan.kvstore.tiers.placement import context_supply
from ringspan.kvstore.transfer import load_shard, reserved_layers
from ringspan.types import coalesce

if TYPE_CHECKING:
    from ringspan.attention.kv import TensorSpec
    from ringspan.cluster.messages import PageRecord
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.page import Origin, PageForm, PageHeader

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that read, verify and recode whole pages."""
SCRATCH_BYTES = 512 << 20
"""Of stored pages that lie on the device at a time while they are recoded there."""

Progress = Callable[[int, int], None]
"""(pages done, pages in all)."""

_T = TypeVar("_T")
_R = TypeVar("_R")


def recoded_form(form: PageForm, codec_name: str, what: str = "the context") -> PageForm:
    """The form of pages in another codec.

    Raises `UnknownName`; BadInput for a codec that keeps more than the stored one did, for the one
    they are in already, and where the new codec's pages are of another length.
    """
    new, dtype = codec(codec_name), dtype_of(form.dtype)
    shape = (form.num_kv_heads, form.head_dim, dtype)
    kept, asked = codec_fidelity(form.codec, *shape), codec_fidelity(codec_name, *shape)
    if codec_name == form.codec:
        raise BadInput(f"{what} is in codec {codec_name} already: leave --codec out")
    if asked > kept:
        raise BadInput(
            f"{what} is in codec {form.codec} ({kept.text}); as {codec_name} it would claim to be "
            f"{asked.text}, which it is not: choose a codec of {kept.text} or less, or prefill it "
            f"again with --codec {codec_name}"
        )
    unit = unit_tokens(new.specs(*shape))
    if unit not in (1, form.page_tokens):
        raise BadInput(
            f"{what} has pages of {form.page_tokens} tokens, codec {codec_name} makes pages of "
            f"{unit}: prefill it again with --codec {codec_name}"
        )
    return page_form(
        new, form.num_layers, form.num_kv_heads, form.head_dim, dtype, form.page_tokens
    )


def recoded_origin(origin: Origin, form: PageForm) -> Origin:
    """The origin of pages made from pages of `form`."""
    return origin if codec(form.codec).exact else _passed(origin, form.codec)


def _passed(origin: Origin, codec_name: str) -> Origin:
    """The KV went through this lossy codec."""
    known = tuple(entry for entry in origin.provenance if entry != "exact")
    return msgspec.structs.replace(origin, provenance=(*known, decoded_from(codec_name)))


def _raw_form(form: PageForm) -> PageForm:
    sizes = (form.num_layers, form.num_kv_heads, form.head_dim)
    return page_form(codec("raw"), *sizes, dtype_of(form.dtype), form.page_tokens)


class Recoder:
    """Pages of one context to another codec. Any number of threads may call it."""

    def __init__(
        self,
        manifest: Manifest,
        codec_name: str,
        device: torch.device | str = "cpu",
        *,
        through: str = "",
    ) -> None:
        """Raises as `recoded_form` does.

        through: a lossy archive codec that the pages go through next. That takes them in codec raw
        whatever they are stored in, since their provenance names it.
        """
        self.origin = recoded_origin(manifest.origin, manifest.form)
        self._device = torch.device(device)
        if through:
            self.form = _raw_form(manifest.form)
            self.origin = _passed(self.origin, through)
        else:
            self.form = recoded_form(manifest.form, codec_name, f"context {manifest.context_id}")

    def __call__(self, page: Page) -> Page:
        """A verified page of the context -> the same page in the new form, sealed."""
        header, form = page.header, self.form
        new = msgspec.structs.replace(header, form=form, origin=self.origin)
        if form == header.form:
            return Page(new, page.payload)
        k, v = decoded(page, self._device)
        payload = encoded(form, k, v, header.span.tokens)
        return resealed(new, memoryview(payload.cpu().numpy()))


def resealed(header: PageHeader, payload: memoryview) -> Page:
    """A page of other bytes: the header with the sums of these."""
    form = header.form
    sums = payload_sums(payload, form.specs, form.num_layers, header.span.tokens)
    return Page(
        msgspec.structs.replace(
            header,
            plane_sums=tuple(sums),
            payload_bytes=payload.nbytes,
            xxh3=payload_digest(payload),
        ),
        payload,
    )


def decoded(page: Page, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all layers [L * tokens, Hkv, D] in the compute dtype."""
    form, tokens = page.header.form, page.header.span.tokens
    specs, layers = form.specs, form.num_layers
    planes = bytes_tensor(page.payload).to(device).view(layers, -1)
    tensors, at = [], 0
    for spec in specs:
        width = spec.bytes_of(tokens)
        part = planes[:, at : at + width].reshape(-1).clone().view(spec.dtype)
        tensors.append(part.view(layers * spec.units(tokens), *spec.shape))
        at += width
    shape = (layers * tokens, form.num_kv_heads, form.head_dim)
    k, v = torch.empty((2, *shape), dtype=dtype_of(form.dtype), device=device)
    decode = codec(form.codec).decode
    for rows, units in _at_once(specs, layers, tokens):
        decode(
            tuple(tensor[cut] for tensor, cut in zip(tensors, units, strict=True)), k[rows], v[rows]
        )
    return k, v


def encoded(form: PageForm, k: torch.Tensor, v: torch.Tensor, tokens: int) -> torch.Tensor:
    """K and V of all layers of a page -> its payload, uint8 [bytes]."""
    specs, layers = form.specs, form.num_layers
    tensors = [
        torch.empty((layers * spec.units(tokens), *spec.shape), dtype=spec.dtype, device=k.device)
        for spec in specs
    ]
    encode = codec(form.codec).encode
    for rows, units in _at_once(specs, layers, tokens):
        encode(k[rows], v[rows], tuple(t[cut] for t, cut in zip(tensors, units, strict=True)))
    planes = [tensor.reshape(-1).view(torch.uint8).view(layers, -1) for tensor in tensors]
    return torch.cat(planes, dim=1).reshape(-1)


def _at_once(
    specs: Sequence[TensorSpec], layers: int, tokens: int
) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of K and V, and units of each tensor, that one call of the codec takes: all layers, as
    if they were pages that follow each other; where a page is short, which only a last one may be,
    one layer after the other."""
    whole = all(tokens % spec.tokens == 0 for spec in specs)
    for layer in range(1 if whole else layers):
        first, stop = (0, layers) if whole else (layer, layer + 1)
        yield (
            slice(first * tokens, stop * tokens),
            [slice(first * spec.units(tokens), stop * spec.units(tokens)) for spec in specs],
        )


def as_is(page: Page) -> Page:
    return page


def stored_pages(
    root: Path,
    manifest: Manifest,
    change: Callable[[Page], _R],
    progress: Progress | None = None,
) -> Iterator[_R]:
    """Every page of a stored context in position order, verified in full, then changed (`as_is`:
    not).

    root: of the store. Raises `CorruptPage`, `StoreError`, and what `change` raises.
    """
    form = manifest.form
    with context_supply(root, manifest, manifest.pages) as supply:

        def read(record: PageRecord) -> _R:
            room = memoryview(bytearray(aligned(record.payload_bytes)))
            header = supply.page(record, room).header
            payload = room[: record.payload_bytes]
            sums = payload_sums(payload, form.specs, form.num_layers, record.span.tokens)
            verify_sums(header, sums)
            return change(Page(header, payload))

        for done, changed in enumerate(in_order(read, manifest.pages), 1):
            yield changed
            if progress is not None:
                progress(done, len(manifest.pages))


def in_order(work: Callable[[_T], _R], items: Iterable[_T], workers: int = WORKERS) -> Iterator[_R]:
    """`work` of each item on threads, a few items ahead, results in the order of the items."""
    pool = ThreadPoolExecutor(workers, "pages")
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            if len(pending) > workers:
                yield pending.popleft().result()
            pending.append(pool.submit(work, item))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load_recoded(
    root: Path | str,
    manifest: Manifest,
    records: Sequence[PageRecord],
    shard: ContextShard,
    counters: StoreCounters = COUNTERS,
) -> None:
    """Pages of a stored context behind what the shard holds, in the shard's codec.

    They come to the shard's device as they are stored and are verified there (`load_shard`), then
    decoded and encoded into place. root: of the store. records: of the manifest, in position order.
    Raises as `load_shard` and `recoded_form` do; the shard is then as before.
    """
    name = f"context {manifest.context_id}"
    if recoded_form(manifest.form, shard.codec.name, name) != shard.form:
        raise BadInput(f"{name} in codec {shard.codec.name} does not fit {shard!r}")
    before = shard.num_tokens
    shard.reserve(coalesce(record.span for record in records))
    try:
        row = before
        for group in _groups(records, manifest.form):
            source = _loaded(root, manifest, group, shard, counters)
            _recode_into(shard, row, source)
            row += source.num_tokens
    except BaseException:
        shard.cancel()
        raise
    shard.mark_filled()


def _loaded(
    root: Path | str,
    manifest: Manifest,
    records: Sequence[PageRecord],
    beside: ContextShard,
    counters: StoreCounters,
) -> ContextShard:
    """These pages as they are stored, verified, on the device of the shard they are meant for."""
    form = manifest.form
    source = ContextShard(
        codec(form.codec),
        form.num_layers,
        form.num_kv_heads,
        form.head_dim,
        beside.dtype,
        beside.device,
        sum(record.span.tokens for record in records),
        form.page_tokens,
    )
    supply = context_supply(Path(root).expanduser().absolute(), manifest, records, counters)
    load_shard(root, manifest, records, source, supply=supply)
    return source


def _recode_into(shard: ContextShard, row: int, source: ContextShard) -> None:
    """All that `source` holds to the shard's reserved rows from `row` on, layer by layer."""
    tokens = source.num_tokens
    shape = (2, tokens, shard.num_kv_heads, shard.head_dim)
    k, v = torch.empty(shape, dtype=shard.dtype, device=shard.device)
    for layer, held in enumerate(reserved_layers(shard)):
        source.codec.decode(source.tensors(layer), k, v)
        shard.codec.encode(k, v, cut_units(held, shard.specs, row, row + tokens))


def _groups(records: Sequence[PageRecord], form: PageForm) -> Iterator[Sequence[PageRecord]]:
    """Pages that lie on the device at a time: all but the context's last are equally long."""
    step = max(1, SCRATCH_BYTES // form.bytes_of(form.page_tokens))
    for first in range(0, len(records), step):
        yield records[first : first + step]
