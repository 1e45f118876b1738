"""Names of pages in tiers; apart from `base`, so that the host store's process needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class PageId(NamedTuple):
    """One encoding of one page."""

    key: str
    """Hex of the chained BLAKE3 key."""
    form: str
    """`base.form_id` of its form and origin."""
