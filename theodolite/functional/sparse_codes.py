"""Which latents are active: exact selection rules that return only the active entries.

An encoder of a transcoder or sparse autoencoder has (N, M) pre-activations, of which k per token are kept (k is 32 where M is 4096). All
rules here return a :class:`SparseCodes`: the kept entries in row-major order, ready for the products of
:mod:`theodolite.functional.sparse_products`. Nothing here is differentiated; a selection has no gradient.

Selection reads maxima of groups first. The k largest of M numbers lie in at most k groups, and those are the k groups with the largest
maxima; so looking for k groups and then among their members finds exactly the k largest while sorting a fraction of the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

GROUP = 4
"""Members per group and level; with two levels a selection of 32 among 4096 takes a third of a plain ``topk``'s time on a CPU core."""
LEAST_GROUPS = 3
"""Groups per kept entry below which another level costs more than it saves."""
FEW_THREADS = 4
"""Up to so many threads NumPy's serial partition is faster than ``topk``, which uses all of them."""


@dataclass(frozen=True)
class SparseCodes:
    """Active entries of an (N, M) matrix of latents, by row and within a row by latent.

    Attributes:
        rows: (nnz,) token of each entry, non-decreasing.
        latents: (nnz,) latent of each entry, increasing within a row.
        values: (nnz,) activation of each entry; entries of value 0 may occur (a row with fewer than k positive pre-activations).
        n_rows: N.
        n_latents: M.
    """

    rows: Tensor
    latents: Tensor
    values: Tensor
    n_rows: int
    n_latents: int

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The entries' order by latent, (nnz,), and the first entry of each latent in that order, (M,)."""
        latents, order = torch.sort(self.latents, stable=True)
        return order, torch.searchsorted(latents, torch.arange(self.n_latents, device=latents.device))

    @property
    def active(self) -> Tensor:
        """(nnz,) whether an entry is really active, that is positive."""
        return self.values > 0

    def with_values(self, values: Tensor) -> SparseCodes:
        """The same support with other values."""
        return SparseCodes(self.rows, self.latents, values, self.n_rows, self.n_latents)

    def dense(self) -> Tensor:
        """(N, M) matrix, for tests and for what needs all latents."""
        matrix = self.values.new_zeros(self.n_rows, self.n_latents)
        return matrix.index_put((self.rows, self.latents), self.values)

    def counts(self) -> Tensor:
        """(M,) tokens on which each latent is active (int64)."""
        counts = torch.zeros(self.n_latents, dtype=torch.int64, device=self.latents.device)
        return counts.scatter_add_(0, self.latents, self.active.to(torch.int64))


def topk_codes(scores: Tensor, k: int) -> SparseCodes:
    """The ``k`` largest scores of every row, negative ones set to 0 (TopK, arXiv 2406.04093).

    Args:
        scores: (N, M) pre-activations.
        k: Kept entries per row.

    Raises:
        ValueError: If ``k`` is not between 1 and M.
    """
    n, m = scores.shape
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}, but a row has {m} latents; choose 1 to {m}.")
    latents = largest_per_row(scores, k).sort(dim=1).values
    values = scores.gather(1, latents).clamp_min(0)
    rows = torch.arange(n, device=scores.device).repeat_interleave(k)
    return SparseCodes(rows, latents.reshape(-1), values.reshape(-1), n, m)


def largest_entries(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest entries of a whole matrix.

    Args:
        scores: (N, M) pre-activations.
        count: How many; all entries if there are fewer.

    Returns:
        Their values and their positions ``row * M + latent``, (min(count, N * M),) each, in no particular order.
    """
    n, m = scores.shape
    if count >= n * m:
        return scores.reshape(-1), torch.arange(n * m, device=scores.device)
    if m % GROUP == 0 and count <= n * m // GROUP:
        width = m // GROUP
        _, best = largest_entries(scores.view(n, GROUP, width).amax(dim=1), count)
        first = best // width * m + best % width
        positions = (first[:, None] + torch.arange(0, m, width, device=scores.device)).reshape(-1)
        values, chosen = scores.reshape(-1)[positions].topk(count, sorted=False)
        return values, positions[chosen]
    values, positions = scores.reshape(-1).topk(count, sorted=False)
    return values, positions


def entries_as_codes(values: Tensor, positions: Tensor, threshold: Tensor, n_rows: int, n_latents: int) -> SparseCodes:
    """Entries at or above a threshold and above 0, in row-major order.

    Args:
        values: (c,) candidate activations.
        positions: (c,) their positions ``row * M + latent``.
        threshold: Scalar; candidates below it are dropped.
        n_rows: N.
        n_latents: M.
    """
    kept = (values >= threshold) & (values > 0)
    positions, order = positions[kept].sort()
    return SparseCodes(positions // n_latents, positions % n_latents, values[kept][order], n_rows, n_latents)


def above_threshold(scores: Tensor, threshold: Tensor) -> SparseCodes:
    """Every positive score above its latent's threshold (JumpReLU, arXiv 2407.14435).

    Args:
        scores: (N, M) pre-activations.
        threshold: Scalar or (M,).
    """
    n, m = scores.shape
    rows, latents = ((scores > threshold) & (scores > 0)).nonzero(as_tuple=True)
    return SparseCodes(rows, latents, scores[rows, latents], n, m)


def largest_per_row(scores: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` largest entries of each row, (N, k), in no particular order; see the module's docstring for how."""
    n, m = scores.shape
    if m % GROUP or LEAST_GROUPS * k > m // GROUP:
        return _largest_in_short_rows(scores, k)
    width = m // GROUP
    best = largest_per_row(scores.view(n, GROUP, width).amax(dim=1), k)
    candidates = (best[:, :, None] + torch.arange(0, m, width, device=scores.device)).view(n, k * GROUP)
    chosen = _largest_in_short_rows(scores.gather(1, candidates), k)
    return candidates.gather(1, chosen)


def _largest_in_short_rows(scores: Tensor, k: int) -> Tensor:
    """As ``scores.topk(k).indices`` in no particular order. NumPy finds a row's k-th largest with vector instructions, torch does not."""
    n, m = scores.shape
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and torch.get_num_threads() <= FEW_THREADS:
        values = scores.detach().numpy()
        found = np.flatnonzero(values >= np.partition(values, m - k, axis=1)[:, m - k, None])
        if len(found) == n * k:  # else values equal the k-th largest, or are not numbers
            positions = torch.from_numpy(found).view(n, k) - torch.arange(0, n * m, m)[:, None]
            if bool(((positions >= 0) & (positions < m)).all()):
                return positions
    return scores.topk(k, dim=1, sorted=False).indices
