r"""Confidence intervals over documents: rows of one document are not independent, so documents are what is resampled.

A bootstrap sample of G documents is a vector of counts that sums to G. A metric that depends on the data through sums over documents is
then a function of one matrix product ``counts (B, G) @ sums (G, ...)``: thousands of replicates take milliseconds and no row is copied.
Curves computed under the *same* counts are paired: the interval of a difference is that of the differences of their replicates.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from theodolite.seeds import derive_seed


def bootstrap_counts(groups: int, replicates: int, seed: int) -> Tensor:
    """How often each group is drawn in each replicate.

    Args:
        groups: Number of groups (documents).
        replicates: Number of bootstrap samples.
        seed: Names the draws; the same seed and sizes give the same counts, so that curves of several runs are paired.

    Returns:
        (replicates, groups) float64, every row summing to ``groups``.

    Raises:
        ValueError: With fewer than two groups there is nothing to resample.
    """
    if groups < 2 or replicates < 2:
        raise ValueError(f"A bootstrap needs at least 2 documents and 2 replicates, got {groups} and {replicates}.")
    generator = np.random.Generator(np.random.Philox(key=derive_seed("bootstrap", seed, groups)))
    drawn = torch.from_numpy(generator.integers(groups, size=(replicates, groups)))
    return torch.zeros(replicates, groups, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def jackknife_counts(groups: int) -> Tensor:
    """(groups, groups): row g leaves group g out."""
    return torch.ones(groups, groups, dtype=torch.float64) - torch.eye(groups, dtype=torch.float64)


def percentile_interval(replicates: Tensor, groups: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Expanded percentile interval.

    The plain percentile interval is too narrow for few groups: it uses a normal quantile and the variance with divisor G. Taking the
    percentiles at :math:`\Phi(\mp\sqrt{G/(G-1)}\, t_{G-1})` corrects both (Hesterberg 2015, The American Statistician 69:4, section 5.3).

    Args:
        replicates: (B, ...) bootstrap values.
        groups: Number of groups they were resampled from.
        level: Coverage aimed at, in (0, 1).

    Returns:
        Lower and upper ends, each of shape (...).

    Raises:
        ValueError: If the level is not between 0 and 1.
    """
    tail = stats.norm.cdf(-math.sqrt(groups / (groups - 1)) * stats.t.ppf(_upper(level), groups - 1))
    ends = torch.quantile(replicates, torch.tensor([tail, 1 - tail], dtype=replicates.dtype), dim=0)
    return ends[0], ends[1]


def bca_interval(estimate: Tensor, replicates: Tensor, jackknife: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Bias-corrected and accelerated interval (Efron 1987).

    :math:`z_0` is the normal quantile of the share of replicates below the estimate; a share of 0 or 1 is taken as half a replicate, so
    that it stays finite. The acceleration comes from leaving out one group at a time.

    Args:
        estimate: (C,) values on the data.
        replicates: (B, C) bootstrap values.
        jackknife: (G, C) values with one group left out.
        level: Coverage aimed at, in (0, 1).

    Returns:
        Lower and upper ends, each (C,).

    Raises:
        ValueError: If the level is not between 0 and 1.
    """
    b = len(replicates)
    below = (replicates < estimate).double().mean(0).clamp(0.5 / b, 1 - 0.5 / b)
    z0 = stats.norm.ppf(below.numpy())
    away = jackknife.mean(0) - jackknife
    scale = away.square().sum(0).pow(1.5)
    acceleration = torch.where(scale > 0, away.pow(3).sum(0) / (6 * torch.where(scale > 0, scale, 1.0)), 0.0).numpy()
    z = stats.norm.ppf(_upper(level))
    ends: list[Tensor] = []
    for side in (-z, z):
        share = stats.norm.cdf(z0 + (z0 + side) / (1 - acceleration * (z0 + side)))
        ends.append(torch.stack([torch.quantile(replicates[:, c], float(share[c])) for c in range(replicates.shape[1])]))
    return ends[0], ends[1]


def _upper(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval must lie between 0 and 1, got {level}.")
    return 0.5 + level / 2
