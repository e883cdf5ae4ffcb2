r"""Fraction of variance unexplained, from sums that can be merged in any order.

.. math:: \text{FVU} = \frac{\sum_n \lVert y_n - \hat y_n\rVert^2}{\sum_n \lVert y_n - \bar y\rVert^2},
    \qquad \bar y = \frac1N \sum_n y_n \text{ per dimension}

over the *whole* data set: 0 is perfect, 1 is as good as always predicting the mean, and it can exceed 1. It equals ``1 - R2`` weighted by
variance. A mean of per-batch ratios is another, larger number, and so is any ratio with one mean for all dimensions.

Everything is summed in float64 by the shifted form of Chan, Golub and LeVeque (1983), so a mean of 1000 standard deviations costs no
digits. There is no epsilon: a target without variance has no FVU, which is NaN.

Shapes: targets are (..., d); reconstructions are (..., d), or (..., G, d) for G of them (the nested prefixes of a Matryoshka coder).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = (64 * torch.finfo(torch.float64).eps) ** 2
"""Variance below this share of the mean square is rounding of the sums themselves, that is: none."""


@dataclass(frozen=True, slots=True)
class FvuSums:
    """What is known of the rows seen so far, by bucket of token position (P is 1 where positions do not matter).

    Attributes:
        count: (P,) float64 number of rows.
        mean: (P, d) float64 mean target.
        scatter: (P, d) float64 summed squared distance of the targets from ``mean``.
        residual: (G, P, d) float64 summed squared error of each reconstruction.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    residual: Tensor


def fvu_sums(target: Tensor, reconstruction: Tensor, bucket: Tensor | None = None, buckets: int = 1) -> FvuSums:
    """Sums of one batch of rows.

    Args:
        target: (N, d) of any dtype.
        reconstruction: (N, G, d).
        bucket: (N,) int64 in ``[0, buckets)``; None = one bucket.
        buckets: P.
    """
    wide = torch.float64
    if target.device.type == "mps":  # has no float64
        target, reconstruction, bucket = target.cpu(), reconstruction.cpu(), None if bucket is None else bucket.cpu()
    y = target.to(wide)
    error = (reconstruction.to(wide) - y[:, None]).square().transpose(0, 1)
    if bucket is None:
        bucket = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    count = y.new_zeros(buckets).index_add(0, bucket, torch.ones_like(bucket, dtype=wide))
    rows = count.clamp_min(1)[:, None]
    mean = _sum_by(bucket, y, buckets) / rows
    centred = y - mean[bucket]
    correction = _sum_by(bucket, centred, buckets)  # what rounding left in the mean
    scatter = _sum_by(bucket, centred.square(), buckets) - correction.square() / rows
    residual = torch.stack([_sum_by(bucket, part, buckets) for part in error])
    return FvuSums(count, mean + correction / rows, scatter, residual)


def merge_fvu_sums(a: FvuSums, b: FvuSums) -> FvuSums:
    """Sums of both sets of rows; associative and commutative up to rounding, and an empty set changes nothing."""
    total = a.count + b.count
    share = (b.count / total.clamp_min(1))[:, None]
    step = b.mean - a.mean
    scatter = a.scatter + b.scatter + step.square() * a.count[:, None] * share
    return FvuSums(total, a.mean + step * share, scatter, a.residual + b.residual)


def overall_mean(sums: FvuSums) -> Tensor:
    """(d,) mean target over all buckets."""
    return (sums.count[:, None] * sums.mean).sum(0) / sums.count.sum().clamp_min(1)


def fvu(sums: FvuSums) -> Tensor:
    """(G,) fraction of variance unexplained of each reconstruction; NaN where the target has no variance."""
    return sums.residual.sum((1, 2)) / _some(_variance(sums).sum())


def fvu_per_dimension(sums: FvuSums) -> Tensor:
    """(G, d): each dimension's own ratio; NaN for a constant one."""
    return sums.residual.sum(1) / _some(_variance(sums).sum(0))


def fvu_per_position(sums: FvuSums) -> Tensor:
    """(G, P): each position's share of the errors over its share of the variance around the *overall* mean.

    Weighted by the positions' variances they average to :func:`fvu`. NaN for a position without rows or variance.
    """
    return sums.residual.sum(2) / _some(_variance(sums).sum(1))


