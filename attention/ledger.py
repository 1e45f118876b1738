"""Conservation of tokens: how many keys each query row has really been attended to, counted.

Every piece that a kernel was called for adds the keys its rows see, once a head. Ranks count what
they computed, for whoever's rows; the sum over ranks must be what the mask says: row i of a causal
prefill has seen i + 1 keys, in every head of every layer. A hop left out, a block taken twice, a
wrong offset: each shows as a wrong count, exactly, whatever the numbers in the tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ringspan.attention.mask import Piece
from ringspan.attention.problem import Grouped, Problem, count_seen
from ringspan.attention.transport import Transport
from ringspan.errors import WrongAttention


class Ledger:
    """One step's counts on one rank, over all layers; unit: keys x heads."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._starts = np.cumsum([0, *(problem.rows(r) for r in range(problem.world_size))])
        self._seen = np.zeros(self._starts[-1], dtype=np.int64)
        self._counted: dict[tuple[tuple[Piece, ...], int], np.ndarray] = {}
        self._windows: dict[int | None, int] = {}

    def layer(self, window: int | None, heads: int) -> None:
        """One more layer begins, with so many q heads."""
        self._windows[window] = self._windows.get(window, 0) + heads

    def add(self, q_rank: int, cut: tuple[Piece, ...], heads: int) -> None:
        """The pieces of `cut` were attended to, with q_rank's rows and so many of their heads."""
        start, rows = self._starts[q_rank], self._problem.rows(q_rank)
        self._seen[start : start + rows] += heads * self._count(cut, rows)

    def grouped(self, grouped: Grouped) -> Ledger:
        """The same ledger for a scheme whose ranks are groups of neighbours."""
        size = grouped.group_size
        return _GroupedLedger(
            self,
            [
                self._starts[group * size] + grouped.row_order(group)
                for group in range(self._problem.world_size // size)
            ],
        )

    def add_at(self, at: np.ndarray, cut: tuple[Piece, ...], heads: int) -> None:
        """As `add`, for rows in another order: at[i] is row i's place among all ranks' rows."""
        self._seen[at] += heads * self._count(cut, len(at))

    def _count(self, cut: tuple[Piece, ...], rows: int) -> np.ndarray:
        if (cut, rows) not in self._counted:
            self._counted[cut, rows] = count_seen(cut, rows)
        return self._counted[cut, rows]

    def check(self, transport: Transport, device: torch.device) -> int:
        """Adds up all ranks' counts and compares: the keys x heads that this rank's rows saw.

        Raises WrongAttention, naming the first row that is wrong. All ranks call it.
        """
        mine = torch.from_numpy(self._seen).to(device)
        total = transport.all_gather(mine).sum(0).cpu().numpy()
        rank = transport.rank
        seen = total[self._starts[rank] : self._starts[rank + 1]]
        expected = np.zeros_like(seen)
        for window, heads in self._windows.items():
            expected += heads * self._problem.expected(rank, window)
        wrong = np.nonzero(seen != expected)[0]
        if len(wrong):
            row = int(wrong[0])
            raise WrongAttention(
                f"rank {rank}, row {row} of {len(seen)}: its heads saw {int(seen[row])} keys in all"
                f" layers together, wanted {int(expected[row])} ({len(wrong)} rows are wrong); "
                "nothing of this step may be used"
            )
        return int(seen.sum())


class _GroupedLedger(Ledger):
    def __init__(self, ledger: Ledger, order: Sequence[np.ndarray]) -> None:
        self._ledger, self._order = ledger, order

    def add(self, q_rank: int, cut: tuple[Piece, ...], heads: int) -> None:
        self._ledger.add_at(self._order[q_rank], cut, heads)
