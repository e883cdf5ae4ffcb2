"""Five numbers that the literature calls variance explained, against NumPy, and resampled ones against copies of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from theodolite.functional import reconstruction_metrics as metrics
from theodolite.functional.reconstruction_metrics import ErrorSums, TargetSums, group_sums, resampled_metrics, squared_norms

NAMES = ("mse", "fve", "fve_residual_centred", "fve_directional", "r2_scalar_mean")


def reference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    r, d = a - b, a.shape[1]
    total = a.var(axis=0, ddof=1).sum()
    unit_a, unit_b = (x * np.sqrt(d) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    unit_total = ((unit_a - unit_a.mean(0)) ** 2).sum()
    return {
        "mse": (r**2).mean(),
        "fve": 1 - (r**2).sum() / ((a - a.mean(0)) ** 2).sum(),
        "fve_residual_centred": 1 - r.var(axis=0, ddof=1).sum() / total,
        "fve_directional": 1 - ((unit_a - unit_b) ** 2).sum() / unit_total,
        "r2_scalar_mean": 1 - (r**2).sum() / ((a - a.mean()) ** 2).sum(),
    }


def rows(n: int = 40, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(n, d)) * [1, 2, 3, 1, 1, 5] + [0, 10, 0, -3, 0, 1]
    return a, a + draw.normal(0.5, 0.7, size=(n, d))


def test_each_metric_is_its_formula() -> None:
    a, b = rows()
    for name, value in reference(a, b).items():
        assert getattr(metrics, name)(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(value, abs=1e-12), name


def test_what_each_metric_forgives() -> None:
    a = torch.from_numpy(rows()[0])
    biased = a + 2.0
    assert metrics.fve_residual_centred(a, biased) == pytest.approx(1.0)
    assert metrics.fve(a, biased) < 0.9
    assert metrics.fve_directional(a, 3 * a) == pytest.approx(1.0)
    mean = a.mean(0).expand_as(a)
    assert metrics.fve(a, mean) == pytest.approx(0.0, abs=1e-12)
    assert metrics.r2_scalar_mean(a, mean) > 0.5, "one scalar mean credits the mean of each dimension"
    assert np.isnan(metrics.fve(torch.ones(3, 2), torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="Need two"):
        metrics.fve(a, a[:3])


def test_large_offsets_keep_their_digits() -> None:
    a, b = rows()
    shifted = resampled_metrics(torch.ones(1, 4, dtype=torch.float64), *sums(a + 1e6, b + 1e6, np.arange(40) % 4))
    for name, value in reference(a, b).items():
        if name in ("mse", "fve", "fve_residual_centred"):
            assert float(shifted[name][0, 0]) == pytest.approx(value, abs=1e-7), name


def sums(a: np.ndarray, b: np.ndarray, group: np.ndarray) -> tuple[TargetSums, ErrorSums]:
    target, other, of = torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(group)
    groups = int(of.max()) + 1
    residual = (target - other)[:, None]
    directional = (metrics.directions(target) - metrics.directions(other)).square().sum(1, keepdim=True)
    errors = ErrorSums(
        group_sums(residual.square().sum(2), of, groups), group_sums(directional, of, groups), group_sums(residual, of, groups)
    )
    return TargetSums.of(target, of, groups), errors


@pytest.mark.parametrize("groups", [4, 20])  # fewer and more than dimensions: both ways of taking norms
def test_resampled_metrics_are_those_of_copied_rows(groups: int) -> None:
    a, b = rows()
    group = np.random.default_rng(1).permutation(np.arange(40) % groups)
    counts = np.random.default_rng(2).multinomial(groups, [1 / groups] * groups, size=5)
    found = resampled_metrics(torch.from_numpy(counts).double(), *sums(a, b, group))
    assert set(found) == set(NAMES)
    for replicate, count in enumerate(counts):
        taken = np.concatenate([np.flatnonzero(group == g) for g in range(groups) for _ in range(count[g])])
        for name, value in reference(a[taken], b[taken]).items():
            assert float(found[name][replicate, 0]) == pytest.approx(value, abs=1e-10), name


def test_norms_of_weighted_sums_both_ways() -> None:
    counts = torch.rand(3, 5, dtype=torch.float64)
    for d in (2, 9):
        vectors = torch.rand(5, d, dtype=torch.float64)
        torch.testing.assert_close(squared_norms(counts, vectors), (counts @ vectors).square().sum(1))
