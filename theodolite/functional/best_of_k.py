r"""Best of K without drawing K: unbiased estimates for every K <= N from N scored candidates.

Let ``e_(1) <= ... <= e_(N)`` be the sorted errors of N exchangeable candidates. Among all subsets of size K, candidate ``(i)`` is the best
in those that hold it and otherwise only worse ones, so

.. math:: \hat e_K = \sum_{i=1}^{N-K+1} w_i e_{(i)}, \qquad w_i = \binom{N-i}{K-1} \Big/ \binom{N}{K},

is the mean over *all* subsets: the minimum-variance unbiased estimate of the expected error of the best of K (a U-statistic; the estimator
that Chen et al. 2021, arXiv:2107.03374, use for pass@k, for real-valued scores). It falls with K by construction. The first K columns
would estimate the same with K instead of N candidates: at K = 1 with N times the variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def order_statistic_weights(n: int, ks: Sequence[int]) -> Tensor:
    """Probability that the i-th best of ``n`` is the best of a random subset of size K.

    Args:
        n: Candidates.
        ks: Subset sizes, each from 1 to ``n``.

    Returns:
        (len(ks), n) float64; every row sums to 1.

    Raises:
        ValueError: If a K does not lie between 1 and ``n``.
    """
    _check(n, ks)
    weights = torch.zeros(len(ks), n, dtype=torch.float64)
    for row, k in enumerate(ks):
        weight = k / n
        for i in range(n - k + 1):
            weights[row, i] = weight
            weight *= (n - k - i) / (n - 1 - i) if i < n - 1 else 0.0
    return weights


def expected_best_of_k(errors: Tensor, ks: Sequence[int]) -> Tensor:
    """Expected error of the best of K candidates, for every K at once.

    Args:
        errors: (rows, N); lower is better, and all must be finite.
        ks: Subset sizes, each from 1 to N.

    Returns:
        (rows, len(ks)) float64, falling along ``ks``.

    Raises:
        ValueError: If a K does not lie between 1 and N, or an error is not finite.
    """
    return expected_of_selected(errors, errors, ks)


def expected_of_selected(values: Tensor, errors: Tensor, ks: Sequence[int]) -> Tensor:
    """Expected value of any statistic of the candidate that best-of-K selects.

    With ``values = errors`` this is :func:`expected_best_of_k`; with a held-out scorer's errors it is what the selected candidate is worth
    to someone who did not select it; with reconstructions (rows, N, d) it is the mean selected reconstruction.

    Args:
        values: (rows, N, ...) statistic of every candidate.
        errors: (rows, N) errors that select; of equal errors the earlier candidate counts as the better.
        ks: Subset sizes, each from 1 to N.

    Returns:
        (rows, len(ks), ...) float64.

    Raises:
        ValueError: If shapes do not fit, a K does not lie between 1 and N, or an error is not finite.
    """
    if errors.ndim != 2 or values.shape[:2] != errors.shape:
        raise ValueError(f"Need errors (rows, N) and values (rows, N, ...), got {tuple(errors.shape)} and {tuple(values.shape)}.")
    if not bool(torch.isfinite(errors).all()):
        raise ValueError("Errors that select among candidates must be finite: score a failed candidate as the mean prediction.")
    weights = order_statistic_weights(errors.shape[1], ks).to(errors.device)
    order = errors.argsort(dim=1, stable=True)
    # the weight of each candidate in its own place: values need not be copied into sorted order
    by_candidate = torch.zeros(errors.shape[0], len(ks), errors.shape[1], dtype=torch.float64, device=errors.device)
    by_candidate.scatter_(2, order[:, None].expand(-1, len(ks), -1), weights.expand(errors.shape[0], -1, -1))
    flat = values.double().reshape(*errors.shape, -1)
    return (by_candidate @ flat).reshape(errors.shape[0], len(ks), *values.shape[2:])


def expected_error_of_mean(errors: Tensor, error_of_mean: Tensor, ks: Sequence[int]) -> Tensor:
    r"""Expected error of the mean of K reconstructions, drawn without replacement from N.

    With residuals ``r_k`` of the N reconstructions and their mean, sampling from a finite population gives

    .. math:: E\|\bar r_S\|^2 = \|\bar r\|^2 + \Big(\frac1K - \frac1N\Big) \frac{N}{N-1} \Big(\frac1N \sum_k \|r_k\|^2 - \|\bar r\|^2\Big),

    which is the mean over all subsets S of size K. An ensemble of K is what K texts are worth to a reader who does not select.

    Args:
        errors: (rows, N) squared errors of single reconstructions.
        error_of_mean: (rows,) squared error, on the same scale, of the mean of all N.
        ks: Subset sizes, each from 1 to N.

    Returns:
        (rows, len(ks)) float64.

    Raises:
        ValueError: If a K does not lie between 1 and N.
    """
    n = errors.shape[1]
    _check(n, ks)
    whole = error_of_mean.double()[:, None]
    spread = (errors.double().mean(dim=1, keepdim=True) - whole) * (n / max(n - 1, 1))
    share = torch.tensor([1 / k - 1 / n for k in ks], dtype=torch.float64, device=errors.device)
    return whole + share * spread


def _check(n: int, ks: Sequence[int]) -> None:
    for k in ks:
        if not 1 <= k <= n:
            raise ValueError(f"The best of {k} cannot be estimated from {n} candidates; K must lie between 1 and {n}.")
