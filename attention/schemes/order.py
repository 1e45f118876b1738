"""Index tensors that bring rows of several ranks into ascending positions, and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ringspan.attention.problem import Grouped


class Order(NamedTuple):
    """index[i]: which row comes i-th; inverse[j]: where row j has gone. int64, on the device."""

    index: torch.Tensor
    inverse: torch.Tensor
    sorted_already: bool


def order_of(
    grouped: Grouped, what: str, group: int, device: torch.device, unit_tokens: int = 1
) -> Order:
    """what: `rows`, or the number of a source for its keys, in units of so many tokens. Made once a
    problem and device."""
    at = (f"{what}/{unit_tokens}", group, device)
    if at not in grouped.orders:
        if what == "rows":
            order = grouped.row_order(group)
        else:
            order = grouped.key_order(int(what), group, unit_tokens)
        real = torch.device("cpu") if device.type == "meta" else device
        index = torch.from_numpy(order).to(real)
        inverse = torch.from_numpy(np.argsort(order, kind="stable")).to(real)
        done = bool((order == np.arange(len(order))).all())
        if device.type == "meta":
            index, inverse = index.to(device), inverse.to(device)
        grouped.orders[at] = Order(index, inverse, done)
    found: Order = grouped.orders[at]
    return found


def identity(order: Order) -> bool:
    return order.sorted_already
