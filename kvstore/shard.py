"""One rank's KV of one context: for each layer the codec's tensors, allocated once, units first.

Rows are appended: `reserve` takes the next rows for all layers, `write` fills them layer by
layer. Rows that a layer has not written yet cannot be read from it. The shard's pages are its
rows cut every `page_tokens`: page i begins at row i * page_tokens, since all pages but the
context's last are full. A codec whose units are pages encodes whole pages: there every reservation
begins with a page, and only its last page may be short.

    tensors(layer)[t]   [units, *spec_t.shape]      t: the codec's tensors, K's first
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ringspan.attention.kv import cut_units, specs_bytes, unit_tokens
from ringspan.errors import BadInput, CorruptPage, TooLarge
from ringspan.kvstore import planes
from ringspan.kvstore.codecs.registry import or_smaller
from ringspan.kvstore.dtypes import dtype_name
from ringspan.kvstore.page import Origin, Page, differences, page_form, page_name, seal, verify_page
from ringspan.types import Span, coalesce, total_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringspan.attention.kv import TensorSpec
    from ringspan.kvstore.codecs.registry import PageCodec

GIB = 1 << 30


class ContextShard:
    """The `KVShard` that holds contexts and tails; see the module for how rows lie.

    Raises `TooLarge` when the device has no room for it. Not safe for threads that write.
    """

    def __init__(
        self,
        codec: PageCodec,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity_tokens: int,
        page_tokens: int,
    ) -> None:
        if page_tokens < 1 or capacity_tokens < 0 or num_layers < 1:
            raise ValueError(
                f"a shard of {num_layers} layers, {capacity_tokens} tokens in pages of "
                f"{page_tokens} makes no sense"
            )
        self.codec = codec
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self.capacity_tokens = capacity_tokens
        self.page_tokens = page_tokens
        self.specs: tuple[TensorSpec, ...] = codec.specs(num_kv_heads, head_dim, dtype)
        self.unit_tokens = unit_tokens(self.specs)
        if self.unit_tokens not in (1, page_tokens):
            raise ValueError(
                f"a shard in pages of {page_tokens} tokens, codec {codec.name} makes pages of "
                f"{self.unit_tokens} at head_dim {head_dim}: use these"
            )
        self.form = page_form(codec, num_layers, num_kv_heads, head_dim, dtype, page_tokens)
        self._layers = self._allocate()
        self._spans: tuple[Span, ...] = ()
        self._rows = 0
        self._begin = 0
        """First row of the last reservation; its rows end at `_rows`."""
        self._before: tuple[Span, ...] = ()
        """Spans before the last reservation."""
        self._written = [0] * num_layers

    def _allocate(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        try:
            return tuple(
                tuple(
                    torch.empty(
                        (spec.units(self.capacity_tokens), *spec.shape),
                        dtype=spec.dtype,
                        device=self.device,
                    )
                    for spec in self.specs
                )
                for _ in range(self.num_layers)
            )
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            raise TooLarge(
                f"{self.capacity_tokens} tokens of KV need {self.capacity_bytes / GIB:.2f} GiB on "
                f"{self.device} (codec {self.codec.name}), which has not that much free: fewer "
                f"tokens, more ranks{or_smaller(self.codec.name)}"
            ) from None

    def bytes_of(self, tokens: int) -> int:
        """Encoded bytes of `tokens` tokens that begin with a page, all layers."""
        return self.num_layers * specs_bytes(self.specs, tokens)

    @property
    def page_bytes(self) -> int:
        """Encoded bytes of a full page, all layers."""
        return self.bytes_of(self.page_tokens)

    @property
    def capacity_bytes(self) -> int:
        return self.bytes_of(self.capacity_tokens)

    @property
    def kv_bytes(self) -> int:
        """Encoded bytes of the tokens held."""
        return self.bytes_of(self._rows)

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    @property
    def num_tokens(self) -> int:
        return self._rows

    @property
    def is_complete(self) -> bool:
        """Every layer has written every reserved row."""
        return all(rows == self._rows for rows in self._written)

    def reserve(self, spans: Sequence[Span]) -> None:
        """The next tokens, for all layers; ascending, behind all positions held.

        Raises ValueError on misuse (out of order, not whole pages where the codec encodes pages, or
        a layer still owes its last rows) and TooLarge beyond the capacity.
        """
        if not self.is_complete:
            layer = next(i for i, rows in enumerate(self._written) if rows != self._rows)
            raise ValueError(
                f"layer {layer} has written {self._written[layer]} of {self._rows} reserved rows; "
                f"write it or `cancel` before the next reserve"
            )
        last = self._spans[-1].stop if self._spans else 0
        for span in spans:
            if span.start < last:
                raise ValueError(
                    f"span [{span.start}, {span.stop}) is not behind position {last}: a shard "
                    f"takes ascending spans"
                )
            last = span.stop
        if self.unit_tokens > 1:
            self._check_pages(spans)
        tokens = total_tokens(spans)
        if self._rows + tokens > self.capacity_tokens:
            raise TooLarge(
                f"{tokens} more tokens in a shard that holds {self._rows} of "
                f"{self.capacity_tokens}: allocate it for {self._rows + tokens}"
            )
        self._before, self._begin = self._spans, self._rows
        self._spans = coalesce((*self._spans, *spans))
        self._rows += tokens

    def _check_pages(self, spans: Sequence[Span]) -> None:
        """What is encoded in whole pages comes in whole pages; the last one may be short."""
        if self._rows % self.unit_tokens:
            raise ValueError(
                f"{self._rows} rows end within a page of {self.unit_tokens}, which codec "
                f"{self.codec.name} cannot continue: reserve whole pages but for the last"
            )
        joined = coalesce(spans)
        for at, span in enumerate(joined):
            short = span.stop % self.unit_tokens and at < len(joined) - 1
            if span.start % self.unit_tokens or short:
                raise ValueError(
                    f"span [{span.start}, {span.stop}) is not cut at pages of {self.unit_tokens}, "
                    f"in which codec {self.codec.name} encodes: reserve whole pages"
                )

    def cancel(self) -> None:
        """Forget the last reservation, whatever of it was written; the rows before it stay."""
        self._spans, self._rows = self._before, self._begin
        self._written = [min(rows, self._begin) for rows in self._written]

    def take_back(self, spans: Sequence[Span]) -> None:
        """Forget all rows behind `spans`, which the first rows are of; no layer owes any row.

        Raises ValueError for other spans than the shard's first tokens.
        """
        rows = total_tokens(spans)
        if coalesce(spans) != _first(self.spans, rows):
            raise ValueError(f"{spans} are not the first tokens of a shard of {self.spans}")
        self._spans = self._before = coalesce(spans)
        self._rows = self._begin = rows
        self._written = [rows] * self.num_layers

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [T, Hkv, D] of the spans last reserved, encoded into place. Once per layer."""
        wanted = (self._rows - self._begin, self.num_kv_heads, self.head_dim)
        if tuple(k.shape) != wanted or tuple(v.shape) != wanted:
            raise ValueError(
                f"k {tuple(k.shape)}, v {tuple(v.shape)} written to layer {layer}; reserved were "
                f"[T, Hkv, D] = {wanted}"
            )
        if k.dtype != self.dtype or v.dtype != self.dtype:
            raise ValueError(f"k {k.dtype}, v {v.dtype} written to a shard of {self.dtype}")
        if self._written[layer] != self._begin:
            raise ValueError(
                f"layer {layer} has {self._written[layer]} rows, the reservation begins at "
                f"{self._begin}: reserve before write, write once"
            )
        into = cut_units(self._layers[layer], self.specs, self._begin, self._rows)
        self.codec.encode(k, v, into)
        self._written[layer] = self._rows

    def tensors(
        self, layer: int, num_tokens: int | None = None, first: int = 0
    ) -> tuple[torch.Tensor, ...]:
        """The units of token rows [first, num_tokens) (to the end), each tensor contiguous."""
        rows = self._rows if num_tokens is None else num_tokens
        if not 0 <= first <= rows <= self._written[layer]:
            raise ValueError(
                f"rows {first} to {rows} asked of layer {layer}, which has written "
                f"{self._written[layer]} of {self._rows}"
            )
        return cut_units(self._layers[layer], self.specs, first, rows)

    # pages

    def pages(self) -> tuple[tuple[Span, int], ...]:
        """(span, first row) of each page, in position order.

        Raises ValueError where the rows are no whole pages (a tail's, a shard in the middle of a
        page).
        """
        found: list[tuple[Span, int]] = []
        row = 0
        for at, span in enumerate(self._spans):
            last = at == len(self._spans) - 1
            if span.start % self.page_tokens or (span.stop % self.page_tokens and not last):
                raise ValueError(
                    f"span [{span.start}, {span.stop}) is not cut at pages of {self.page_tokens}"
                )
            for start in range(span.start, span.stop, self.page_tokens):
                page = Span(start, min(start + self.page_tokens, span.stop))
                found.append((page, row))
                row += page.tokens
        return tuple(found)

    def plane_sums(self, index: int) -> list[int]:
        """One unsigned 64-bit sum per layer of page `index`; formula in `kvstore.planes`."""
        span, row = self.pages()[index]
        sums = planes.page_sums(self._complete_layers(), self.specs, row, span.tokens, 1)
        return [int(value) for value in sums[0]]

    def all_plane_sums(self) -> list[list[int]]:
        """`plane_sums` of every page, computed over many pages at a time: [pages][layers]."""
        held = self._complete_layers()
        lengths = [span.tokens for span, _ in self.pages()]
        return planes.all_page_sums(held, self.specs, lengths, self.page_tokens)

    def export_page(self, index: int, origin: Origin, keys: Sequence[str]) -> Page:
        """Page `index` in host memory, sealed: header with key and sums, payload.

        keys: of all pages of the context, in position order.
        """
        span, row = self.pages()[index]
        payload = torch.empty(self.bytes_of(span.tokens), dtype=torch.uint8)
        planes.gather(self._complete_layers(), self.specs, row, span.tokens, payload[None])
        data = memoryview(payload.numpy())
        return seal(self.form, origin, span, keys, self.plane_sums(index), data)

    def import_page(self, page: Page) -> None:
        """Append a page, verified first. Raises `CorruptPage`, BadInput for one that is encrypted;
        the shard is then as before."""
        if page.header.sealed is not None:
            raise BadInput(
                f"{page_name(page.header)} is encrypted: it is opened before it enters a shard"
            )
        verify_page(page)
        if page.header.form != self.form:
            raise CorruptPage(
                f"{page_name(page.header)} does not fit the shard: "
                f"{differences(self.form, page.header.form)}"
            )
        self.reserve((page.header.span,))
        self.fill(self._begin, page.header.span.tokens, planes.bytes_tensor(page.payload)[None])
        self.mark_filled()

    # used by `kvstore.transfer`: many pages at a time

    def gather(self, row: int, tokens: int, out: torch.Tensor) -> None:
        """Consecutive pages of `tokens` tokens from `row` on -> out [pages, payload] uint8."""
        planes.gather(self._complete_layers(), self.specs, row, tokens, out)

    def fill(self, row: int, tokens: int, payloads: torch.Tensor) -> None:
        """payloads [pages, payload] uint8 -> reserved rows, unreadable until `mark_filled`."""
        if not self._begin <= row <= row + tokens * len(payloads) <= self._rows:
            raise ValueError(
                f"rows {row}.. are not reserved: rows {self._begin} to {self._rows} are"
            )
        planes.scatter(self._layers, self.specs, row, tokens, payloads)

    def reserved_plane_sums(self) -> list[list[int]]:
        """Sums of the pages last reserved, for the loader to compare before `mark_filled`."""
        lengths = [span.tokens for span, row in self.pages() if row >= self._begin]
        return planes.all_page_sums(
            self._layers, self.specs, lengths, self.page_tokens, self._begin
        )

    def mark_filled(self) -> None:
        """The reserved rows hold verified KV in every layer: they may be read."""
        self._written = [self._rows] * self.num_layers

    def _complete_layers(self) -> planes.Layers:
        if not self.is_complete:
            raise ValueError("pages of a shard are complete only when every layer was written")
        return self._layers

    def __repr__(self) -> str:
        return (
            f"ContextShard({self.codec.name} {dtype_name(self.dtype)}, {self._rows} of "
            f"{self.capacity_tokens} tokens, {self.kv_bytes / GIB:.3f} GiB on {self.device})"
        )


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)  # the CPU allocator raises a plain RuntimeError
    return "not enough memory" in text or "can't allocate memory" in text or "overflow" in text


def _first(spans: Sequence[Span], tokens: int) -> tuple[Span, ...]:
    found: list[Span] = []
    for span in spans:
        taken = min(span.tokens, tokens)
        if taken:
            found.append(Span(span.start, span.start + taken))
        tokens -= taken
    return tuple(found)
