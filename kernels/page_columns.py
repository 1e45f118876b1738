"""Pages with one column a (page, head, token): how torch rotates and reduces them fast.

columns  [D, U, H, P]  fp32, contiguous; D head_dim, U pages, H kv heads, P tokens of a page

Along the first axis every step of a butterfly and every reduction over a row of K or V is one
operation on long contiguous pieces, and V's codes lie like this anyway. Each column is computed
alone: its bits never depend on the columns beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ringspan.kernels.rotate import SLICE_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

_CACHED_ELEMENTS = 1 << 17
"""Of a CPU core's cache: what goes through all steps before the next is looked at."""


def rotates(dim: int) -> bool:
    """Whether rows of this length are rotated: there are Hadamard signs of powers of two."""
    return dim > 1 and dim & (dim - 1) == 0


def stretches(x: torch.Tensor, page_tokens: int) -> Iterator[tuple[slice, slice]]:
    """(tokens, pages) of x [T, H, D], whole pages of it at a time."""
    limit = SLICE_ELEMENTS if x.is_cuda else _CACHED_ELEMENTS
    pages = max(1, limit // (page_tokens * x.shape[1] * x.shape[2]))
    for unit in range(0, -(-x.shape[0] // page_tokens), pages):
        yield (
            slice(unit * page_tokens, min(x.shape[0], (unit + pages) * page_tokens)),
            slice(unit, min(-(-x.shape[0] // page_tokens), unit + pages)),
        )


def to_columns(x: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """x [T, H, D] -> columns [D, U, H, P]; what the last page lacks is 0."""
    tokens, heads, dim = x.shape
    full, rest = divmod(tokens, page_tokens)
    rows = torch.empty(
        -(-tokens // page_tokens), heads, page_tokens, dim, dtype=torch.float32, device=x.device
    )
    rows[:full] = x[: tokens - rest].unflatten(0, (full, page_tokens)).transpose(1, 2)
    if rest:
        rows[full, :, :rest] = x[tokens - rest :].transpose(0, 1)
        rows[full, :, rest:] = 0.0
    return rows.view(-1, dim).t().contiguous().view(dim, -1, heads, page_tokens)


def from_columns(columns: torch.Tensor, x: torch.Tensor) -> None:
    """columns [D, U, H, P] -> x [T, H, D], written in place."""
    dim, _, heads, page_tokens = columns.shape
    full, rest = divmod(x.shape[0], page_tokens)
    rows = columns.view(dim, -1).t().contiguous().view(-1, heads, page_tokens, dim)
    x[: full * page_tokens].unflatten(0, (full, page_tokens)).copy_(rows[:full].transpose(1, 2))
    if rest:
        x[full * page_tokens :] = rows[full, :, :rest].transpose(0, 1)


def rotate(columns: torch.Tensor) -> torch.Tensor:
    """Each column by S / sqrt(D): the bits of rotate.hadamard. May write into `columns`."""
    dim = columns.shape[0]
    return butterflies(columns, 1, dim).mul_(1 / math.sqrt(dim))


def butterflies(columns: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Those rounds of a + b and a - b whose a and b are first, 2 first, .. stop / 2 rows apart.

    All of them, 1 to D, multiply by S; 1 to 64 do so within each 64 rows. Writes into `columns`.
    """
    column_elements = columns[0].numel()
    source, spare = columns, torch.empty_like(columns)
    half = first
    while half < stop:
        a, b = source.view(-1, 2, half * column_elements).unbind(1)
        sums, differences = spare.view(-1, 2, half * column_elements).unbind(1)
        torch.add(a, b, out=sums)
        torch.sub(a, b, out=differences)
        source, spare = spare, source
        half *= 2
    return source
