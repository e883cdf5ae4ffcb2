"""Intervals over documents: coverage in simulation, pairing, agreement with SciPy, milliseconds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import stats

from theodolite.functional.best_of_k import expected_best_of_k
from theodolite.functional.bootstrap import bca_interval, bootstrap_counts, jackknife_counts, percentile_interval
from theodolite.functional.reconstruction_metrics import ErrorSums, TargetSums, group_sums, resampled_metrics

KS = [1, 4]


def clustered(draw: np.random.Generator, documents: int, per_document: int, d: int = 3, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a part per document, and errors of n candidates that share a part per document too."""
    shared = draw.normal(size=(documents, 1, d))
    target = (shared + draw.normal(size=(documents, per_document, d))).reshape(-1, d)
    level = draw.gamma(2.0, 0.2, size=(documents, 1, 1))
    errors = (level * draw.chisquare(3, size=(documents, per_document, n)) / 3).reshape(-1, n)
    return torch.from_numpy(target), torch.from_numpy(errors)


def fve_of(counts: torch.Tensor, target: torch.Tensor, errors: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    groups = int(group.max()) + 1
    return resampled_metrics(
        counts, TargetSums.of(target, group, groups), ErrorSums(group_sums(expected_best_of_k(errors, KS), group, groups))
    )["fve"]


def test_intervals_cover_the_truth_in_93_to_97_percent_of_simulations_with_clustered_rows() -> None:
    documents, per_document, simulations = 60, 5, 600
    group = torch.arange(documents).repeat_interleave(per_document)
    large = np.random.default_rng(10**6)
    truth = fve_of(torch.ones(1, 20000, dtype=torch.float64), *clustered(large, 20000, 5), torch.arange(20000).repeat_interleave(5))[0]
    counts = bootstrap_counts(documents, 600, seed=0)
    by_row = bootstrap_counts(documents * per_document, 400, seed=0)
    covered, gained, naive = torch.zeros(2), 0, torch.zeros(2)
    for simulation in range(simulations):
        target, errors = clustered(np.random.default_rng(simulation), documents, per_document)
        replicates = fve_of(counts, target, errors, group)
        low, high = percentile_interval(replicates, documents)
        covered += ((low <= truth) & (truth <= high)).float()
        low, high = percentile_interval(replicates[:, 1] - replicates[:, 0], documents)
        gained += int(low <= truth[1] - truth[0] <= high)
        if simulation < 150:
            low, high = percentile_interval(fve_of(by_row, target, errors, torch.arange(len(target))), len(target))
            naive += ((low <= truth) & (truth <= high)).float()
    coverage = [*(covered / simulations).tolist(), gained / simulations]
    print(f"coverage at K=1, K=4 and of the gain: {coverage}; resampling rows instead of documents: {(naive / 150).tolist()}")
    assert all(0.93 <= share <= 0.97 for share in coverage)
    assert (naive / 150 < 0.9).all(), "resampling rows as if they were independent must show as undercoverage"


def test_counts_are_multinomial_and_depend_on_the_seed_alone() -> None:
    counts = bootstrap_counts(50, 2000, seed=1)
    assert (counts.sum(1) == 50).all()
    assert float(counts.mean()) == pytest.approx(1.0)
    assert float(counts.var()) == pytest.approx(1 - 1 / 50, rel=0.05)
    assert torch.equal(counts, bootstrap_counts(50, 2000, seed=1))
    assert not torch.equal(counts, bootstrap_counts(50, 2000, seed=2))
    with pytest.raises(ValueError, match="at least 2 documents"):
        bootstrap_counts(1, 100, seed=0)


def test_bca_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).exponential(size=60)
    counts = bootstrap_counts(60, 8000, seed=0)
    exact = torch.from_numpy(values)
    mean = [(weights @ exact / weights.sum(1))[:, None] for weights in (counts, jackknife_counts(60))]
    low, high = bca_interval(exact.mean()[None], mean[0], mean[1])
    theirs = stats.bootstrap((values,), np.mean, n_resamples=8000, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert float(low) == pytest.approx(theirs.low, rel=0.02)
    assert float(high) == pytest.approx(theirs.high, rel=0.02)


def test_bca_stays_finite_when_all_replicates_fall_on_one_side() -> None:
    low, high = bca_interval(torch.tensor([2.0]), torch.rand(100, 1).double(), torch.rand(10, 1).double())
    assert torch.isfinite(low).all()
    assert torch.isfinite(high).all()


def test_level_outside_of_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        percentile_interval(torch.rand(10, 1), 5, level=95)


def test_2000_replicates_of_a_curve_take_milliseconds() -> None:
    target, errors = clustered(np.random.default_rng(0), 150, 5, d=64)
    group = torch.arange(150).repeat_interleave(5)
    fve_of(bootstrap_counts(150, 2000, 0), target, errors, group)
    start = time.process_time()
    percentile_interval(fve_of(bootstrap_counts(150, 2000, 0), target, errors, group), 150)
    assert time.process_time() - start < 0.5
