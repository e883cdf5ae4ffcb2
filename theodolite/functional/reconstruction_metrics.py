r"""How well reconstructions explain activations, each variant named for what it is.

Let ``a_i`` be the n targets, ``b_i`` their reconstructions, ``r_i = a_i - b_i``, all (d,), and means over rows be written with a bar.

=========================  ===================================================================================================
``mse``                    ``sum_i |r_i|^2 / (n d)``
``fve``                    ``1 - sum_i |r_i|^2 / sum_i |a_i - mean a|^2``: fraction of variance explained; a bias costs
``fve_residual_centred``   ``1 - sum_i |r_i - mean r|^2 / sum_i |a_i - mean a|^2``: forgives a constant bias (published best-of-K
                           curves of talkative autoencoders call this "variance recovery")
``fve_directional``        ``fve`` after both sides are scaled to norm ``sqrt(d)``: direction only
``r2_scalar_mean``         ``1 - sum_i |r_i|^2 / sum_ij (a_ij - m)^2`` with *one* scalar mean m: credits predicting each dimension's
                           mean, so it is inflated where dimensions differ; for comparison with published numbers only
=========================  ===================================================================================================

The second half of the file computes the same for many resamples of documents at once, from sums per document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def mse(target: Tensor, reconstruction: Tensor) -> float:
    """Mean squared error over rows and dimensions of two (n, d) tensors."""
    return float(_residual(target, reconstruction).square().mean())


def fve(target: Tensor, reconstruction: Tensor) -> float:
    """Fraction of variance explained of (n, d) targets, about their mean per dimension; NaN where the targets do not vary."""
    return _explained(_residual(target, reconstruction).square().sum(), _centred(target).square().sum())


def fve_residual_centred(target: Tensor, reconstruction: Tensor) -> float:
    """Like :func:`fve` after the mean residual is taken out: forgives a constant bias."""
    return _explained(_centred(_residual(target, reconstruction)).square().sum(), _centred(target).square().sum())


def fve_directional(target: Tensor, reconstruction: Tensor) -> float:
    """:func:`fve` of directions: every row of both is scaled to norm sqrt(d) first."""
    return fve(directions(target), directions(reconstruction))


def r2_scalar_mean(target: Tensor, reconstruction: Tensor) -> float:
    """One minus squared error over squared distance to one scalar mean of all elements."""
    exact = target.double()
    return _explained(_residual(target, reconstruction).square().sum(), (exact - exact.mean()).square().sum())


def directions(vectors: Tensor) -> Tensor:
    """Rows scaled to norm sqrt(d), in float64; a zero row stays zero."""
    exact = vectors.double()
    norm = exact.norm(dim=-1, keepdim=True)
    return exact * (exact.shape[-1] ** 0.5 / torch.where(norm > 0, norm, 1.0))


@dataclass(frozen=True, slots=True)
class TargetSums:
    """What the metrics' denominators need of the targets, summed over each of G documents, in float64.

    Attributes:
        rows: (G,) rows.
        offset: Scalar taken off every element first (their mean): sums of small numbers keep their digits.
        sums: (G, d) of the targets about the mean row of all.
        squares: (G,) squared norms of the same.
        elements: (G,) sums over rows and dimensions of ``a - offset``.
        element_squares: (G,) sums of the squares of the same.
        direction_sums: (G, d) of the targets' directions.
    """

    rows: Tensor
    offset: float
    sums: Tensor
    squares: Tensor
    elements: Tensor
    element_squares: Tensor
    direction_sums: Tensor

    @classmethod
    def of(cls, target: Tensor, group: Tensor, groups: int) -> TargetSums:
        """From (n, d) targets and the number of each row's document (n,)."""
        exact = target.double()
        centred, offset = _centred(exact), float(exact.mean())
        shifted = exact - offset
        return cls(
            torch.bincount(group, minlength=groups).double(),
            offset,
            group_sums(centred, group, groups),
            group_sums(centred.square().sum(1), group, groups),
            group_sums(shifted.sum(1), group, groups),
            group_sums(shifted.square().sum(1), group, groups),
            group_sums(directions(exact), group, groups),
        )


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """What the metrics' numerators need of C reconstructions of every row, summed over each of G documents, in float64.

    Attributes:
        squared: (G, C) squared errors, summed over dimensions.
        directional: (G, C) squared errors between directions of norm sqrt(d), or None.
        residuals: (G, C, d) residuals, or None.
    """

    squared: Tensor
    directional: Tensor | None = None
    residuals: Tensor | None = None


def resampled_metrics(counts: Tensor, target: TargetSums, errors: ErrorSums) -> dict[str, Tensor]:
    """All metrics when document g is taken ``counts[b, g]`` times.

    Args:
        counts: (B, G) float64 weights of documents; a row of ones is the data themselves.
        target: Sums of the targets.
        errors: Sums of C reconstructions.

    Returns:
        ``mse``, ``fve``, ``r2_scalar_mean`` and, where the sums are there, ``fve_directional`` and ``fve_residual_centred``: (B, C).
    """
    d = target.sums.shape[1]
    rows = counts @ target.rows
    variance = (counts @ target.squares - squared_norms(counts, target.sums) / rows)[:, None]
    squared = counts @ errors.squared
    scalar = (counts @ target.element_squares - (counts @ target.elements).square() / (rows * d))[:, None]
    found = {"mse": squared / (rows * d)[:, None], "fve": 1 - squared / variance, "r2_scalar_mean": 1 - squared / scalar}
    if errors.residuals is not None:
        biases = torch.stack([squared_norms(counts, errors.residuals[:, c]) for c in range(squared.shape[1])], dim=1)
        found["fve_residual_centred"] = 1 - (squared - biases / rows[:, None]) / variance
    if errors.directional is not None:
        spread = rows * d - squared_norms(counts, target.direction_sums) / rows
        found["fve_directional"] = 1 - (counts @ errors.directional) / spread[:, None]
    return found


def squared_norms(counts: Tensor, sums: Tensor) -> Tensor:
    """``|counts[b] @ sums|^2`` for every b, through whichever of (G, G) and (B, d) is the smaller product.

    Args:
        counts: (B, G).
        sums: (G, d).
    """
    if sums.shape[0] < sums.shape[1]:
        return ((counts @ (sums @ sums.T)) * counts).sum(1)
    return (counts @ sums).square().sum(1)


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, ...) float64 sums of (n, ...) values by their group's number."""
    sums = torch.zeros(groups, *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, group, values.double())


def _residual(target: Tensor, reconstruction: Tensor) -> Tensor:
    if target.ndim != 2 or target.shape != reconstruction.shape:
        raise ValueError(f"Need two (n, d) tensors, got {tuple(target.shape)} and {tuple(reconstruction.shape)}.")
    return target.double() - reconstruction.double()


def _centred(values: Tensor) -> Tensor:
    exact = values.double()
    return exact - exact.mean(dim=0)


def _explained(unexplained: Tensor, total: Tensor) -> float:
    return float(1 - unexplained / total) if float(total) > 0 else float("nan")
