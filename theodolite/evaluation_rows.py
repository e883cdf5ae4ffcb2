"""The rows of an evaluation as a rank sees them, numbered by their place in the whole data.

Rows are dealt out in turn, as samplers here and in PyTorch do without shuffling: the i-th row of rank r of W is row ``r + i W`` of the
data, its *slot*. What is done to rows ``a`` to ``b`` is then the same whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class RowStore:
    """This rank's rows of the evaluation data, as they come.

    Args:
        rank: This process.
        ranks: Number of processes.
        limit: Rows wanted over all ranks; None = all.
    """

    def __init__(self, rank: int = 0, ranks: int = 1, limit: int | None = None) -> None:
        self.rank, self.ranks = rank, ranks
        self.limit = None if limit is None else self._before(limit)
        self.rows = 0
        self._batches: list[tuple[int, Any]] = []  # first row, batch

    def add(self, batch: Any, rows: int) -> None:
        """Keep a batch of ``rows`` rows, or what is wanted of it; copies, because tensors of an evaluation cannot be differentiated."""
        wanted = rows if self.limit is None else min(rows, self.limit - self.rows)
        if wanted > 0:
            self._batches.append((self.rows, cut(batch, 0, wanted, rows)))
            self.rows += wanted

    def pieces(self, start: int, stop: int, micro: int | None) -> Iterator[tuple[Any, list[int]]]:
        """Microbatches of the rows with slots from ``start`` to ``stop``, and their slots; none crosses a batch of the data."""
        first, end = self._before(start), self._before(stop)
        sizes = [next_first - its_first for (its_first, _), next_first in zip(self._batches, self._firsts()[1:], strict=True)]
        for (its_first, batch), size in zip(self._batches, sizes, strict=True):
            low, high = max(first, its_first), min(end, its_first + size)
            for begin in range(low, high, micro or max(1, high - low)):
                after = min(high, begin + (micro or high - low))
                slots = [self.rank + row * self.ranks for row in range(begin, after)]
                yield cut(batch, begin - its_first, after - its_first, size), slots

    def _firsts(self) -> list[int]:
        return [first for first, _ in self._batches] + [self.rows]

    def _before(self, slot: int) -> int:
        """How many of this rank's rows have a slot below ``slot``."""
        return max(0, -(-(slot - self.rank) // self.ranks))


def cut(batch: Any, start: int, stop: int, rows: int) -> Any:
    """Rows of every tensor in nested dictionaries, lists and tuples, as copies outside of inference mode.

    Raises:
        ValueError: If the batch holds no tensor, or one whose first axis is not the rows.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not leaves or any(leaf.ndim == 0 or leaf.shape[0] != rows for leaf in leaves):
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"A batch of {rows} rows cannot be cut into microbatches: its tensors have the shapes {shapes}, not rows first.")
    with torch.inference_mode(False):
        return pytree.tree_map(lambda leaf: leaf[start:stop].clone() if isinstance(leaf, Tensor) else leaf, batch)