def fraction_of_variance_unexplained(target: Tensor, reconstruction: Tensor, mask: Tensor | None = None) -> Tensor:
    """FVU of all rows given, in float64.

    Args:
        target: (..., d).
        reconstruction: (..., d) or (..., G, d).
        mask: (...) bool; rows that count. None = all.

    Returns:
        A scalar, or (G,) for G reconstructions; NaN if the target has no variance (constant, or fewer than two rows).

    Raises:
        ValueError: Shapes that do not fit.
    """
    y, prediction = matched_rows(target, reconstruction, mask)
    ratio = fvu(fvu_sums(y, prediction))
    return ratio if reconstruction.ndim > target.ndim else ratio[0]


def median_token_fvu(target: Tensor, reconstruction: Tensor, mean: Tensor | None = None) -> Tensor:
    r"""Median over rows of :math:`\lVert y - \hat y\rVert^2 / \lVert y - \bar y\rVert^2`: a few huge rows cannot hide the others.

    Args:
        target: (..., d).
        reconstruction: (..., d) or (..., G, d).
        mean: (d,) centre; None = the mean of these rows.

    Returns:
        A float64 scalar, or (G,). Rows that equal the mean and are predicted exactly (0/0) are left out.
    """
    y, prediction = matched_rows(target, reconstruction, None)
    centre = y.double().mean(0) if mean is None else mean.double()
    error = (prediction.double() - y.double()[:, None]).square().sum(-1)
    median = median_ratio(error, (y.double() - centre).square().sum(-1))
    return median if reconstruction.ndim > target.ndim else median[0]


def median_ratio(error: Tensor, distance: Tensor) -> Tensor:
    """(G,) median over N of ``error`` (N, G) / ``distance`` (N,), without the undefined 0/0; NaN of nothing."""
    ratios = (error / distance[:, None]).t()
    return torch.stack([_median(row[~row.isnan()]) for row in ratios])


def matched_rows(target: Tensor, reconstruction: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (N, d) and their reconstructions (N, G, d), of the places where the mask is true.

    Raises:
        ValueError: Shapes that do not fit.
    """
    grouped = reconstruction.ndim == target.ndim + 1
    lead, width = target.shape[:-1], target.shape[-1]
    if not grouped:
        reconstruction = reconstruction.unsqueeze(-2) if reconstruction.ndim else reconstruction
    fits = (
        target.ndim > 0
        and reconstruction.ndim == target.ndim + 1
        and (*reconstruction.shape[:-2], reconstruction.shape[-1]) == target.shape
    )
    if not fits or (mask is not None and mask.shape != lead):
        shapes = f"target {tuple(target.shape)}, reconstruction {tuple(reconstruction.shape)}"
        shapes += "" if mask is None else f", mask {tuple(mask.shape)}"
        raise ValueError(f"FVU needs a target (..., d), a reconstruction (..., d) or (..., groups, d) and a mask (...), got {shapes}.")
    y, prediction = target.reshape(-1, width), reconstruction.reshape(-1, reconstruction.shape[-2], width)
    if mask is None:
        return y, prediction
    kept = mask.reshape(-1).to(torch.bool)
    return y[kept], prediction[kept]


def _variance(sums: FvuSums) -> Tensor:
    """(P, d) summed squared distance from the overall mean; exactly 0 in dimensions where it is only rounding."""
    centre = overall_mean(sums)
    counts = sums.count[:, None]
    scatter = sums.scatter + counts * (sums.mean - centre).square()
    total = scatter.sum(0)
    noise = NOISE * (total + sums.count.sum() * centre.square())
    return torch.where(total <= noise, 0.0, scatter)


def _some(variance: Tensor) -> Tensor:
    return torch.where(variance > 0, variance, torch.nan)


def _sum_by(bucket: Tensor, values: Tensor, buckets: int) -> Tensor:
    if buckets == 1:
        return values.sum(0, keepdim=True)
    return values.new_zeros(buckets, *values.shape[1:]).index_add(0, bucket, values)


def _median(values: Tensor) -> Tensor:
    if not len(values):
        return values.new_tensor(torch.nan)
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
