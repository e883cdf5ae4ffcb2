"""Best of K from N candidates: brute force over all subsets, simulation, monotonicity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.functional.best_of_k import (
    expected_best_of_k,
    expected_error_of_mean,
    expected_of_selected,
    order_statistic_weights,
)


def over_subsets(errors: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """Mean over all subsets of size k of the value of the one with the smallest error."""
    picks = [min(subset, key=lambda i: (errors[i], i)) for subset in itertools.combinations(range(len(errors)), k)]
    return np.mean([values[pick] for pick in picks], axis=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000), st.booleans())
def test_estimate_is_the_mean_over_all_subsets(n: int, seed: int, ties: bool) -> None:
    draw = np.random.default_rng(seed)
    errors = draw.integers(0, 3, size=(2, n)).astype(float) if ties else draw.lognormal(size=(2, n))
    values = draw.normal(size=(2, n, 3))
    ks = list(range(1, n + 1))
    best = expected_best_of_k(torch.from_numpy(errors), ks)
    selected = expected_of_selected(torch.from_numpy(values), torch.from_numpy(errors), ks)
    for row, (index, k) in itertools.product(range(2), enumerate(ks)):
        assert best[row, index] == pytest.approx(over_subsets(errors[row], errors[row], k), abs=1e-12)
        np.testing.assert_allclose(selected[row, index].numpy(), over_subsets(errors[row], values[row], k), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_error_of_a_mean_of_k_is_the_mean_over_all_subsets(n: int) -> None:
    residuals = np.random.default_rng(n).normal(0.3, 1.0, size=(n, 4))
    errors, whole = (residuals**2).sum(1), (residuals.mean(0) ** 2).sum()
    ours = expected_error_of_mean(torch.tensor(errors)[None], torch.tensor([whole]), range(1, n + 1))[0]
    for k in range(1, n + 1):
        subsets = [(residuals[list(s)].mean(0) ** 2).sum() for s in itertools.combinations(range(n), k)]
        assert ours[k - 1] == pytest.approx(np.mean(subsets), abs=1e-12)


def test_estimate_is_unbiased_and_far_less_noisy_than_the_first_k_columns() -> None:
    n, rows, repeats = 64, 200, 100
    draw = np.random.default_rng(0)
    scale = draw.lognormal(size=(rows, 1))
    ks = [1, 2, 4, 8, 16, 32, 64]
    estimates, prefixes = [], []
    for _ in range(repeats):
        errors = torch.from_numpy(scale * draw.exponential(size=(rows, n)))
        estimates.append(expected_best_of_k(errors, ks).mean(0))
        prefixes.append(torch.stack([errors[:, :k].min(1).values.mean() for k in ks]))
    ours, theirs = torch.stack(estimates), torch.stack(prefixes)
    truth = torch.tensor([scale.mean() / k for k in ks])  # the minimum of K exponentials has mean 1 / K
    error = ours.std(0) / repeats**0.5
    assert ((ours.mean(0) - truth).abs() < 4 * error).all()
    assert float(theirs[:, 0].var() / ours[:, 0].var()) > 30


@given(st.integers(2, 40), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_curve_falls_with_k(n: int, seed: int) -> None:
    errors = torch.from_numpy(np.random.default_rng(seed).lognormal(sigma=3.0, size=(3, n)))
    curve = expected_best_of_k(errors, range(1, n + 1))
    assert (curve.diff(dim=1) <= 1e-12 * curve[:, :1]).all()
    torch.testing.assert_close(curve[:, 0], errors.mean(1))
    torch.testing.assert_close(curve[:, -1], errors.min(1).values)


def test_weights_are_probabilities_also_for_thousands_of_candidates() -> None:
    weights = order_statistic_weights(4096, [1, 64, 1000, 4095, 4096])
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
    assert (weights >= 0).all()


def test_what_cannot_be_estimated_is_refused() -> None:
    errors = torch.rand(2, 4)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"best of {k} cannot be estimated from 4"):
            expected_best_of_k(errors, [k])
    with pytest.raises(ValueError, match="finite"):
        expected_best_of_k(torch.tensor([[1.0, float("nan")]]), [1])
    with pytest.raises(ValueError, match="values"):
        expected_of_selected(torch.rand(2, 3), errors, [1])
