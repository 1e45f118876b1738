"""What the model's attention is handed: one step of a gang, called once a layer by the hook."""

from __future__ import annotations

import torch

from ringspan.attention.compute import Rules


class Step:
    """What the hook calls."""

    def attend(
        self, rules: Rules, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [T, Hq, D], k, v [T, Hkv, D] of one layer -> out [T, Hq, D]."""
        raise TypeError("a Step is either a PrefillStep or a TailStep")
